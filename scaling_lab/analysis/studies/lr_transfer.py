"""Study: the best learning rate of each size under each parametrization, with its error, and whether it transfers.

A parametrization transfers where the best LR, as the recipe would give it at the base shape, is the same at every size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.data.sweep_records import LR_SWEEP
from scaling_lab.analysis.estimate import Array
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
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.analysis.studies.shared.lr_quadratic import best_at_edge, fit_quadratic, near_best
from scaling_lab.core.parametrization import CLASSES
from scaling_lab.core.record import RunRecord, RunStatus

QUESTION = "Does the best learning rate of a small model carry over to larger ones?"
NEEDS = "a sweep of design=learning_rate on its own, with two learning rates or more at some size"

SAMPLES = 400
# Runs this far above a size's best are outside the figure: a diverging one would flatten all others.
_SHOWN_NATS = 0.6


@dataclass(frozen=True)
class TransferCell:
    """One size under one parametrization at one horizon: its loss at each LR."""

    parametrization: str
    width: int
    depth: int
    train_tokens: int
    peak_lr: Array
    """(settings,) ascending; at the parametrization's base shape."""
    loss_nats: Array
    """(settings,) mean over seeds."""
    best_lr: float | None
    """Minimum of the parabola in ln LR through the lowest loss and its neighbors; None: `message` says why."""
    best_lr_log_error: float | None
    """Standard error of ln `best_lr`, from the spread of seeds over all cells; None where there is one seed."""
    floor_nats: float
    """Loss at the best LR, or the lowest loss."""
    message: str | None = None


def find(given: StudyInput) -> Finding | None:
    if given.records.law:
        return None  # these learning rates tune a sweep: see the study `tuning`
    cells = transfer_cells(given.records.lr_sweep)
    return as_finding(cells) if any(cell.peak_lr.size > 1 for cell in cells) else None


def as_finding(cells: Sequence[TransferCell]) -> Finding:
    """The best rates of all cells, how they change with width and depth, and the figure."""
    known = any(cell.best_lr is not None for cell in cells)
    missing = sum(cell.best_lr is None for cell in cells)
    return Finding(
        name="lr_transfer",
        title="Transfer of the best learning rate",
        question=QUESTION,
        answer=_answer(cells),
        status=FindingStatus.ANSWERED if known else FindingStatus.NOT_ANSWERED,
        reason=None
        if known
        else "every size has its lowest loss at the end of the learning rates tried, or too few of them.",
        quantities=_quantities(cells),
        tables=(_table(cells),),
        chart=_chart(cells),
        caveats=(f"Sizes without a best rate among those tried: {missing} of {len(cells)}.",)
        if missing and known
        else (),
    )


def transfer_cells(records: Sequence[RunRecord]) -> list[TransferCell]:
    """The cells of the completed runs of role lr_sweep, by parametrization, width and depth.

    Runs of other batches than a size's most frequent one are left out: the best LR depends on the batch.
    """
    runs: dict[tuple[str, int, int, int], list[RunRecord]] = defaultdict(list)
    for r in records:
        if r.spec.role == LR_SWEEP and r.status is RunStatus.COMPLETED and r.final_val_loss_nats is not None:
            shape = r.spec.shape
            runs[r.spec.parametrization.kind, shape.width, shape.depth, r.spec.train_tokens].append(r)
    data = {key: _settings(_of_one_batch(cell)) for key, cell in runs.items()}
    noise = _seed_noise([losses for _, losses in data.values()])
    order = list(CLASSES)
    keys = sorted(data, key=lambda key: (order.index(key[0]), *key[1:]))
    return [_cell(key, *data[key], noise) for key in keys]


def _of_one_batch(runs: Sequence[RunRecord]) -> list[RunRecord]:
    batches = [r.spec.batch_tokens for r in runs]
    common = max(sorted(set(batches)), key=batches.count)
    return [r for r in runs if r.spec.batch_tokens == common]


def _settings(runs: Sequence[RunRecord]) -> tuple[Array, list[Array]]:
    """(LRs ascending, the losses of each LR's seeds)."""
    by_lr: dict[float, list[float]] = defaultdict(list)
    for r in runs:
        by_lr[r.spec.optimizer.peak_lr].append(float(r.final_val_loss_nats or np.nan))
    rates = sorted(by_lr)
    return np.array(rates), [np.array(by_lr[rate]) for rate in rates]


