"""The last step of all approaches: from the points (C, N, D, loss) of a frontier to power laws and a loss curve.

All arrays are (samples, points), with weights of the same shape, so the same code computes a point estimate (one sample)
and a bootstrap (many). Weight 0 leaves a point out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array, Frontier, LossCurve, PowerLaw

# Candidate exponents of the loss along the frontier, refined between neighbors afterward. Published values are .048
# (Kaplan's alpha_C^min) to .17; small models on easy text reach .5.
_GAMMAS = np.geomspace(0.005, 1.5, 120)
# A loss curve is smooth with three parameters: with more points than this, only every k-th is used.
_LOSS_CURVE_POINTS = 64


@dataclass(frozen=True)
class FrontierPoints:
    """Frontier points of many samples, in natural logarithms; arrays broadcast to (samples, points)."""

    log_c: Array
    log_n: Array
    log_d: Array
    loss: Array
    weight: Array


def fit_lines(x: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    """(samples,) slope and intercept of weighted least squares over the last axis; NaN if x is constant."""
    x, y, weight = np.broadcast_arrays(x, y, weight)
    total = weight.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        used = weight > 0
        xs, ys = np.where(used, x, 0.0), np.where(used, y, 0.0)
        mean_x = (weight * xs).sum(axis=-1) / total
        mean_y = (weight * ys).sum(axis=-1) / total
        dx = np.where(used, xs - mean_x[..., None], 0.0)
        dy = np.where(used, ys - mean_y[..., None], 0.0)
        sxx = (weight * dx**2).sum(axis=-1)
        # Points at one C (relative spread below 1e-9) determine no slope.
        slope = np.where(
            sxx > 1e-18 * np.maximum(total, 1e-300), (weight * dx * dy).sum(axis=-1) / sxx, np.nan
        )
        return slope, mean_y - slope * mean_x


def fit_loss_curves(
    log_c: Array, loss: Array, weight: Array, floor_at_zero: bool = True
) -> tuple[Array, Array, Array]:
    """(samples,) floor E, ln K and gamma of E + K C^-gamma by least squares on the loss; E >= 0 with `floor_at_zero`.

    For a given gamma the curve is linear in E and K, so gamma is scanned and then refined between the neighbors of the best
    value. With two points E is 0 (a plain power law), because two losses do not determine a floor.
    """
    log_c, loss, weight = np.broadcast_arrays(log_c, loss, weight)
    thin = slice(None, None, -(-log_c.shape[-1] // _LOSS_CURVE_POINTS))
    log_c, loss, weight = log_c[..., thin], loss[..., thin], weight[..., thin]
    used = weight > 0
    n_used = used.sum(axis=-1)
    x = np.where(used, log_c, 0.0)
    y = np.where(used, loss, 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        center = (weight * x).sum(axis=-1) / weight.sum(axis=-1)
        from_center = x - center[..., None]
        curve_at = partial(
            _loss_curve_at, from_center, y, weight, n_used > 2, 0.0 if floor_at_zero else -np.inf
        )
        errors = np.stack([curve_at(np.full(n_used.shape, g))[0] for g in _GAMMAS])
        log_gamma = np.log(_GAMMAS)[np.argmin(np.where(np.isfinite(errors), errors, np.inf), axis=0)]
        step = float(np.log(_GAMMAS[1] / _GAMMAS[0]))
        gamma = np.exp(_golden(lambda g: curve_at(np.exp(g))[0], log_gamma - step, log_gamma + step))
        error, floor, scale = curve_at(gamma)
        enough = (n_used >= 2) & np.isfinite(error)
        log_k = np.log(scale) + gamma * center
    return np.where(enough, floor, np.nan), np.where(enough, log_k, np.nan), np.where(enough, gamma, np.nan)


def _loss_curve_at(
    x: Array, y: Array, weight: Array, may_have_floor: NDArray[np.bool_], lowest_floor: float, gamma: Array
) -> tuple[Array, Array, Array]:
    """(samples,) squared error, E and K of y = E + K exp(-gamma x), with x relative to the center of the points to avoid
    overflow and underflow."""
    basis = np.exp(-gamma[..., None] * x)
    slope, level = fit_lines(basis, y, weight)
    free = (level >= lowest_floor) & (slope > 0) & may_have_floor
    through_zero = (weight * basis * y).sum(axis=-1) / (weight * basis**2).sum(axis=-1)
    e = np.where(free, level, 0.0)
    k = np.where(free, slope, through_zero)
    return (weight * (y - e[..., None] - k[..., None] * basis) ** 2).sum(axis=-1), e, k


def _golden(function: Callable[[Array], Array], lo: Array, hi: Array) -> Array:
    """Golden-section search for the minima of many functions of one variable, to 1e-4 of the bracket."""
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    inner, outer = hi - ratio * (hi - lo), lo + ratio * (hi - lo)
    f_inner, f_outer = function(inner), function(outer)
    for _ in range(20):
        left = f_inner <= f_outer
        lo, hi = np.where(left, lo, inner), np.where(left, outer, hi)
        probe = np.where(left, hi - ratio * (hi - lo), lo + ratio * (hi - lo))
        value = function(probe)
        inner, outer = np.where(left, probe, outer), np.where(left, inner, probe)
        f_inner, f_outer = np.where(left, value, f_outer), np.where(left, f_inner, value)
    return 0.5 * (lo + hi)


def quantities(points: FrontierPoints, floor_at_zero: bool = True) -> dict[str, Array]:
    """(samples,) each: exponents and log coefficients of N and D, and the loss curve, of the frontier of each sample.

    Resamples are fitted without `floor_at_zero`. If the true floor is 0, bounded resamples would pile up at E = 0, and the
    interval of an extrapolated loss would end above the truth (measured: 90% intervals cover 76% on a Kaplan-like law).
    """
    a, log_k_n = fit_lines(points.log_c, points.log_n, points.weight)
    b, log_k_d = fit_lines(points.log_c, points.log_d, points.weight)
    with_loss = np.where(np.isfinite(points.loss), points.weight, 0.0)
    floor, log_k, gamma = fit_loss_curves(points.log_c, points.loss, with_loss, floor_at_zero)
    return {
        "params_exponent": a,
        "params_log_coefficient": log_k_n,
        "tokens_exponent": b,
        "tokens_log_coefficient": log_k_d,
        "loss_floor_nats": floor,
        "loss_log_coefficient": log_k,
        "loss_exponent": gamma,
    }


def frontier_from(points: FrontierPoints, compute_range_flops: tuple[float, float]) -> Frontier:
    """The frontier of a single sample (arrays (points,) or (1, points)), with points in ascending C."""
    one = FrontierPoints(*(np.atleast_2d(v) for v in _broadcast(points)))
    q = {name: float(value[0]) for name, value in quantities(one).items()}
    keep = np.flatnonzero(one.weight[0] > 0)
    keep = keep[np.argsort(one.log_c[0][keep], kind="stable")]
    has_loss = bool(np.isfinite(q["loss_log_coefficient"]))
    return Frontier(
        params=PowerLaw.of_log(q["params_exponent"], q["params_log_coefficient"]),
        tokens=PowerLaw.of_log(q["tokens_exponent"], q["tokens_log_coefficient"]),
        compute_range_flops=compute_range_flops,
        compute_flops=np.exp(one.log_c[0][keep]),
        params_opt=np.exp(one.log_n[0][keep]),
        tokens_opt=np.exp(one.log_d[0][keep]),
        loss_opt=one.loss[0][keep],
        loss=LossCurve(q["loss_floor_nats"], _exp(q["loss_log_coefficient"]), q["loss_exponent"])
        if has_loss
        else None,
    )


def stack_points(many: list[FrontierPoints]) -> FrontierPoints:
    """Stack samples with different numbers of points into one array, padded with points of weight 0."""
    width = max(1, max(p.log_c.size for p in many))
    arrays = [np.zeros((len(many), width)) for _ in range(5)]
    for i, p in enumerate(many):
        for array, values in zip(arrays, (p.log_c, p.log_n, p.log_d, p.loss, p.weight)):
            array[i, : values.size] = values
    return FrontierPoints(*arrays)


def at_compute(samples: Mapping[str, Array], compute_flops: float) -> dict[str, Array]:
    """(samples,) each: params_opt, tokens_opt, tokens_per_param and loss_opt (at least 0) at a budget, from the frontier
    quantities of each sample."""
    log_c = np.log(compute_flops)
    with np.errstate(over="ignore", invalid="ignore"):
        log_n = samples["params_log_coefficient"] + samples["params_exponent"] * log_c
        log_d = samples["tokens_log_coefficient"] + samples["tokens_exponent"] * log_c
        return {
            "params_opt": np.exp(log_n),
            "tokens_opt": np.exp(log_d),
            # In logarithms, because the quotient of two overflowed numbers is undefined.
            "tokens_per_param": np.exp(log_d - log_n),
            "loss_opt": np.maximum(
                samples["loss_floor_nats"]
                + np.exp(samples["loss_log_coefficient"] - samples["loss_exponent"] * log_c),
                0.0,
            ),
        }


def _broadcast(points: FrontierPoints) -> tuple[Array, ...]:
    shape = np.broadcast_shapes(*(np.shape(getattr(points, f)) for f in points.__dataclass_fields__))
    return tuple(
        np.asarray(np.broadcast_to(getattr(points, f), shape), dtype=np.float64)
        for f in points.__dataclass_fields__
    )


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
