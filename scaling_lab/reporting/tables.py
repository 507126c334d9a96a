"""Owns the report's tables: plain text cells, ready for the page, every number from the analysis or the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.estimate import BudgetStatus, FitStatus, Interval
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.prediction import Quantity
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Plan
from scaling_lab.reporting.style import (
    APPROACH_NAMES,
    SHORT_APPROACH_NAMES,
    format_count,
    format_flops,
    significant,
)

NOTHING = "–"
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eta": "η"}
# Rows of a table of runs beyond this are left to analysis.json and the records: a page of 10,000 rows is not read.
MAX_ROWS = 400
# Reading a corpus to count its tokens takes a second a hundred MB; a larger one is not read for a column of the report.
_CORPUS_READ_UP_TO_TOKENS = 200_000_000

# Hoffmann et al. 2022 (arXiv 2203.15556), table 2, with the 10th and 90th percentiles; Kaplan et al. 2020
# (arXiv 2001.08361), section 6; Besiroglu et al. 2024 (arXiv 2404.10102), 90% from their standard error of .020.
PUBLISHED = (
    ("Kaplan et al. 2020", "0.73", NOTHING, "0.27", NOTHING),
    ("Chinchilla, approach 1", "0.50", "0.488 to 0.502", "0.50", "0.501 to 0.512"),
    ("Chinchilla, approach 2", "0.49", "0.462 to 0.534", "0.51", "0.483 to 0.529"),
    ("Chinchilla, approach 3", "0.46", "0.454 to 0.455", "0.54", "0.542 to 0.543"),
    ("Chinchilla, approach 3, refitted (Besiroglu et al. 2024)", "0.513", "SE 0.020", "0.487", NOTHING),
)


@dataclass(frozen=True)
class Row:
    cells: tuple[str, ...]
    mark: str = ""
    """CSS class: "published", "warn", or nothing."""


@dataclass(frozen=True)
class TextTable:
    """`numeric` columns are set flush right; `note` goes below."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: frozenset[int] = frozenset()
    note: str = ""


def exponents(analysis: Analysis) -> TextTable:
    """Ours beside Kaplan's and Chinchilla's."""
    rows, how = [], []
    for estimate, band in zip(analysis.estimates, analysis.bands):
        frontier = estimate.frontier
        ok = estimate.status is FitStatus.CONVERGED
        values = (NOTHING,) * 4
        if frontier is not None:
            values = (
                f"{frontier.params.exponent:.3f}",
                span_text(band.interval("params_exponent")),
                f"{frontier.tokens.exponent:.3f}",
                span_text(band.interval("tokens_exponent")),
            )
            how.append(f"{SHORT_APPROACH_NAMES[estimate.approach]}, {_how(band)}")
        rows.append(
            Row((APPROACH_NAMES[estimate.approach], *values, estimate.status.value), "" if ok else "warn")
        )
    rows += [Row((*p, "published"), "published") for p in PUBLISHED]
    level = f"{analysis.settings.bootstrap.level:.0%}"
    return TextTable(
        ("", "N as C to the", level, "D as C to the", level, "status"),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
        (f"Our intervals: {'; '.join(how)}. " if how else "")
        + "Chinchilla's intervals are the 10th and 90th percentiles of its table 2. Exponents compare only under the same "
        "counting of N and C: see “How N and C are counted”.",
    )


def _how(band: Band) -> str:
    if band.interval("params_exponent") is None:
        return band.message or "no interval"
    unit = "" if band.unit in band.method else f" by {band.unit}"
    text = f"{band.method}{unit}, {band.requested - band.failed} of {band.requested} resamples"
    return text if band.message is None else f"{text}. {band.message}"


