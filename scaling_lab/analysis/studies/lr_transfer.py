"""Owns learning-rate transfer: the best learning rate of each size under each parametrisation, with its error.

A parametrisation transfers where the best LR, as the recipe would give it at the base shape, is the same at every size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.studies.tuning_fit import at_the_edge, fit_bowl, window
from scaling_lab.analysis.studies.tuning_records import LR_SWEEP
from scaling_lab.core.parametrization import CLASSES
from scaling_lab.core.record import RunRecord, RunStatus

SAMPLES = 400


@dataclass(frozen=True)
class TransferCell:
    """One size under one parametrisation at one horizon: what it lost at each LR."""

    parametrization: str
    width: int
    depth: int
    train_tokens: int
    peak_lr: Array
    """(settings,) ascending; at the parametrisation's base shape."""
    loss_nats: Array
    """(settings,) mean over seeds."""
    best_lr: float | None
    """Of the parabola in ln LR through the least loss and its neighbours; None: `message` says why."""
    best_lr_log_error: float | None
    """Standard error of ln `best_lr`, from the spread of seeds over all cells; None where there is one seed."""
    floor_nats: float
    """Loss at the best LR, or the least loss seen."""
    message: str | None = None


def transfer_cells(records: Sequence[RunRecord]) -> list[TransferCell]:
    """The cells of the completed runs of role lr_sweep, by parametrisation, width and depth.

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
    """Standard deviation of the loss between seeds, nats, pooled over cells; of each cell's least loss and its neighbours
    alone, because runs at too large an LR scatter more. None without two seeds anywhere."""
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
    near = window(x, mean)
    best: float | None = None
    error: float | None = None
    floor, message = float(mean.min()), None
    if near.sum() < 3 or at_the_edge(x, mean):
        message = "the least loss is at the end of the learning rates tried"
    else:
        seeds = np.array([loss.size for loss in losses])[near]
        samples = np.random.default_rng(0).normal(size=(SAMPLES, int(near.sum())))
        samples *= (noise or 0.0) / np.sqrt(seeds)
        samples[0] = 0.0
        bowl = fit_bowl(x[near], mean[near] + samples)
        if isinstance(bowl, str):
            message = bowl
        else:
            best = float(rates[int(np.argmin(mean))] * np.exp(bowl.optimum[0, 0]))
            error = float(bowl.optimum[1:, 0].std()) if noise is not None else None
            floor = bowl.floor_nats
    return TransferCell(*key, rates, mean, best, error, floor, message)


def drift(cells: Sequence[TransferCell], by: str) -> float | None:
    """The factor by which the best LR of one parametrisation changes from the least to the largest width (or depth, `by`),
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
