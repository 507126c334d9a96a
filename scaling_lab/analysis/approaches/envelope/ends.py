"""Owns the envelope of the runs' ends: of every size the loss that its runs *end* at, as a function of compute.

Under a schedule that comes down only at its end, a curve lies above what its compute can buy until then, so an envelope
of whole curves flickers between the sizes that happen to end nearby, and its exponent is off even without noise (by .04
with four horizons a size and sizes 1.4 apart). Where every size was trained to several horizons, a monotone cubic
through the ends of a size (ln L over ln C) is its curve of matched runs. Two sizes' curves cross once; sizes up to three
times apart are paired, because a difference of losses between neighbours drowns in seed noise. For
L = E + A N^-alpha + B D^-beta the crossings of equally spaced pairs lie exactly on a power law with the true exponent.

Intervals are a parametric bootstrap: studies of the same design are simulated from the Chinchilla law fitted to the ends,
with the noise of its residuals; how far the estimates of these studies lie from that law's own frontier is how far the
real one may lie from the truth. That takes the estimator's bias out of the interval (Efron & Tibshirani 1993, An
Introduction to the Bootstrap, sections 10.2 and 13.4). scripts/calibrate.py measures the coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from scaling_lab.analysis.approaches.parametric import Parametric, residual_losses
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, FitStatus, Frontier, LossCurve, PowerLaw
from scaling_lab.analysis.frontiers import fit_lines, fit_loss_curves
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval

# Ends of one size this close in ln C are one horizon (its seeds), and their mean ln L is used.
_SAME_HORIZON = 0.02
# A size is used with so many horizons, and `method=auto` asks for so many sizes.
_HORIZONS = 3
_SIZES = 5
# Any line goes through two crossings, however close: they say nothing of an exponent, nor of its error.
LEAST_CROSSINGS = 3
# Sizes are paired up to this ratio, if their horizons overlap by a factor of two in C.
_LARGEST_RATIO = 3.0
_OVERLAP_LOG_C = float(np.log(2.0))
# Of the pairs those this far apart, relative to the widest: the largest sizes have only near partners, which tell little.
_LEAST_SEPARATION = 0.75
# Budgets at which the valley's floor is read.
_LOSS_BUDGETS = 24
# Residual degrees of freedom that a scale of the noise takes.
_LEAST_FREEDOM = 5


@dataclass(frozen=True)
class Size:
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
        """(samples, points) ln L of the size at `log_c`, NaN outside its horizons, for losses (samples, runs)."""
        counts = np.bincount(self.horizon)
        means = np.zeros((len(log_loss), counts.size))
        np.add.at(means.T, self.horizon, log_loss[:, self.at].T)
        outside = (log_c < self.log_c[0] - 1e-9) | (log_c > self.log_c[-1] + 1e-9)
        curve = PchipInterpolator(self.log_c, means / counts, axis=1)
        values = curve(np.clip(log_c, self.log_c[0], self.log_c[-1]))
        return np.where(outside, np.nan, values)


@dataclass(frozen=True)
class EndsDesign:
    """Which sizes there are, which of them are paired, and where the valley's floor is read: fixed for all samples."""

    sizes: tuple[Size, ...]
    pairs: tuple[tuple[int, int], ...]
    log_c_step: float
    """Spacing of the FLOP values at which two curves are compared."""


@dataclass(frozen=True)
class EndsPoints:
    """What one batch of losses says: (samples, pairs) crossings and (samples, budgets) floors of the valley."""

    log_c: Array
    log_n: Array
    log_d: Array
    weight: Array
    """1 where the pair crosses inside its horizons, else 0."""
    floor_log_c: Array
    """(budgets,)"""
    floor_loss: Array
    """NaN where fewer than three sizes have a loss."""


