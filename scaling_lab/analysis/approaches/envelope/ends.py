"""The envelope of final losses (`method=ends`): for each size, the loss at the end of its runs as a function of compute.

Before its learning rate has decayed, a run's loss is higher than the best loss at its compute. An envelope of whole curves
therefore alternates between sizes that happen to end nearby, and its exponent is biased even without noise (by .04 with
four horizons per size and sizes 1.4 apart). If every size was trained to several horizons, a monotone cubic through its
final losses (ln L over ln C) is its curve of matched runs. The curves of two sizes cross once. Sizes up to three times
apart are paired, because between closer sizes the difference in loss is smaller than the seed noise. For
L = E + A N^-alpha + B D^-beta the crossings of equally spaced pairs lie exactly on a power law with the true exponent.

Intervals come from a parametric bootstrap: studies with the same runs are simulated from the Chinchilla law fitted to the
final losses, with noise of the residuals' scale. The errors of the estimates in these studies, relative to the frontier of
that law, give the interval, which corrects for the bias of the estimator (Efron & Tibshirani 1993, An Introduction to the
Bootstrap, sections 10.2 and 13.4). scripts/calibrate.py measures the coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.parametric import Parametric, residual_losses
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, FitStatus, Frontier, LossCurve, PowerLaw
from scaling_lab.analysis.frontiers import fit_lines, fit_loss_curves
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval

# Runs of one size this close in ln C count as one horizon (with several seeds); their mean ln L is used.
_SAME_HORIZON = 0.02
# A size is used if it has this many horizons; `method=auto` requires this many such sizes.
_MIN_HORIZONS = 3
_MIN_SIZES = 5
# A line always fits two crossings exactly, so they show neither an exponent nor its error.
MIN_CROSSINGS = 3
# Sizes up to this ratio are paired, if their horizons overlap by a factor of two in C.
_LARGEST_RATIO = 3.0
_OVERLAP_LOG_C = float(np.log(2.0))
# Pairs closer than this, relative to the widest pair, are dropped: at the largest sizes only close partners are left,
# whose crossings are noisy.
_MIN_SEPARATION = 0.75
# Number of budgets at which the loss along the frontier is evaluated.
_LOSS_BUDGETS = 24
# Residual degrees of freedom needed to estimate the noise scale.
_MIN_DEGREES_OF_FREEDOM = 5


@dataclass(frozen=True)
class SizeRuns:
    """The runs of one size, grouped by horizon."""

    log_n: float
    log_per_token: float
    log_c: Array
    """(horizons,) ascending."""
    horizon: NDArray[np.int64]
    """(runs of the size,) index into `log_c`."""
    at: NDArray[np.int64]
    """(runs of the size,) index into the losses."""

    def curve(self, log_loss: Array, log_c: Array) -> Array:
        """(samples, points) ln L of the size at `log_c` for log losses (samples, runs); NaN outside its horizons."""
        counts = np.bincount(self.horizon)
        means = np.zeros((len(log_loss), counts.size))
        np.add.at(means.T, self.horizon, log_loss[:, self.at].T)
        outside = (log_c < self.log_c[0] - 1e-9) | (log_c > self.log_c[-1] + 1e-9)
        curve = scipy.interpolate.PchipInterpolator(self.log_c, means / counts, axis=1)
        values = curve(np.clip(log_c, self.log_c[0], self.log_c[-1]))
        return np.where(outside, np.nan, values)


@dataclass(frozen=True)
class EndsGrid:
    """The sizes and their pairs, the same for all samples."""

    sizes: tuple[SizeRuns, ...]
    pairs: tuple[tuple[int, int], ...]
    log_c_step: float
    """Spacing of the ln C values at which two curves are compared."""


@dataclass(frozen=True)
class EndsPoints:
    """Crossings (samples, pairs), and the best loss over sizes (samples, budgets), for a batch of losses."""

    log_c: Array
    log_n: Array
    log_d: Array
    weight: Array
    """1 if the pair crosses inside its horizons, else 0."""
    best_log_c: Array
    """(budgets,)"""
    best_loss: Array
    """NaN if fewer than three sizes have a loss."""


def ends_grid(final: Observations, grid_points: int, min_horizons: int = _MIN_HORIZONS) -> EndsGrid:
    """The grid of these runs (one point per run), without sizes that have fewer than `min_horizons` horizons."""
    log_n, log_c, log_d = (np.log(x) for x in (final.n_params, final.compute_flops, final.n_tokens))
    sizes = []
    rounded = np.round(log_n, 9)
    for value in np.unique(rounded):
        at = np.flatnonzero(rounded == value)
        at = at[np.argsort(log_c[at], kind="stable")]
        horizon = np.cumsum(np.diff(log_c[at], prepend=log_c[at[0]]) > _SAME_HORIZON, dtype=np.int64)
        if horizon[-1] + 1 >= min_horizons:
            centers = np.bincount(horizon, log_c[at]) / np.bincount(horizon)
            sizes.append(SizeRuns(value, float((log_c - log_d)[at].mean()), centers, horizon, at))
    pairs = [(i, j) for i in range(len(sizes)) if (j := _partner(sizes, i)) is not None]
    widest = max((sizes[j].log_n - sizes[i].log_n for i, j in pairs), default=0.0)
    pairs = [(i, j) for i, j in pairs if sizes[j].log_n - sizes[i].log_n >= _MIN_SEPARATION * widest]
    step = float(np.ptp(log_c)) / grid_points
    return EndsGrid(tuple(sizes), tuple(pairs), step)


def _partner(sizes: list[SizeRuns], i: int) -> int | None:
    """The farthest larger size within the ratio whose horizons overlap enough, or else the next size."""
    found = i + 1 if i + 1 < len(sizes) else None
    for j in range(i + 2, len(sizes)):
        overlap = min(sizes[i].log_c[-1], sizes[j].log_c[-1]) - max(sizes[i].log_c[0], sizes[j].log_c[0])
        if sizes[j].log_n - sizes[i].log_n <= np.log(_LARGEST_RATIO) and overlap >= _OVERLAP_LOG_C:
            found = j
    return found


def has_enough_sizes(grid: EndsGrid) -> bool:
    """Whether there are enough sizes for `method=auto` to choose `ends`."""
    return len(grid.sizes) >= _MIN_SIZES


def ends_points(grid: EndsGrid, log_loss: Array) -> EndsPoints:
    """Crossings and best losses for log losses (samples, runs)."""
    samples = len(log_loss)
    shape = (samples, len(grid.pairs))
    log_c, log_n, weight = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    per_token = np.zeros(shape[1])
    for k, (i, j) in enumerate(grid.pairs):
        low, high = grid.sizes[i], grid.sizes[j]
        begin, end = max(low.log_c[0], high.log_c[0]), min(low.log_c[-1], high.log_c[-1])
        per_token[k] = 0.5 * (low.log_per_token + high.log_per_token)
        log_n[:, k] = 0.5 * (low.log_n + high.log_n)
        if end <= begin:
            continue
        x = np.linspace(begin, end, max(2, int(np.ceil((end - begin) / grid.log_c_step)) + 1))
        log_c[:, k], weight[:, k] = _crossings(x, low.curve(log_loss, x) - high.curve(log_loss, x))
    best_log_c = _best_loss_budgets(grid)
    floors = np.stack([_best_losses(grid, log_loss, c) for c in best_log_c], axis=1)
    return EndsPoints(log_c, log_n, np.where(weight > 0, log_c - per_token, 0.0), weight, best_log_c, floors)


def _crossings(x: Array, difference: Array) -> tuple[Array, Array]:
    """(samples,) ln C where the smaller size's loss rises above the larger's, and 1 if that is inside the range.

    Noise can make two curves cross three times. The crossing is placed where the sorted signs change (the monotone
    rearrangement), and refined by linear interpolation if the signs change there.
    """
    below = (difference <= 0).sum(axis=1)
    inside = (below > 0) & (below < x.size)
    j = np.clip(below - 1, 0, x.size - 2)
    rows = np.arange(len(j))
    left, right = difference[rows, j], difference[rows, j + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where((left <= 0) & (right > 0), -left / (right - left), 0.5)
    return np.where(inside, x[j] + share * (x[j + 1] - x[j]), 0.0), inside.astype(np.float64)


def _best_loss_budgets(grid: EndsGrid) -> Array:
    """ln C over the range in which at least three sizes have a loss."""
    begins, ends = np.sort([s.log_c[0] for s in grid.sizes]), np.sort([s.log_c[-1] for s in grid.sizes])
    return np.linspace(begins[2], ends[-3], _LOSS_BUDGETS) if len(grid.sizes) >= 3 else np.zeros(1)


def _best_losses(grid: EndsGrid, log_loss: Array, log_c: float) -> Array:
    """(samples,) the minimum over ln N of a parabola through the losses of the sizes at this C."""
    there = [s for s in grid.sizes if s.log_c[0] - 1e-9 <= log_c <= s.log_c[-1] + 1e-9]
    if len(there) < 3:
        return np.full(len(log_loss), np.nan)
    x = np.array([s.log_n for s in there])
    y = np.concatenate([s.curve(log_loss, np.array([log_c])) for s in there], axis=1)
    # Far from its minimum a valley is asymmetric, so use only sizes near the minimum.
    middle = x[int(np.argmin(y.mean(axis=0)))]
    near = np.abs(x - middle) <= np.log(_LARGEST_RATIO)
    if near.sum() < 3:
        near = np.argsort(np.abs(x - middle), kind="stable")[:3]
    x, y = x[near] - middle, y[:, near]
    c, b, a = np.polynomial.polynomial.polyfit(x, y.T, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        vertex = -b / (2 * a)
        lowest = c - b**2 / (4 * a)
    inside = (a > 0) & (vertex >= x.min()) & (vertex <= x.max())
    return np.exp(np.where(inside, lowest, y.min(axis=1)))


def ends_frontier(points: EndsPoints) -> Frontier:
    """The frontier of the first sample."""
    used = points.weight[0] > 0
    order = np.flatnonzero(used)[np.argsort(points.log_c[0][used], kind="stable")]
    a, log_k = (float(v[0]) for v in fit_lines(points.log_c, points.log_n, points.weight))
    b, log_k_d = (float(v[0]) for v in fit_lines(points.log_c, points.log_d, points.weight))
    floor, log_scale, gamma = (float(v[0]) for v in _loss_curves(points, points.best_loss, True))
    c = points.log_c[0][order]
    seen = np.isfinite(points.best_loss[0])
    loss = (
        np.interp(c, points.best_log_c[seen], points.best_loss[0][seen], left=np.nan, right=np.nan)
        if seen.any()
        else np.full(c.size, np.nan)
    )
    return Frontier(
        PowerLaw.of_log(a, log_k),
        PowerLaw.of_log(b, log_k_d),
        (float(np.exp(c.min())), float(np.exp(c.max()))),
        np.exp(c),
        np.exp(points.log_n[0][order]),
        np.exp(points.log_d[0][order]),
        loss,
        LossCurve(floor, float(np.exp(log_scale)), gamma) if np.isfinite(log_scale) else None,
    )


def _loss_curves(points: EndsPoints, loss: Array, floor_at_zero: bool) -> tuple[Array, Array, Array]:
    weight = np.isfinite(loss).astype(np.float64)
    return fit_loss_curves(points.best_log_c, np.where(weight > 0, loss, 1.0), weight, floor_at_zero)


def ends_quantities(points: EndsPoints) -> dict[str, Array]:
    """(samples,) each: the frontier's quantities (see `frontiers.quantities`); NaN with fewer than two crossings."""
    a, log_k = fit_lines(points.log_c, points.log_n, points.weight)
    b, log_k_d = fit_lines(points.log_c, points.log_d, points.weight)
    floor, log_scale, gamma = _loss_curves(points, points.best_loss, False)
    return {
        "params_exponent": a,
        "params_log_coefficient": log_k,
        "tokens_exponent": b,
        "tokens_log_coefficient": log_k_d,
        "loss_floor_nats": floor,
        "loss_log_coefficient": log_scale,
        "loss_exponent": gamma,
    }


