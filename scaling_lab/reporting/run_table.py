"""The report's table of runs: those of the records, or of the table that was analyzed."""

from __future__ import annotations

from collections.abc import Sequence

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.text import NOTHING, format_count, format_flops
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Plan
from scaling_lab.reporting.tables import TableRow, TextTable, limited

# Reading a corpus to count its tokens takes a second a hundred MB; a larger one is not read for a column of the report.
_CORPUS_READ_UP_TO_TOKENS = 200_000_000


def runs(analysis: Analysis | None, records: Sequence[RunRecord], plan: Plan | None = None) -> TextTable:
    """Every run there is: of the records, else of the table; planned runs without a record are listed as such."""
    if not records and analysis is not None:
        return _runs_of_table(analysis)
    counted = _counted(analysis)
    epochs = _Epochs()
    rows = []
    for r in sorted(records, key=lambda r: (r.spec.budget_flops, r.spec.n_params(), r.spec.seed_init)):
        n = counted.get(r.run_id, r.spec.n_params())
        d = float(r.spec.train_tokens)
        loss = NOTHING if r.final_val_loss_nats is None else f"{r.final_val_loss_nats:.4f}"
        if r.final_val_loss_sem_nats is not None:
            loss += f" ± {r.final_val_loss_sem_nats:.4f}"
        status = r.status.value + (f": {r.reason}" if r.reason else "")
        cells = (
            r.run_id,
            format_flops(r.spec.budget_flops),
            str(r.spec.shape.width),
            str(r.spec.shape.depth),
            format_count(n),
            format_count(d),
            f"{d / n:.3g}",
            epochs.of(r),
            f"{r.spec.optimizer.peak_lr:.3g}",
            loss,
            NOTHING if (bits := r.metrics.get("bits_per_byte")) is None else f"{bits:.4f}",
            status,
            f"{r.wall_time_s:.3g} s",
        )
        rows.append(TableRow(cells, "" if r.status is RunStatus.COMPLETED else "warn"))
    done = {r.run_id for r in records}
    for p in plan.runs if plan is not None else ():
        if p.run_id not in done:
            s = p.spec
            n = s.n_params()
            rows.append(
                TableRow(
                    (p.run_id, format_flops(s.budget_flops), str(s.shape.width), str(s.shape.depth), format_count(n),
                     format_count(s.train_tokens), f"{s.train_tokens / n:.3g}", NOTHING,
                     f"{s.optimizer.peak_lr:.3g}", NOTHING, NOTHING, "not done yet", NOTHING),
                    "pending",
                )
            )  # fmt: skip
    columns = ("run", "budget, FLOPs", "width", "depth", "N", "D", "D / N", "epochs", "peak LR",
               "final loss ± SEM, nats", "bits per byte", "status", "time")  # fmt: skip
    note = (
        "SEM: standard error of the loss over the validation set, not over seeds. Bits per byte compare tokenizers. "
        + epochs.note
    )
    return limited(TextTable(columns, tuple(rows), frozenset(range(1, 11)) | {12}, note.strip()))


def _runs_of_table(analysis: Analysis) -> TextTable:
    p = analysis.points.with_budgets()
    rows = tuple(
        TableRow(
            (
                str(p.run_id[i]),
                format_flops(float(p.compute_flops[i])),
                format_count(float(p.n_params[i])),
                format_count(float(p.n_tokens[i])),
                f"{p.n_tokens[i] / p.n_params[i]:.3g}",
                f"{p.loss_nats[i]:.4f}",
            )
        )
        for i in range(p.n_points)
    )
    columns = ("run", "FLOPs", "N", "D", "D / N", "loss, nats")
    return limited(TextTable(columns, rows, frozenset(range(1, 6)), "From the table that was given."))


class _Epochs:
    """Passes over the training split, where the corpus that the run saw can be counted here and now."""

    def __init__(self) -> None:
        self.note = ""
        self._tokens: dict[tuple[str, str], int | None] = {}

    def of(self, record: RunRecord) -> str:
        source, fingerprint = record.spec.data, record.environment.data_fingerprint
        key = (repr(source), fingerprint)
        if key not in self._tokens:
            self._tokens[key] = self._count(source, fingerprint)
        tokens = self._tokens[key]
        return NOTHING if not tokens else f"{record.spec.train_tokens / tokens:.2g}"

    def _count(self, source: object, fingerprint: str) -> int | None:
        try:
            tokens = int(source.n_tokens("train"))  # type: ignore[attr-defined]
            if tokens <= _CORPUS_READ_UP_TO_TOKENS and source.fingerprint() == fingerprint:  # type: ignore[attr-defined]
                return tokens
        except (UserError, OSError):
            pass
        self.note = "Epochs are not shown where the corpus that a run saw is not on this machine (its fingerprint differs)."
        return None


def _counted(analysis: Analysis | None) -> dict[str, float]:
    """Run id -> N under the analysis' convention."""
    if analysis is None:
        return {}
    points = analysis.points
    return dict(zip(points.run_id.tolist(), points.n_params.tolist()))