def design_of(final: Observations, grid_points: int, least_horizons: int = _HORIZONS) -> EndsDesign:
    """The design of these runs (one point a run); sizes with fewer than `least_horizons` are left out."""
    log_n, log_c, log_d = (np.log(x) for x in (final.n_params, final.compute_flops, final.n_tokens))
    sizes = []
    rounded = np.round(log_n, 9)
    for value in np.unique(rounded):
        at = np.flatnonzero(rounded == value)
        at = at[np.argsort(log_c[at], kind="stable")]
        horizon = np.cumsum(np.diff(log_c[at], prepend=log_c[at[0]]) > _SAME_HORIZON, dtype=np.int64)
        if horizon[-1] + 1 >= least_horizons:
            centres = np.bincount(horizon, log_c[at]) / np.bincount(horizon)
            sizes.append(Size(value, float((log_c - log_d)[at].mean()), centres, horizon, at))
    pairs = [(i, j) for i in range(len(sizes)) if (j := _partner(sizes, i)) is not None]
    widest = max((sizes[j].log_n - sizes[i].log_n for i, j in pairs), default=0.0)
    pairs = [(i, j) for i, j in pairs if sizes[j].log_n - sizes[i].log_n >= _LEAST_SEPARATION * widest]
    step = float(np.ptp(log_c)) / grid_points
    return EndsDesign(tuple(sizes), tuple(pairs), step)


def _partner(sizes: list[Size], i: int) -> int | None:
    """The farthest larger size within the ratio whose horizons overlap enough, else the next one."""
    found = i + 1 if i + 1 < len(sizes) else None
    for j in range(i + 2, len(sizes)):
        overlap = min(sizes[i].log_c[-1], sizes[j].log_c[-1]) - max(sizes[i].log_c[0], sizes[j].log_c[0])
        if sizes[j].log_n - sizes[i].log_n <= np.log(_LARGEST_RATIO) and overlap >= _OVERLAP_LOG_C:
            found = j
    return found


def serves(design: EndsDesign) -> bool:
    """Whether `method=auto` takes the ends: enough sizes with enough horizons."""
    return len(design.sizes) >= _SIZES


def ends_points(design: EndsDesign, log_loss: Array) -> EndsPoints:
    """Crossings and floors for losses (samples, runs)."""
    samples = len(log_loss)
    shape = (samples, len(design.pairs))
    log_c, log_n, weight = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    per_token = np.zeros(shape[1])
    for k, (i, j) in enumerate(design.pairs):
        low, high = design.sizes[i], design.sizes[j]
        begin, end = max(low.log_c[0], high.log_c[0]), min(low.log_c[-1], high.log_c[-1])
        per_token[k] = 0.5 * (low.log_per_token + high.log_per_token)
        log_n[:, k] = 0.5 * (low.log_n + high.log_n)
        if end <= begin:
            continue
        x = np.linspace(begin, end, max(2, int(np.ceil((end - begin) / design.log_c_step)) + 1))
        log_c[:, k], weight[:, k] = _crossings(x, low.curve(log_loss, x) - high.curve(log_loss, x))
    floor_log_c = _floor_budgets(design)
    floors = np.stack([_floors(design, log_loss, c) for c in floor_log_c], axis=1)
    return EndsPoints(log_c, log_n, np.where(weight > 0, log_c - per_token, 0.0), weight, floor_log_c, floors)


