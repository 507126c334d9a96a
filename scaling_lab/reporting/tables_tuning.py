"""Owns the report's tables of the tuning debt."""

from __future__ import annotations

from scaling_lab.analysis.estimate import Interval
from scaling_lab.analysis.studies.tuning import Tuning
from scaling_lab.reporting.style import SHORT_APPROACH_NAMES, format_count, format_flops
from scaling_lab.reporting.tables import NOTHING, Row, TextTable


def cells(tuning: Tuning) -> TextTable:
    """One row a tuned size and budget."""
    rows = []
    for c in tuning.cells:
        best = [
            f"{value:.2f}{_span(interval, '.2f')}"
            for value, interval in zip(c.best_over_used, c.best_over_used_intervals)
        ] or [NOTHING] * len(tuning.varied)
        debt = NOTHING if c.debt_nats is None else f"{c.debt_nats:.4f}{_span(c.debt_interval, '.4f')}"
        cells = (
            format_flops(c.budget_flops),
            format_count(c.n_params),
            str(c.n_runs),
            *best,
            debt,
            c.message or "",
        )
        rows.append(Row(cells, "" if c.message is None else "warn"))
    columns = ("FLOPs", "N", "runs", *(f"best {v} / the sweep's" for v in tuning.varied), "debt, nats", "")
    noise = (
        f"The noise of one loss is {tuning.noise_source}."
        if tuning.noise_nats is None
        else f"The noise of one loss, {tuning.noise_nats:.2g} nats, is from {tuning.noise_source}; intervals are at {tuning.level:.0%}."
    )
    note = f"{noise} Between these sizes and budgets the distance to the best setting and the curvature are interpolated."
    return TextTable(columns, tuple(rows), frozenset(range(len(columns) - 1)), note)


def exponents(tuning: Tuning) -> TextTable:
    """The exponents of N as trained and without the debt."""
    rows = []
    for e in tuning.exponents:
        known = e.params_exponent is not None and e.tuned_params_exponent is not None
        change = NOTHING
        if e.params_exponent is not None and e.tuned_params_exponent is not None:
            change = f"{e.tuned_params_exponent - e.params_exponent:+.3f}{_span(e.change_interval, '+.3f')}"
        values = (NOTHING if v is None else f"{v:.3f}" for v in (e.params_exponent, e.tuned_params_exponent))
        rows.append(Row((SHORT_APPROACH_NAMES[e.approach], *values, change, "" if known else e.message)))
    note = "The interval is that of the debt's error alone; the exponents' own intervals are above."
    columns = ("", "as trained", "if every size were tuned", "change", "")
    return TextTable(columns, tuple(rows), frozenset({1, 2, 3}), note)


def _span(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f" ({interval.lo:{form}} to {interval.hi:{form}})"
