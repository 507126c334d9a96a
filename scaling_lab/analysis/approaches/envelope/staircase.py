"""The lower envelope of interpolated training curves, and the crossings between neighboring best sizes.

Every run is interpolated on a common log-spaced grid of FLOPs. At each grid point the run with the lowest loss determines
the best size, so the best size as a function of C is a staircase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Curves
from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.frontiers import FrontierPoints

# Curves with up to this many points are interpolated by a monotone cubic; denser curves linearly.
_SPARSE_CURVE = 200


@dataclass(frozen=True)
class CurveGrid:
    """The curve of every run on the common grid."""

    log_c: Array
    """(grid,)"""
    log_loss: Array
    """(runs, grid), infinite where a run has no data."""
    log_per_token: Array
    """(runs,) ln of FLOPs per token."""
    log_size: Array
    """(sizes,) ascending ln N."""
    size: NDArray[np.int64]
    """(runs,) index into the sizes."""
    log_c_end: Array
    """(runs,) ln C at the end of each run."""
    run: NDArray[np.int64]
    """(runs,) index into the observations' runs."""


@dataclass(frozen=True)
class Staircase:
    """The envelope of a set of runs on the grid."""

    best: NDArray[np.int64]
    """(grid,) the run with the lowest loss, as an index into the runs of `CurveGrid`; -1 where no run has data."""
    log_loss: Array
    size: NDArray[np.int64]
    """(grid,) the size of that run; -1 where there is none."""


def interpolate(curves: Curves, grid_points: int) -> CurveGrid:
    """Interpolate ln L over ln C on a common log-spaced grid, for every run with at least two points."""
    log_c, log_loss = np.log(curves.compute_flops), np.log(curves.loss_nats)
    order = np.lexsort((log_c, curves.run_index))
    run = curves.run_index[order]
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    ends = np.append(starts[1:], run.size)
    x, y = log_c[order], log_loss[order]
    log_n, log_d = np.log(curves.n_params[order]), np.log(curves.n_tokens[order])
    kept = [(a, b) for a, b in zip(starts, ends) if b - a >= 2 and x[b - 1] > x[a]]
    lo, hi = min(x[a] for a, _ in kept), max(x[b - 1] for _, b in kept)
    grid = np.linspace(lo, hi, grid_points)
    on_grid = np.full((len(kept), grid_points), np.inf)
    for i, (a, b) in enumerate(kept):
        on_grid[i] = _interpolate_run(x[a:b], y[a:b], grid)
    first = np.array([a for a, _ in kept])
    last = np.array([b - 1 for _, b in kept])
    # Sizes are equal if N agrees to nine digits, because rounding may differ in the last place.
    log_size, size = np.unique(np.round(log_n[first], 9), return_inverse=True)
    return CurveGrid(grid, on_grid, x[last] - log_d[last], log_size, size, x[last], run[first])


def _interpolate_run(x: Array, y: Array, grid: Array) -> Array:
    distinct = np.append(np.diff(x) > 1e-12, True)  # of points at one C keep the last
    x, y = x[distinct], y[distinct]
    out = np.full(grid.size, np.inf)
    inside = slice(
        int(np.searchsorted(grid, x[0] - 1e-12)), int(np.searchsorted(grid, x[-1] + 1e-12, side="right"))
    )
    if 3 <= x.size <= _SPARSE_CURVE:
        out[inside] = scipy.interpolate.PchipInterpolator(x, y)(np.clip(grid[inside], x[0], x[-1]))
    else:
        out[inside] = np.interp(grid[inside], x, y)
    return out


def staircase(grid: CurveGrid, runs: NDArray[np.int64]) -> Staircase:
    """The lower envelope of `runs` (indices into the runs of the grid)."""
    losses = grid.log_loss[runs]
    at = np.argmin(losses, axis=0)
    lowest = losses[at, np.arange(at.size)]
    seen = np.isfinite(lowest)
    best = np.where(seen, runs[at], -1)
    return Staircase(best, lowest, np.where(seen, grid.size[best], -1))