def _seed_noise(cells: Sequence[Sequence[Array]]) -> float | None:
    """Standard deviation of the loss between seeds, nats, pooled over cells; from each cell's lowest loss and its
    neighbors alone, because runs at too large an LR scatter more. None without two seeds anywhere."""
    squares, degrees = 0.0, 0
    for losses in cells:
        best = int(np.argmin([loss.mean() for loss in losses]))
        for loss in losses[max(0, best - 1) : best + 2]:
            squares += float(((loss - loss.mean()) ** 2).sum())
            degrees += loss.size - 1
    return float(np.sqrt(squares / degrees)) if degrees else None


def _cell(
    key: tuple[str, int, int, int], rates: Array, losses: Sequence[Array], noise: float | None
) -> TransferCell:
    mean = np.array([loss.mean() for loss in losses])
    x = np.log(rates / rates[int(np.argmin(mean))])[:, None]
    near = near_best(x, mean)
    best: float | None = None
    error: float | None = None
    floor, message = float(mean.min()), None
    if near.sum() < 3 or best_at_edge(x, mean):
        message = "the lowest loss is at the end of the learning rates tried"
    else:
        seeds = np.array([loss.size for loss in losses])[near]
        samples = np.random.default_rng(0).normal(size=(SAMPLES, int(near.sum())))
        samples *= (noise or 0.0) / np.sqrt(seeds)
        samples[0] = 0.0
        fit = fit_quadratic(x[near], mean[near] + samples)
        if isinstance(fit, str):
            message = fit
        else:
            best = float(rates[int(np.argmin(mean))] * np.exp(fit.optimum[0, 0]))
            error = float(fit.optimum[1:, 0].std()) if noise is not None else None
            floor = fit.floor_nats
    return TransferCell(*key, rates, mean, best, error, floor, message)


def drift(cells: Sequence[TransferCell], by: str) -> float | None:
    """The factor by which the best LR of one parametrization changes from the smallest to the largest width (or depth, `by`),
    geometric mean over the other of the two; None where no pair of cells has both."""
    other = "depth" if by == "width" else "width"
    lines: dict[int, list[TransferCell]] = defaultdict(list)
    for cell in cells:
        if cell.best_lr is not None:
            lines[getattr(cell, other)].append(cell)
    factors = []
    for line in lines.values():
        line.sort(key=lambda cell: int(getattr(cell, by)))
        if len(line) > 1:
            factors.append(np.log((line[-1].best_lr or 1.0) / (line[0].best_lr or 1.0)))
    return float(np.exp(np.mean(factors))) if factors else None


# -- as a finding


def _drifts(cells: Sequence[TransferCell]) -> list[tuple[str, str, float]]:
    """(parametrization, width or depth, factor) of every drift that is known."""
    found = []
    for kind in dict.fromkeys(cell.parametrization for cell in cells):
        own = [cell for cell in cells if cell.parametrization == kind]
        found += [(kind, by, f) for by in ("width", "depth") if (f := drift(own, by)) is not None]
    return found


def _answer(cells: Sequence[TransferCell]) -> str:
    by_size: dict[str, list[str]] = defaultdict(list)
    for kind, by, factor in _drifts(cells):
        by_size[by].append(f"{factor:.2f} ({kind})")
    if by_size:
        changes = [
            f"{', '.join(factors)} from the smallest to the largest {by}" for by, factors in by_size.items()
        ]
        return f"The best learning rate changes by a factor of {'; of '.join(changes)}."
    known = [cell.best_lr for cell in cells if cell.best_lr is not None]
    if not known:
        return "No size has a best learning rate within those tried."
    return f"The best rate lies between {min(known):.2g} and {max(known):.2g}; no two sizes differ in width or depth alone."


def _quantities(cells: Sequence[TransferCell]) -> tuple[KeyQuantity, ...]:
    return tuple(
        KeyQuantity(f"{kind}: best LR at the largest over that at the smallest {by}", factor, form="sig3")
        for kind, by, factor in _drifts(cells)
    )


def _table(cells: Sequence[TransferCell]) -> FindingTable:
    rows: list[tuple[Cell, ...]] = [
        (
            c.parametrization,
            c.width,
            c.depth,
            c.train_tokens,
            c.best_lr,
            c.best_lr_log_error,
            c.floor_nats,
            c.message or "",
        )
        for c in cells
    ]
    return FindingTable(
        name="best_rates",
        caption="The best learning rate of every size",
        columns=(
            Column("parametrization"), Column("width", "d"), Column("depth", "d"), Column("D", "count"),
            Column("best LR", "sig3"), Column("standard error of ln LR", "sig2"), Column("loss there", ".4f", "nats"),
            Column(""),
        ),
        rows=tuple(rows),
        warnings=tuple(i for i, c in enumerate(cells) if c.best_lr is None),
        in_terminal=len(cells) <= 20,
    )  # fmt: skip