def law_parameters(analysis: Analysis) -> TextTable | None:
    """The fitted law's parameters with bootstrap standard errors; None where no law was fitted."""
    estimate, band = analysis.estimate("parametric"), analysis.band("parametric")
    if not estimate.fits:
        return None
    fit = estimate.fits[0]
    rows = []
    for name, value in fit.parameters.items():
        se = band.standard_error(name)
        rows.append(
            Row(
                (
                    GREEK.get(name, name),
                    significant(value, 4),
                    _maybe(se, lambda v: significant(v, 2)),
                    span_text(band.interval(name), lambda v: significant(v, 4)),
                )
            )
        )
    note = (
        f"{fit.message} Objective {fit.objective:.6g} (sum of Huber losses of ln L, "
        f"delta {analysis.settings.approach.parametric.huber_delta:g}) over {fit.n_observations} points. "
        f"Standard errors and intervals: {_how(band)}."
    )
    level = f"{band.level:.0%}"
    return TextTable(("", "value", "standard error", level), tuple(rows), frozenset({1, 2, 3}), note)


def budgets(analysis: Analysis) -> TextTable:
    """The IsoFLOP valleys: each budget's minimum, or why it has none."""
    rows = []
    for b in analysis.estimate("isoflop").budgets:
        ratio = None if b.params_opt is None or b.tokens_opt is None else b.tokens_opt / b.params_opt
        rows.append(
            Row(
                (
                    format_flops(b.budget_flops),
                    str(b.n_runs),
                    _maybe(b.params_opt, format_count),
                    _maybe(b.tokens_opt, format_count),
                    _maybe(ratio, lambda v: f"{v:.3g}"),
                    _maybe(b.loss_opt, lambda v: f"{v:.4f}"),
                    b.status.value,
                    b.message or "",
                ),
                "" if b.status is BudgetStatus.OK else "warn",
            )
        )
    columns = ("FLOPs", "runs", "best N", "best D", "D / N", "loss there", "status", "why")
    return _limited(TextTable(columns, tuple(rows), frozenset(range(6))))


def backtest(analysis: Analysis) -> TextTable:
    """Predicted against reached at the largest budget, which the fits had not seen."""
    rows = []
    for t in analysis.backtest:
        p = t.predicted
        rows.append(
            Row(
                (
                    APPROACH_NAMES[t.approach],
                    quantity_text(p.loss_opt if p else None, lambda v: f"{v:.4f}"),
                    f"{t.best_sampled_loss_nats:.4f}",
                    quantity_text(p.params_opt if p else None, format_count),
                    _maybe(t.observed.params_opt, format_count),
                    _maybe(p.extrapolation_factor if p else None, lambda v: f"{v:.3g}x"),
                ),
                "" if p is not None else "warn",
            )
        )
    columns = ("", "loss predicted", "best run", "best N predicted", "best N found", "beyond the fit")
    return TextTable(columns, tuple(rows), frozenset({1, 2, 3, 4, 5}))


def predictions(analysis: Analysis) -> TextTable:
    """What each approach expects at larger budgets."""
    rows = [
        Row(
            (
                format_flops(p.compute_flops),
                SHORT_APPROACH_NAMES[p.approach],
                quantity_text(p.params_opt, format_count),
                quantity_text(p.tokens_opt, format_count),
                quantity_text(p.tokens_per_param, lambda v: f"{v:.3g}"),
                quantity_text(p.loss_opt, lambda v: f"{v:.3f}"),
                f"{p.extrapolation_factor:.3g}x",
            ),
            "warn" if p.extrapolation_factor > 30 else "",
        )
        for p in analysis.predictions
    ]
    columns = ("FLOPs", "by", "best N", "best D", "D / N", "loss", "beyond the data")
    return TextTable(columns, tuple(rows), frozenset({0, 2, 3, 4, 5, 6}))


