"""Comparison with published results: the tables of a comparison, and running a publication by name.

    reproduction = reproduce("porian2024")
    for part in reproduction.parts: ...

A publication is one file in `scaling_lab.analysis.published`, next to its data: a frozen dataclass with a `kind`, found by
scanning. It uses the same settings, approaches and bootstrap as any analysis (`estimate_packed`, `band_packed`), and gives
a reason whenever our number differs from the paper's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal

from scaling_lab.analysis.analysis import read_observations, select_points
from scaling_lab.analysis.estimate import Estimate, Interval
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.bootstrap import Approach, BootstrapSettings, bootstrap
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.registry import members

SCHEMA_VERSION = 1
ALL = "all"
_PACKAGE = "scaling_lab.analysis.published"
_FOLDER = Path(__file__).parent / "published"

Source = Literal["paper", "release", "reference"]


@dataclass(frozen=True)
class ReproduceSettings:
    """The options of `scaling-lab reproduce`."""

    published: str | None = None
    """Which publication, or all of them"""
    # As in Besiroglu et al. 2024.
    resamples: int = 4000
    """Bootstrap resamples for the standard errors and intervals that a paper prints"""
    seed: int = 0
    """Seed of the bootstrap"""

    def __post_init__(self) -> None:
        choices = (*publication_names(), ALL)
        if self.published is None:
            raise UserError(f"published is missing. Choices: {', '.join(choices)}.")
        if self.published not in choices:
            raise unknown("published", self.published, choices)
        if self.resamples < 20:
            raise UserError(
                f"resamples={self.resamples} must be at least 20, the minimum for a standard error."
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative.")

    @property
    def names(self) -> tuple[str, ...]:
        """The selected publications."""
        return publication_names() if self.published == ALL else (str(self.published),)


@dataclass(frozen=True)
class ComparisonRow:
    """One quantity: the published number and ours."""

    quantity: str
    ours: float
    published: str | None = None
    """As printed, to keep its digits ("0.513", "1.5e12"); None for a number of ours without a published one."""
    interval: Interval | None = None
    """The published interval."""
    interval_kind: str | None = None
    """Its kind: "95%", "2 SE"."""
    source: Source = "paper"
    """Where the published number is from: the paper, the authors' code or data release, or an independent computation of the
    same optimum (reference)."""
    remark: str | None = None
    """Why ours differs, or what an unpublished number shows."""
    lower_is_better: bool = False
    """Whether it is an objective: lower is closer to the optimum."""

    def __post_init__(self) -> None:
        if (self.interval is None) != (self.interval_kind is None):
            raise ValueError(f"{self.quantity}: give both an interval and its kind, or neither.")

    @property
    def published_value(self) -> float | None:
        return None if self.published is None else float(self.published)

    @property
    def difference(self) -> float | None:
        """Our number minus the published one."""
        return None if self.published is None else self.ours - float(self.published)

    @property
    def inside(self) -> bool | None:
        """Whether ours lies in the published interval; None if there is none."""
        return None if self.interval is None else self.interval.contains(self.ours)

    @property
    def as_printed(self) -> bool | None:
        """Whether ours rounds to the published digits."""
        if self.published is None or self.difference is None:
            return None
        last_digit = 10.0 ** int(Decimal(self.published).as_tuple().exponent)
        return abs(self.difference) <= 0.5 * last_digit * (1 + 1e-9)

    @property
    def verdict(self) -> str:
        """as printed, inside, OUTSIDE, lower, HIGHER or differs; empty for a number of ours without a published one."""
        if self.inside is False:
            return "as printed, OUTSIDE" if self.as_printed else "OUTSIDE"
        if self.as_printed:
            return "as printed"
        if self.inside:
            return "inside"
        if self.difference is None:
            return ""
        if self.lower_is_better:
            return "lower" if self.difference < 0 else "HIGHER"
        return "differs"


@dataclass(frozen=True)
class ComparisonTable:
    """One table of a comparison: rows that are computed in the same way."""

    title: str
    rows: tuple[ComparisonRow, ...]
    options: str | None = None
    """Options with which `scaling-lab analyze runs=TABLE` gives these numbers, if one command does."""


@dataclass(frozen=True)
class Reproduction:
    """The comparison with one publication."""

    name: str
    title: str
    reference: str
    data: str
    table: Path | None
    """The main packaged table."""
    parts: tuple[ComparisonTable, ...]

    @property
    def rows(self) -> tuple[ComparisonRow, ...]:
        return tuple(row for part in self.parts for row in part.rows)

    def row(self, quantity: str, part: int = 0) -> ComparisonRow:
        """The row with this quantity in a part; raises `KeyError` if there is none."""
        for row in self.parts[part].rows:
            if row.quantity == quantity:
                return row
        raise KeyError(quantity)

    def to_json_dict(self) -> dict[str, Any]:
        """The comparison as plain data; missing values are None."""
        return {
            "name": self.name,
            "title": self.title,
            "reference": self.reference,
            "data": self.data,
            "parts": [
                {"title": p.title, "analyze_options": p.options, "rows": [_row_dict(r) for r in p.rows]}
                for p in self.parts
            ],
        }


class Publication(ABC):
    """A publication. Subclasses are frozen dataclasses with a `kind`, the name on the command line."""

    kind: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    data: ClassVar[str]
    """The origin of the data."""
    table: ClassVar[str | None] = None
    """File name of the packaged table."""

    @abstractmethod
    def parts(self, settings: ReproduceSettings) -> Sequence[ComparisonTable]:
        """Compute all tables of the comparison."""


def publication_names() -> tuple[str, ...]:
    """Names of all publications, in alphabetical order."""
    return tuple(sorted(members(_PACKAGE)))


def reproduce(name: str, *, resamples: int = 4000, seed: int = 0) -> Reproduction:
    """Compute the comparison with one publication.

    Raises:
        UserError: an unknown publication (`all` is for the command line only).
    """
    if name not in publication_names():
        raise unknown("published", name, publication_names())
    publication: Publication = members(_PACKAGE)[name]()
    settings = ReproduceSettings(name, resamples, seed)
    table = None if publication.table is None else packed(publication.table)
    return Reproduction(
        name,
        publication.title,
        publication.reference,
        publication.data,
        table,
        tuple(publication.parts(settings)),
    )


# -- helpers for publications ---------------------------------------------------------------------------------------------
def packed(file: str) -> Path:
    """The path of a packaged table."""
    return _FOLDER / file


def estimate_packed(
    file: str, approach: str, settings: AnalysisSettings, *, last_rows: bool = False
) -> Estimate:
    """The estimate of one approach on a packaged table, exactly as in an analysis: read, select points, estimate.

    Args:
        last_rows: of the points selected, the last of each run.
    """
    points = select_points(read_observations(packed(file), settings), settings)
    if last_rows:
        points = points.final()
    return _approach(approach, settings).estimate(points)


def band_packed(
    file: str, approach: str, settings: AnalysisSettings, estimate: Estimate, chosen: BootstrapSettings
) -> Band:
    """The bootstrap of one approach on a packaged table."""
    points = select_points(read_observations(packed(file), settings), settings)
    return bootstrap(_approach(approach, settings), points, estimate, chosen, settings.seed)


def params_exponent(estimate: Estimate) -> float:
    """The exponent a of N_opt ~ C^a; raises `RuntimeError` with the message of the estimate if it has no frontier."""
    if estimate.frontier is None:
        raise RuntimeError(f"{estimate.approach}: {estimate.message}")
    return float(estimate.frontier.params.exponent)


def _approach(name: str, settings: AnalysisSettings) -> Approach:
    approaches: Mapping[str, Approach] = {a.name: a for a in settings.approach.all()}
    return approaches[name]


def _row_dict(row: ComparisonRow) -> dict[str, Any]:
    return {
        "quantity": row.quantity,
        "published": row.published_value,
        "published_text": row.published,
        "source": None if row.published is None else row.source,
        "ours": row.ours,
        "difference": row.difference,
        "published_interval": None if row.interval is None else [row.interval.lo, row.interval.hi],
        "published_interval_kind": row.interval_kind,
        "inside_published_interval": row.inside,
        "equal_as_printed": row.as_printed,
        "verdict": row.verdict or None,
        "remark": row.remark,
    }
