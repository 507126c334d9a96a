"""Study: how far the learning rates of a sweep are from the best, what that costs, and the exponents without that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.record_losses import check_losses, with_loss
from scaling_lab.analysis.data.sweep_records import SweepRecords
from scaling_lab.analysis.estimate import Array, Interval
from scaling_lab.analysis.finding import (
    Axis,
    Cell,
    Chart,
    Column,
    Finding,
    FindingStatus,
    FindingTable,
    KeyQuantity,
    Panel,
    Series,
    values,
)
from scaling_lab.analysis.json_parts import interval_json, number
from scaling_lab.analysis.studies.base import LawAnalysis, StudyInput
from scaling_lab.analysis.studies.shared.excess_loss import (
    TrainedRuns,
    TunedCell,
    TunedExponents,
    Tuning,
    measure_excess_loss,
    tuned_exponents,
)
from scaling_lab.analysis.studies.shared.lr_quadratic import quadratic_rise
from scaling_lab.analysis.text import SHORT_APPROACH_NAMES, format_count, format_flops
from scaling_lab.core.counts import Convention
from scaling_lab.core.record import RunRecord, RunStatus

QUESTION = "How much loss do the sweep's learning rates cost, and what are the exponents without that?"
NEEDS = "a learning-rate sweep of the same sizes and budgets: tuning=SWEEP, or runs of design=learning_rate in the sweep"

# Parabolas are drawn this far, in ln LR, beyond the best setting and the sweep's own.
_DRAWN_BEYOND = 0.85


def find(given: StudyInput) -> Finding | None:
    laws, records = given.laws, given.records
    if laws is None or not records.law or not records.lr_sweep:
        return None
    if given.settings.metric is not None:
        records = records_with_loss(records, given.settings.metric)
    tuning = measure_tuning(
        records, laws, given.settings.bootstrap.level, given.settings.seed, given.settings.approach.all()
    )
    return replace(as_finding(tuning), documented={"tuning": _documented(tuning, laws.points)})


def as_finding(tuning: Tuning) -> Finding:
    """The excess loss of every tuned size and the exponents without it, with their figure."""
    return Finding(
        name="tuning",
        title="Checking LR tuning",
        question=QUESTION,
        answer=_answer(tuning),
        status=FindingStatus.ANSWERED if tuning.message is None else FindingStatus.NOT_ANSWERED,
        reason=tuning.message,
        level=tuning.level,
        quantities=_quantities(tuning),
        tables=(_exponents_table(tuning), _cells_table(tuning))
        if tuning.exponents
        else (_cells_table(tuning),),
        chart=_chart(tuning),
    )


def records_with_loss(records: SweepRecords, name: str) -> SweepRecords:
    """The records with another loss in place of the validation loss. Raises `UserError` where no tuned run has it."""
    check_losses(records.lr_sweep, "metric (with tuning)", [name])
    return SweepRecords(
        *(tuple(with_loss(r, name) for r in part) for part in (records.law, records.lr_sweep))
    )


def trained_runs(records: Sequence[RunRecord], convention: Convention) -> TrainedRuns:
    """The completed runs of `records`, N counted under `convention`."""
    done = [r for r in records if r.status is RunStatus.COMPLETED and r.final_val_loss_nats is not None]
    return TrainedRuns(
        names=np.array([r.run_id for r in done], dtype=object),
        n_params=np.array([r.count().n_params(convention) for r in done]),
        budget_flops=np.array([r.spec.budget_flops for r in done]),
        peak_lr=np.array([r.spec.optimizer.peak_lr for r in done]),
        batch_tokens=np.array([float(r.spec.batch_tokens) for r in done]),
        loss_nats=np.array([float(r.final_val_loss_nats or np.nan) for r in done]),
        seed=np.array([float(r.spec.seed_init) for r in done]),
    )


def measure_tuning(
    records: SweepRecords, laws: LawAnalysis, level: float, seed: int, approaches: Sequence[Any]
) -> Tuning:
    """The excess loss of every point of the law and the exponents without it; one point a run."""
    convention = Convention(laws.points.convention)
    sweep = trained_runs(records.law, convention)
    place = {name: i for i, name in enumerate(sweep.names)}
    # In the order of the points, without runs that are not among them.
    sweep = sweep.at(np.array([place[name] for name in laws.points.run_id], dtype=np.int64))
    tuning, samples = measure_excess_loss(
        sweep, trained_runs(records.lr_sweep, convention), level=level, seed=seed
    )
    return tuned_exponents(tuning, samples, laws.points, approaches, laws.estimates)


def _answer(tuning: Tuning) -> str:
    excess = [c.excess_nats for c in tuning.cells if c.excess_nats is not None]
    if not excess:
        return "No tuned size shows which learning rate is best."
    known = [
        e for e in tuning.exponents if e.params_exponent is not None and e.tuned_params_exponent is not None
    ]
    told = "; ".join(
        f"from {e.params_exponent:.3f} to {e.tuned_params_exponent:.3f} ({SHORT_APPROACH_NAMES[e.approach]})"
        for e in known
    )
    change = f", and tuning every size would move the exponent of N {told}" if told else ""
    return f"Mistuned learning rates cost at most {max(excess):.4f} nats at the tuned sizes{change}."


def _change(exponents: TunedExponents) -> float | None:
    if exponents.params_exponent is None or exponents.tuned_params_exponent is None:
        return None
    return exponents.tuned_params_exponent - exponents.params_exponent


def _quantities(tuning: Tuning) -> tuple[KeyQuantity, ...]:
    changes = [
        KeyQuantity(
            f"change of the exponent of N, {SHORT_APPROACH_NAMES[e.approach]}",
            change,
            _ends(e.change_interval),
            form="+.3f",
        )
        for e in tuning.exponents
        if (change := _change(e)) is not None
    ]
    worst = max(
        (c for c in tuning.cells if c.excess_nats is not None),
        key=lambda c: c.excess_nats or 0.0,
        default=None,
    )
    if worst is None:
        return tuple(changes)
    return (
        KeyQuantity("largest excess loss", worst.excess_nats, _ends(worst.excess_interval), "nats", ".4f"),
        *changes,
    )


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.lo, interval.hi)


def _with_ends(value: float | None, interval: Interval | None) -> Cell:
    return value if value is None or interval is None else (value, interval.lo, interval.hi)


def _exponents_table(tuning: Tuning) -> FindingTable:
    rows = [
        (
            SHORT_APPROACH_NAMES[e.approach],
            e.params_exponent,
            e.tuned_params_exponent,
            _with_ends(_change(e), e.change_interval),
            e.message if _change(e) is None else "",
        )
        for e in tuning.exponents
    ]
    return FindingTable(
        name="exponents",
        caption="The exponent of N as trained, and with each run's excess loss subtracted",
        columns=(
            Column("approach"), Column("as trained", ".3f"), Column("if every size were tuned", ".3f"),
            Column("change", "+.3f"), Column(""),
        ),
        rows=tuple(rows),
        note="The interval comes from the error of the excess loss alone; the exponents' own intervals are above.",
    )  # fmt: skip


def _cells_table(tuning: Tuning) -> FindingTable:
    """One row a tuned size and budget."""
    rows: list[tuple[Cell, ...]] = []
    for c in tuning.cells:
        best: list[Cell] = [_with_ends(v, i) for v, i in zip(c.best_over_used, c.best_over_used_intervals)]
        rows.append(
            (
                c.budget_flops,
                c.n_params,
                c.n_runs,
                *(best or [None] * len(tuning.varied)),
                _with_ends(c.excess_nats, c.excess_interval),
                c.message or "",
            )
        )
    noise = (
        f"The noise of one loss is {tuning.noise_source}."
        if tuning.noise_nats is None
        else f"The noise of one loss, {tuning.noise_nats:.2g} nats, is estimated from {tuning.noise_source}; intervals are at {tuning.level:.0%}."
    )
    return FindingTable(
        name="cells",
        caption="Excess loss from the sweep's learning rate at each tuned size",
        columns=(
            Column("FLOPs", "flops"), Column("N", "count"), Column("runs", "d"),
            *(Column(f"best {v} / the sweep's", ".2f") for v in tuning.varied),
            Column("excess loss", ".4f", "nats"), Column(""),
        ),
        rows=tuple(rows),
        warnings=tuple(i for i, c in enumerate(tuning.cells) if c.message is not None),
        note=f"{noise} Between these sizes and budgets the distance to the best setting and the curvature are interpolated.",
    )  # fmt: skip


def _chart(tuning: Tuning) -> Chart:
    """Loss above each cell's best against LR over the sweep's own: a mark for each run, a curve for each fitted parabola."""
    markers = {budget: i for i, budget in enumerate(sorted({c.budget_flops for c in tuning.cells}))}
    series: list[Series] = []
    for cell in tuning.cells:
        runs = np.exp(cell.log_settings[:, 0]), cell.loss_nats - _floor(cell)
        name = f"N = {format_count(cell.n_params)}, {format_flops(cell.budget_flops)} FLOPs"
        marker = markers[cell.budget_flops]
        series.append(
            Series("points", values(runs[0]), values(runs[1]), label=name, scale=cell.n_params, marker=marker)
        )
        if cell.fit is not None:
            x, rise = _parabola(cell)
            series.append(Series("line", values(np.exp(x)), values(rise), scale=cell.n_params))
    low, high = _reach(tuning.cells)
    most = max((c.excess_nats for c in tuning.cells if c.excess_nats is not None), default=None)
    return Chart(
        name="tuning",
        title="Loss against learning rate",
        caption="Each mark is a run: its learning rate over the one that the sweep uses for its size, and its loss above the "
        "best of that size and budget. A parabola through the nearby marks gives the best rate; where it crosses the line "
        "at 1, its height is the excess loss of the sweep's own rate. Excess losses that differ between sizes tilt the "
        "law. The shaded band is a factor of 2 on either side.",
        alt=f"Loss against learning rate for {len(tuning.cells)} sizes and budgets."
        + ("" if most is None else f" The largest excess loss is {most:.3f} nats."),
        panels=(
            Panel(
                Axis("learning rate / the sweep's own", log=True, form="g"),
                Axis("loss above the best (nats)", low=low, high=high),
                tuple(series),
            ),
        ),
        height_inches=4.0,
    )


def _parabola(cell: TunedCell) -> tuple[Array, Array]:
    """(ln LR over the sweep's own, rise above the minimum) of the cell's point estimate."""
    assert cell.fit is not None
    best = float(cell.fit.optimum[0, 0])
    grid = np.linspace(min(best, 0.0) - _DRAWN_BEYOND, max(best, 0.0) + _DRAWN_BEYOND, 80)
    offset = np.zeros((grid.size, cell.fit.optimum.shape[1]))
    offset[:, 0] = grid - best
    return grid, quadratic_rise(offset, cell.fit.hessian[0])


def _floor(cell: TunedCell) -> float:
    """The loss at the minimum of the cell's parabola, or the lowest loss where it has none."""
    return float(cell.loss_nats.min()) if cell.fit is None else cell.fit.floor_nats


def _reach(cells: Sequence[TunedCell]) -> tuple[float, float]:
    """Limits for what is within a factor of 4: a diverging run would flatten everything else."""
    seen = [
        loss - _floor(cell)
        for cell in cells
        for x, loss in zip(cell.log_settings[:, 0], cell.loss_nats)
        if abs(x) < np.log(4.1)
    ]
    top = max([0.05, *seen])
    return min([0.0, *seen]) - 0.05 * top, 1.1 * top


def _documented(tuning: Tuning, points: Observations) -> dict[str, Any]:
    """The field `tuning` of analysis.json."""
    return {
        "varied": list(tuning.varied),
        "message": tuning.message,
        "noise_nats": number(tuning.noise_nats),
        "noise_source": tuning.noise_source,
        "level": tuning.level,
        "cells": [
            {
                "n_params": c.n_params,
                "budget_flops": c.budget_flops,
                "n_runs": c.n_runs,
                "status": c.status,
                "message": c.message,
                "best_over_used": {
                    name: {"estimate": number(value), "interval": interval_json(interval)}
                    for name, value, interval in zip(
                        tuning.varied, c.best_over_used, c.best_over_used_intervals
                    )
                },
                "debt_nats": number(c.excess_nats),
                "debt_interval": interval_json(c.excess_interval),
                "debt_standard_error": number(c.excess_standard_error),
            }
            for c in tuning.cells
        ],
        "runs": [
            {"run_id": str(name), "debt_nats": number(excess), "standard_error": number(error)}
            for name, excess, error in zip(points.run_id, tuning.excess_nats, tuning.excess_standard_error)
        ],
        "exponents": [
            {
                "approach": e.approach,
                "status": e.status,
                "message": e.message,
                "params_exponent": number(e.params_exponent),
                "tokens_exponent": number(e.tokens_exponent),
                "tuned_params_exponent": number(e.tuned_params_exponent),
                "tuned_tokens_exponent": number(e.tuned_tokens_exponent),
                "change_interval": interval_json(e.change_interval),
            }
            for e in tuning.exponents
        ],
    }
