"""`reproduce`: published results from published data, next to what the papers print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaling_lab.api.html import html_table
from scaling_lab.api.result import captured

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.analysis.reproduce import Reproduction


def reproduce(published: str, *, resamples: int = 4000, seed: int = 0) -> ReproductionResult:
    """A published result computed again from the published data, which travel with the package.

    Args:
        published: besiroglu2024, gemstones2025, hoffmann2022, misfitting2025, muennighoff2023 or porian2024.
        resamples: of the bootstrap, for standard errors and intervals that a paper prints.
        seed: of the bootstrap.

    Raises:
        UserError: an unknown publication, or fewer than 20 resamples.

    >>> found = sl.reproduce("hoffmann2022", resamples=100)
    >>> found.to_frame()[["quantity", "published", "ours", "verdict"]].shape[1]
    4
    """
    from scaling_lab.analysis.reproduce import ReproduceSettings, publication_names
    from scaling_lab.analysis.reproduce import reproduce as compute
    from scaling_lab.core.errors import unknown

    if published not in publication_names():
        raise unknown("published", published, publication_names())
    ReproduceSettings(published, resamples, seed)  # refuses what the command line refuses
    return ReproductionResult(compute(published, resamples=resamples, seed=seed))


class ReproductionResult:
    """The paper's numbers, ours, the difference and the reason for it."""

    def __init__(self, made: Reproduction) -> None:
        self.reproduction = made

    def to_frame(self) -> pd.DataFrame:
        """One row a number: part, quantity, published, ours, difference, the published interval, verdict and remark."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for part in self.to_dict()["parts"]:
            for row in part["rows"]:
                lo, hi = row.pop("published_interval") or (None, None)
                rows.append({"part": part["title"], **row, "published_lo": lo, "published_hi": hi})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """What `scaling-lab reproduce --json` prints of the publication."""
        return self.reproduction.to_json_dict()

    def summary(self, width: int = 110) -> str:
        """The comparison as the terminal shows it."""
        from scaling_lab.cli.commands.reproduce import print_reproduction

        return captured(lambda console: print_reproduction(console, self.reproduction), width)

    def __repr__(self) -> str:
        made = self.reproduction
        compared = [row for row in made.rows if row.published is not None]
        agree = sum(row.verdict in ("as printed", "inside", "lower") for row in compared)
        return f"{made.name}: {made.title}\n  {agree} of {len(compared)} numbers as printed, or inside the published interval"

    def _repr_html_(self) -> str:
        made = self.reproduction
        rows = [
            (p.title, r.quantity, r.published or "", f"{r.ours:.4g}", r.verdict)
            for p in made.parts
            for r in p.rows
        ]
        return html_table(
            f"{made.name}: {made.title}", ("part", "quantity", "published", "ours", "verdict"), rows
        )