def _crossings(x: Array, difference: Array) -> tuple[Array, Array]:
    """(samples,) where the smaller size's loss rises above the larger's, and 1 where it does so inside.

    Noise can make two curves cross three times: the crossing is put where the signs, sorted, would change (the monotone
    rearrangement), and refined by a straight line where they change there.
    """
    below = (difference <= 0).sum(axis=1)
    inside = (below > 0) & (below < x.size)
    j = np.clip(below - 1, 0, x.size - 2)
    rows = np.arange(len(j))
    left, right = difference[rows, j], difference[rows, j + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where((left <= 0) & (right > 0), -left / (right - left), 0.5)
    return np.where(inside, x[j] + share * (x[j + 1] - x[j]), 0.0), inside.astype(np.float64)


def _floor_budgets(design: EndsDesign) -> Array:
    """ln C over the range in which three sizes at least have a loss."""
    begins, ends = np.sort([s.log_c[0] for s in design.sizes]), np.sort([s.log_c[-1] for s in design.sizes])
    return np.linspace(begins[2], ends[-3], _LOSS_BUDGETS) if len(design.sizes) >= 3 else np.zeros(1)


def _floors(design: EndsDesign, log_loss: Array, log_c: float) -> Array:
    """(samples,) the lowest loss of the parabola through the sizes' losses at this C, over ln N."""
    there = [s for s in design.sizes if s.log_c[0] - 1e-9 <= log_c <= s.log_c[-1] + 1e-9]
    if len(there) < 3:
        return np.full(len(log_loss), np.nan)
    x = np.array([s.log_n for s in there])
    y = np.concatenate([s.curve(log_loss, np.array([log_c])) for s in there], axis=1)
    # A valley is lopsided farther out: only the sizes near its middle.
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
    """The frontier of a single sample."""
    used = points.weight[0] > 0
    order = np.flatnonzero(used)[np.argsort(points.log_c[0][used], kind="stable")]
    a, log_k = (float(v[0]) for v in fit_lines(points.log_c, points.log_n, points.weight))
    b, log_k_d = (float(v[0]) for v in fit_lines(points.log_c, points.log_d, points.weight))
    floor, log_scale, gamma = (float(v[0]) for v in _loss_curves(points, points.floor_loss, True))
    c = points.log_c[0][order]
    seen = np.isfinite(points.floor_loss[0])
    loss = (
        np.interp(c, points.floor_log_c[seen], points.floor_loss[0][seen], left=np.nan, right=np.nan)
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
    return fit_loss_curves(points.floor_log_c, np.where(weight > 0, loss, 1.0), weight, floor_at_zero)


def ends_quantities(points: EndsPoints) -> dict[str, Array]:
    """(samples,) each: the frontier's quantities (see `frontiers.quantities`); NaN with fewer than two crossings."""
    a, log_k = fit_lines(points.log_c, points.log_n, points.weight)
    b, log_k_d = fit_lines(points.log_c, points.log_d, points.weight)
    floor, log_scale, gamma = _loss_curves(points, points.floor_loss, False)
    return {
        "params_exponent": a,
        "params_log_coefficient": log_k,
        "tokens_exponent": b,
        "tokens_log_coefficient": log_k_d,
        "loss_floor_nats": floor,
        "loss_log_coefficient": log_scale,
        "loss_exponent": gamma,
    }


def simulated_quantities(final: Observations, design: EndsDesign, draws: Draws) -> dict[str, Array]:
    """(resamples,) each: the estimate, minus the error that it made in studies simulated from the fitted law.

    Raises:
        NoInterval: the law does not fit, or leaves too few residuals to tell the noise.
    """
    approach = Parametric()
    fitted = approach.estimate(final)
    parameters = len(approach.law.parameters)
    if final.n_points < parameters + _LEAST_FREEDOM:
        raise NoInterval(
            f"{final.n_points} runs leave too few residuals beside a law of {parameters} parameters to tell the noise."
        )
    if fitted.frontier is None or fitted.frontier.loss is None or fitted.status is FitStatus.MAX_STEPS:
        raise NoInterval(
            f"studies are simulated from the Chinchilla law, which does not fit: {fitted.message}"
        )
    losses = residual_losses(final, fitted.fits[0], draws, None)
    here = ends_points(design, np.log(final.loss_nats)[None])
    there = ends_points(design, np.log(losses))
    estimate, simulated = ends_quantities(here), ends_quantities(there)
    truth, true_loss = fitted.frontier, fitted.frontier.loss
    out = {}
    for name, law in (("params", truth.params), ("tokens", truth.tokens)):
        for part, true in (("exponent", law.exponent), ("log_coefficient", law.log_k)):
            key = f"{name}_{part}"
            out[key] = estimate[key] + true - simulated[key]
    loss = here.floor_loss + true_loss(np.exp(here.floor_log_c)) - there.floor_loss
    floor, log_scale, gamma = _loss_curves(here, loss, False)
    return out | {"loss_floor_nats": floor, "loss_log_coefficient": log_scale, "loss_exponent": gamma}


def envelope_of_ends(design: EndsDesign, log_loss: Array, grid_points: int) -> dict[str, NDArray[np.float64]]:
    """The lower envelope of the sizes' curves, for drawing: compute_flops, loss_nats, params."""
    log_c = np.linspace(
        min(s.log_c[0] for s in design.sizes), max(s.log_c[-1] for s in design.sizes), grid_points
    )
    curves = np.full((len(design.sizes), grid_points), np.inf)
    for i, s in enumerate(design.sizes):
        inside = (log_c >= s.log_c[0]) & (log_c <= s.log_c[-1])
        curves[i, inside] = s.curve(log_loss, log_c[inside])[0]
    best = np.argmin(curves, axis=0)
    seen = np.isfinite(curves.min(axis=0))
    return {
        "compute_flops": np.exp(log_c[seen]),
        "loss_nats": np.exp(curves.min(axis=0)[seen]),
        "params": np.exp(np.array([s.log_n for s in design.sizes])[best[seen]]),
    }
