"""A sweep's folder: which of its runs are done, their losses and curves as frames, and its analysis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from scaling_lab.api.html import html_table
from scaling_lab.api.options import AnalysisOptions, analysis_settings, call_text
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.storage.store import RunStore

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.api.result import AnalysisResult
    from scaling_lab.cli.display.sweep_status import SweepStatus
    from scaling_lab.core.record import RunRecord
    from scaling_lab.core.spec import Plan


class Sweep:
    """The runs of a sweep as they stand on disk, read anew at every call.

    Args:
        folder: of the sweep, `results/NAME`.

    Raises:
        UserError: the folder has neither a plan nor runs.

    >>> sweep = sl.Sweep("results/tiny")
    >>> sweep
    sweep tiny in results/tiny: 4 completed
    >>> sorted(sweep.to_frame().columns)[:4]
    ['budget_flops', 'depth', 'flops', 'loss']
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.store = RunStore(self.folder)
        if not self.store.plan_path.is_file() and not (self.folder / "runs").is_dir():
            near = ", ".join(self.store.other_sweeps()) or "none"
            raise UserError(
                f"folder={str(folder)!r} has neither plan.json nor runs. Sweeps beside it: {near}."
            )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def plan(self) -> Plan | None:
        """What plan.json says; None for single runs."""
        return self.store.read_plan() if self.store.plan_path.exists() else None

    @property
    def counts(self) -> dict[str, int]:
        """Runs in each state: completed, diverged, failed, interrupted, running, claimed, planned."""
        return self._status().counts

    @property
    def is_finished(self) -> bool:
        """Whether every run has ended, well or not."""
        return self._status().is_finished

    @property
    def records(self) -> list[RunRecord]:
        """The records of the runs that have ended, with their curves; those that cannot be read are left out."""
        from scaling_lab.analysis.data.ledger import load_ledger

        return load_ledger(self.store)[0]

    def to_frame(self, what: str = "runs") -> pd.DataFrame:
        """A table of the sweep.

        Args:
            what: runs (one row a run, indexed by `run_id`: state, sizes, tokens, FLOPs under the sweep's convention, final
                loss in nats per token), or curves (one row a point of a run's curve).
        """
        import pandas as pd

        if what == "runs":
            rows = [_run_row(row.spec, row.state) for row in self._status().rows]
            return pd.DataFrame(rows, columns=_RUN_COLUMNS).set_index("run_id")
        if what != "curves":
            raise unknown("to_frame: the table", what, ("curves", "runs"))
        from scaling_lab.analysis.data.ledger import curve_columns

        parts = [
            pd.DataFrame({"run_id": r.run_id, **curve_columns(r.curve)}) for r in self.records if len(r.curve)
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run_id": []})

    def analyze(
        self, *, tuning: str | Path | None = None, **options: Unpack[AnalysisOptions]
    ) -> AnalysisResult:
        """The three approaches on the runs that are done; the arguments are those of `sl.analyze` for a sweep."""
        from scaling_lab.api.analyze import analyze_sweep

        command = call_text("analyze", repr(str(self.folder)), options)
        return analyze_sweep(self.store, analysis_settings(options), tuning, command)

    def report(self, folder: str | Path | None = None) -> Path:
        """Write the sweep's report (default: into its own folder `report`); returns the page's path."""
        return self.analyze().report(folder or self.store.report_folder)

    def _status(self) -> SweepStatus:
        from scaling_lab.cli.display.sweep_status import read_status

        return read_status(self.store, self.plan)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {state}" for state, n in self.counts.items()) or "no runs"
        return f"sweep {self.name} in {self.folder}: {counts}"

    def _repr_html_(self) -> str:
        frame = self.to_frame().reset_index()
        shown = ["run_id", "state", "budget_flops", "params", "tokens", "loss", "reason"]
        rows = [
            ["" if cell != cell or cell is None else cell for cell in row]
            for row in frame[shown].head(40).to_numpy()
        ]
        more = len(frame) - len(rows)
        return html_table(repr(self), shown, rows, f"and {more} more" if more > 0 else "")


_RUN_COLUMNS = (
    "run_id", "state", "budget_flops", "params", "tokens", "flops", "width", "depth", "seed", "loss", "wall_time_s", "reason",
)  # fmt: skip


def _run_row(spec: Any, state: Any) -> dict[str, Any]:
    row = {
        "run_id": state.run_id,
        "state": state.state,
        "loss": state.final_val_loss_nats,
        "wall_time_s": state.wall_time_s,
        "reason": state.reason,
    }
    if spec is None:
        return row
    return row | {
        "budget_flops": spec.budget_flops,
        "params": spec.n_params(),
        "tokens": spec.train_tokens,
        "flops": spec.train_flops(),
        "width": spec.shape.width,
        "depth": spec.shape.depth,
        "seed": spec.seed_init,
    }