def crossings(
    grid: CurveGrid, stairs: Staircase, runs: NDArray[np.int64] | None = None
) -> tuple[FrontierPoints, int]:
    """Where the envelope passes from one best size to the next, and how many changes were left out.

    Changes are left out if the end of a curve forced them. Noise makes the best size alternate near a crossing, so the
    staircase is sorted first (its monotone rearrangement): each pair of neighboring best sizes then has one crossing.
    """
    seen = np.flatnonzero(stairs.best >= 0)
    ordered = np.sort(stairs.size[seen])
    step = np.flatnonzero(np.diff(ordered))
    low, high = ordered[step], ordered[step + 1]
    left, right = seen[step], seen[step + 1]
    member = np.arange(grid.run.size) if runs is None else runs
    genuine = np.zeros(step.size, dtype=bool)
    log_c, log_loss = np.full(step.size, np.nan), np.full(step.size, np.nan)
    for i in range(step.size):
        lo_runs, hi_runs = member[grid.size[member] == low[i]], member[grid.size[member] == high[i]]
        window = slice(max(left[i] - 1, 0), right[i] + 2)
        lower, upper = grid.log_loss[lo_runs, window].min(axis=0), grid.log_loss[hi_runs, window].min(axis=0)
        genuine[i] = bool(np.isfinite(lower).all() and np.isfinite(upper).all())
        if genuine[i]:
            log_c[i] = _refined(
                grid.log_c[window], lower - upper, 0.5 * (grid.log_c[left[i]] + grid.log_c[right[i]])
            )
            log_loss[i] = 0.5 * (stairs.log_loss[left[i]] + stairs.log_loss[right[i]])
    log_n = 0.5 * (grid.log_size[low] + grid.log_size[high])
    per_token = _per_token(grid)
    log_d = log_c - 0.5 * (per_token[low] + per_token[high])
    g = genuine
    points = FrontierPoints(log_c[g], log_n[g], log_d[g], np.exp(log_loss[g]), np.ones(int(g.sum())))
    return points, int((~g).sum())


def _refined(x: Array, difference: Array, default: float) -> float:
    """ln C where the loss of the smaller size rises above that of the larger, interpolated between grid points."""
    change = np.flatnonzero((difference[:-1] <= 0) & (difference[1:] > 0))
    if change.size != 1:
        return default
    j = int(change[0])
    return float(x[j] - difference[j] * (x[j + 1] - x[j]) / (difference[j + 1] - difference[j]))


def _per_token(grid: CurveGrid) -> Array:
    """(sizes,) ln FLOPs per token, the mean over a size's runs."""
    return np.bincount(grid.size, grid.log_per_token) / np.bincount(grid.size)


def all_points(grid: CurveGrid, stairs: Staircase) -> FrontierPoints:
    at = np.flatnonzero(stairs.best >= 0)
    best = stairs.best[at]
    log_n = grid.log_size[grid.size[best]]
    log_d = grid.log_c[at] - grid.log_per_token[best]
    return FrontierPoints(grid.log_c[at], log_n, log_d, np.exp(stairs.log_loss[at]), np.ones(at.size))


def resampled_envelopes(
    curves: Curves, drawn: NDArray[np.bool_], grid_points: int, keep_edges: bool
) -> list[FrontierPoints]:
    """The frontier points of each resample of runs; `drawn`: (resamples, runs) which runs are in it."""
    grid = interpolate(curves, grid_points)
    out = []
    for present in drawn[:, grid.run]:
        runs = np.flatnonzero(present)
        stairs = staircase(grid, runs)
        out.append(all_points(grid, stairs) if keep_edges else crossings(grid, stairs, runs)[0])
    return out


def figure_arrays(grid: CurveGrid, stairs: Staircase) -> dict[str, NDArray[Any]]:
    seen = stairs.best >= 0
    best = stairs.best[seen]
    return {
        "compute_flops": np.exp(grid.log_c[seen]),
        "loss_nats": np.exp(stairs.log_loss[seen]),
        "params": np.exp(grid.log_size[grid.size[best]]),
        "run_index": grid.run[best],
    }