def simulated_quantities(final: Observations, grid: EndsGrid, draws: Draws) -> dict[str, Array]:
    """(resamples,) each: the estimate minus its error in each study simulated from the fitted law.

    Raises:
        NoInterval: the law does not fit, or leaves too few residuals to estimate the noise.
    """
    approach = Parametric()
    fitted = approach.estimate(final)
    parameters = len(approach.law.parameters)
    if final.n_points < parameters + _MIN_DEGREES_OF_FREEDOM:
        raise NoInterval(
            f"{final.n_points} runs leave too few residuals from a law of {parameters} parameters to estimate the noise."
        )
    if fitted.frontier is None or fitted.frontier.loss is None or fitted.status is FitStatus.MAX_STEPS:
        raise NoInterval(
            f"the intervals need studies simulated from the Chinchilla law, which does not fit: {fitted.message}"
        )
    losses = residual_losses(final, fitted.fits[0], draws, None)
    here = ends_points(grid, np.log(final.loss_nats)[None])
    there = ends_points(grid, np.log(losses))
    estimate, simulated = ends_quantities(here), ends_quantities(there)
    truth, true_loss = fitted.frontier, fitted.frontier.loss
    out = {}
    for name, law in (("params", truth.params), ("tokens", truth.tokens)):
        for part, true in (("exponent", law.exponent), ("log_coefficient", law.log_k)):
            key = f"{name}_{part}"
            out[key] = estimate[key] + true - simulated[key]
    loss = here.best_loss + true_loss(np.exp(here.best_log_c)) - there.best_loss
    floor, log_scale, gamma = _loss_curves(here, loss, False)
    return out | {"loss_floor_nats": floor, "loss_log_coefficient": log_scale, "loss_exponent": gamma}