def agreement(analysis: Analysis) -> TextTable:
    """Every pair of approaches: difference, its interval, and whether it may be zero."""
    words = {
        "params_exponent": "exponent of N",
        "tokens_exponent": "exponent of D",
        "log_params_opt": f"ln N at {format_flops(analysis.mean_compute_flops)} FLOPs",
    }
    rows = [
        Row(
            (
                " - ".join(SHORT_APPROACH_NAMES[a] for a in p.approaches),
                words.get(p.quantity, p.quantity),
                f"{p.difference:+.3f}",
                span_text(p.interval, lambda v: f"{v:+.3f}"),
                {True: "yes", False: "no", None: "not known"}[p.agree],
            ),
            "warn" if p.agree is False else "",
        )
        for p in analysis.agreement.pairs
    ]
    columns = ("", "quantity", "difference", f"{analysis.settings.bootstrap.level:.0%}", "agree")
    return TextTable(columns, tuple(rows), frozenset({2, 3}))


def sensitivity(analysis: Analysis) -> TextTable:
    """The question under every other choice that was tried."""
    rows = [
        Row(
            (
                r.kind,
                r.choice,
                SHORT_APPROACH_NAMES[r.approach],
                _maybe(r.params_exponent, lambda v: f"{v:.3f}"),
                _maybe(r.tokens_exponent, lambda v: f"{v:.3f}"),
                _maybe(r.change, lambda v: f"{v:+.3f}"),
                r.message or ("" if r.status == "converged" else r.status),
            ),
            "" if r.status == "converged" else "warn",
        )
        for r in analysis.sensitivity
    ]
    columns = ("kind", "choice", "approach", "N as C to the", "D as C to the", "change in N's", "")
    return TextTable(columns, tuple(rows), frozenset({3, 4, 5}))


def dropped(analysis: Analysis | None, unreadable: Sequence[tuple[str, str]] = ()) -> TextTable:
    """Rows and runs that are not analysed, and records that could not be read, with the reason of each."""
    found = () if analysis is None else analysis.observations.dropped
    rows = [Row((d.run_id, NOTHING if d.row is None else str(d.row), d.reason)) for d in found]
    rows += [Row((run_id, NOTHING, reason), "warn") for run_id, reason in unreadable]
    return _limited(TextTable(("run", "row", "why it is left out"), tuple(rows), frozenset({1})))


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
            _maybe(r.metrics.get("bits_per_byte"), "{:.4f}".format),
            status,
            f"{r.wall_time_s:.3g} s",
        )
        rows.append(Row(cells, "" if r.status is RunStatus.COMPLETED else "warn"))
    done = {r.run_id for r in records}
    for p in plan.runs if plan is not None else ():
        if p.run_id not in done:
            s = p.spec
            n = s.n_params()
            rows.append(
                Row(
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
    return _limited(TextTable(columns, tuple(rows), frozenset(range(1, 11)) | {12}, note.strip()))


def _runs_of_table(analysis: Analysis) -> TextTable:
    p = analysis.points.with_budgets()
    rows = tuple(
        Row(
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
    return _limited(TextTable(columns, rows, frozenset(range(1, 6)), "From the table that was given."))


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


def _limited(table: TextTable) -> TextTable:
    if len(table.rows) <= MAX_ROWS:
        return table
    note = f"{table.note} The first {MAX_ROWS} of {len(table.rows)} rows.".strip()
    return TextTable(table.columns, table.rows[:MAX_ROWS], table.numeric, note)


def _three(value: float) -> str:
    return f"{value:.3f}"


def span_text(interval: Interval | None, text: Callable[[float], str] = _three) -> str:
    return NOTHING if interval is None else f"{text(interval.lo)} to {text(interval.hi)}"


def _maybe(value: float | None, text: Callable[[float], str]) -> str:
    return NOTHING if value is None else text(value)


def quantity_text(quantity: Quantity | None, text: Callable[[float], str]) -> str:
    if quantity is None:
        return NOTHING
    value = text(quantity.estimate)
    return (
        value
        if quantity.interval is None
        else f"{value} ({text(quantity.interval.lo)} to {text(quantity.interval.hi)})"
    )
