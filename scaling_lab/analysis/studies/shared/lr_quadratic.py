"""Quadratic fit of the loss in ln LR (and ln batch) around the setting that a sweep used.

Near its minimum the loss is a parabola in ln LR; far from it, it is not (above, it diverges), so settings far from both
the best and the sweep's own are left out of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array

# Points within this factor of the range between the best setting tried and the reference are fitted: with a factor of 2
# between settings these are the neighbors on both sides.
WINDOW_FACTOR = 2.3
# Settings are the same where they differ by less (batches are rounded).
SAME_SETTING_LOG = 0.1


@dataclass(frozen=True)
class QuadraticFit:
    """Quadratics fitted to many loss vectors of one cell: leading axis samples, the point estimate first."""

    optimum: Array
    """(samples, dims) ln(best / reference), where the quadratic has its minimum; within the settings tried."""
    hessian: Array
    """(samples, dims, dims) second derivatives, nats."""
    floor_nats: float
    """Loss at the point estimate's minimum."""
    residual_squares: float
    """Of the point estimate, nats^2."""
    n_settings: int
    n_runs: int

    @property
    def excess_nats(self) -> Array:
        """(samples,) loss at the reference less that at the optimum."""
        return quadratic_rise(-self.optimum, self.hessian)


def quadratic_rise(offset: Array, hessian: Array) -> Array:
    """(...,) how far the quadratic rises from its minimum to `offset` (..., dims): offset' H offset / 2."""
    return np.asarray(0.5 * np.einsum("...i,...ij,...j->...", offset, hessian, offset))


def near_best(x: Array, loss: Array) -> NDArray[np.bool_]:
    """(runs,) which runs are near enough to be fitted. `x` is (runs, dims), ln of the setting over the reference."""
    best = best_setting(x, loss)
    margin = np.log(WINDOW_FACTOR)
    low, high = np.minimum(best, 0.0) - margin, np.maximum(best, 0.0) + margin
    return np.asarray(((x >= low) & (x <= high)).all(axis=1))


def best_at_edge(x: Array, loss: Array) -> bool:
    """Whether the best of the settings `x` (runs, dims) is the smallest or largest tried, in any of the dimensions."""
    best = best_setting(x, loss)
    return bool(((best <= x.min(axis=0)) | (best >= x.max(axis=0))).any())


def best_setting(x: Array, loss: Array) -> Array:
    """(dims,) the setting among `x` (runs, dims) with the lowest mean loss over its seeds."""
    label = settings_of(x)
    means = np.bincount(label, loss) / np.bincount(label)
    return np.asarray(x[int(np.argmin(means[label]))])


def settings_of(x: Array) -> NDArray[np.int64]:
    """(runs,) an index of the distinct settings."""
    return np.unique(np.round(x / 1e-6), axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def features(x: Array) -> Array:
    """(runs, 3 or 6) 1, the coordinates, and their products."""
    columns = [np.ones(len(x))]
    columns += [x[:, i] for i in range(x.shape[1])]
    columns += [x[:, i] * x[:, j] for i in range(x.shape[1]) for j in range(i, x.shape[1])]
    return np.stack(columns, axis=1)


def underdetermined_reason(x: Array) -> str | None:
    """Why the settings `x` (runs, dims) determine no quadratic; None where they do."""
    matrix = features(x)
    distinct = len(np.unique(settings_of(x)))
    if distinct < matrix.shape[1]:
        return f"{distinct} settings are near enough, {matrix.shape[1]} are needed"
    if np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return "the settings lie on a line"
    return None


def fit_quadratic(x: Array, losses: Array) -> QuadraticFit | str:
    """Least squares for every row of `losses` (samples, runs) at settings `x` (runs, dims); a sentence with the reason where
    the first row has no minimum among the settings.

    A later row without a minimum takes the first row's curvature; an optimum outside of what was tried is set to its edge.
    """
    matrix = features(x)
    coefficients = losses @ np.linalg.pinv(matrix).T
    dims = x.shape[1]
    gradient = coefficients[:, 1 : 1 + dims]
    hessian = np.zeros((len(losses), dims, dims))
    at = 1 + dims
    for i in range(dims):
        for j in range(i, dims):
            hessian[:, i, j] += coefficients[:, at]
            hessian[:, j, i] += coefficients[:, at]
            at += 1
    bent_up = np.linalg.eigvalsh(hessian)[:, 0] > 0
    if not bent_up[0]:
        return "the losses do not bend up: no best setting"
    hessian[~bent_up] = hessian[0]
    optimum = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
    low, high = x.min(axis=0), x.max(axis=0)
    if ((optimum[0] < low) | (optimum[0] > high)).any():
        return "the best setting lies outside of what was tried"
    residual = losses[0] - matrix @ coefficients[0]
    distinct = int(settings_of(x).max()) + 1
    floor = float(coefficients[0, 0] - quadratic_rise(optimum[0], hessian[0]))
    return QuadraticFit(
        np.clip(optimum, low, high), hessian, floor, float(residual @ residual), distinct, len(x)
    )