def resampled_quantities(final: Observations, drawn: NDArray[np.bool_], grid_points: int) -> dict[str, Array]:
    """(resamples,) each: the quantities of resampled runs; `drawn`: (resamples, runs) which runs are in each."""
    out: dict[str, list[float]] = {}
    for present in drawn:
        some = final.points(present[final.run_index])
        points = ends_points(ends_grid(some, grid_points, min_horizons=2), np.log(some.loss_nats)[None])
        for name, value in ends_quantities(points).items():
            out.setdefault(name, []).append(float(value[0]))
    return {name: np.array(values) for name, values in out.items()}


def envelope_of_ends(grid: EndsGrid, log_loss: Array, grid_points: int) -> dict[str, NDArray[np.float64]]:
    """The lower envelope of the sizes' curves, for figures: compute_flops, loss_nats, params."""
    log_c = np.linspace(
        min(s.log_c[0] for s in grid.sizes), max(s.log_c[-1] for s in grid.sizes), grid_points
    )
    curves = np.full((len(grid.sizes), grid_points), np.inf)
    for i, s in enumerate(grid.sizes):
        inside = (log_c >= s.log_c[0]) & (log_c <= s.log_c[-1])
        curves[i, inside] = s.curve(log_loss, log_c[inside])[0]
    best = np.argmin(curves, axis=0)
    seen = np.isfinite(curves.min(axis=0))
    return {
        "compute_flops": np.exp(log_c[seen]),
        "loss_nats": np.exp(curves.min(axis=0)[seen]),
        "params": np.exp(np.array([s.log_n for s in grid.sizes])[best[seen]]),
    }