def _chart(cells: Sequence[TransferCell]) -> Chart:
    """For each parametrization loss against LR, and below it the best LR against the width.

    Colors are widths, marks and line styles depths; the bar through a best LR is two standard errors on either side.
    """
    kinds = list(dict.fromkeys(c.parametrization for c in cells))
    depths = sorted({c.depth for c in cells})
    rates = np.concatenate([c.peak_lr for c in cells])
    lr = Axis("learning rate (base)", log=True, form="sig2", low=float(rates.min()), high=float(rates.max()))
    widths = [c.width for c in cells]
    width = Axis("width", log=True, form="g", low=min(widths) / 1.1, high=max(widths) * 1.1)
    shown = np.concatenate([c.loss_nats[c.loss_nats < c.floor_nats + _SHOWN_NATS] for c in cells])
    margin = 0.05 * max(float(np.ptp(shown)), 1e-3)
    loss = Axis("validation loss (nats)", low=float(shown.min()) - margin, high=float(shown.max()) + margin)
    ends = [end for c in cells if c.best_lr is not None for end in (c.best_lr, *_span(c)) if end is not None]
    best = Axis(
        "best learning rate", log=True, form="sig2", low=min(ends, default=None), high=max(ends, default=None)
    )
    own = {kind: [c for c in cells if c.parametrization == kind] for kind in kinds}
    above = [Panel(lr, loss, _loss_series(own[kind], depths), title=kind) for kind in kinds]
    below = [Panel(width, best, _best_series(own[kind], depths)) for kind in kinds]
    return Chart(
        name="lr_transfer",
        title="Loss against learning rate, and the best rate against width",
        caption="Above: the final loss of every size at each learning rate; the large mark is the best one, the minimum of "
        "the parabola through the lowest loss and its neighbors, with two standard errors from the spread of seeds. Below: "
        "the best one against the width. Rates are those of the base shape: a parametrization transfers where the best one "
        "stays the same.",
        alt=f"Loss against learning rate, and the best against the width, of {len(cells)} sizes and parametrizations. "
        f"{_answer(cells)}",
        panels=(*above, *below),
        columns=len(kinds),
        height_inches=5.4,
    )


def _loss_series(cells: Sequence[TransferCell], depths: Sequence[int]) -> tuple[Series, ...]:
    """A line for each size, and its best LR as a mark."""
    series: list[Series] = []
    for c in cells:
        look = {"scale": float(c.width), "marker": depths.index(c.depth)}
        series.append(Series("marked_line", values(c.peak_lr), values(c.loss_nats), **look))  # type: ignore[arg-type]
        if c.best_lr is not None:
            low, high = _span(c)
            series.append(
                Series("points", (c.best_lr,), (c.floor_nats,), (low,), (high,), error_axis="x", **look)  # type: ignore[arg-type]
            )
    return tuple(series)


def _best_series(cells: Sequence[TransferCell], depths: Sequence[int]) -> tuple[Series, ...]:
    """The best LR of each size, and a line for each depth."""
    series: list[Series] = []
    for i, depth in enumerate(depths):
        known = [c for c in cells if c.depth == depth and c.best_lr is not None]
        for c in known:
            low, high = _span(c)
            # Depths side by side, so that their bars do not hide each other.
            beside = c.width * 1.04 ** (i - (len(depths) - 1) / 2)
            series.append(
                Series("points", (beside,), (c.best_lr,), (low,), (high,), scale=float(c.width), marker=i)
            )
        series.append(
            Series(
                "line", values([c.width for c in known]), values([c.best_lr for c in known]), label=f"depth {depth}",
                color="ink", marker=i,
            )
        )  # fmt: skip
    return tuple(series)


def _span(cell: TransferCell) -> tuple[float | None, float | None]:
    """Two standard errors below and above the best LR; None without an error."""
    if cell.best_lr is None or cell.best_lr_log_error is None:
        return None, None
    factor = float(np.exp(2 * cell.best_lr_log_error))
    return cell.best_lr / factor, cell.best_lr * factor
