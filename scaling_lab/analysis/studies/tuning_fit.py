"""Owns the bowl: the quadratic of the loss in ln LR (and ln batch) about the setting that a sweep used.

Near its minimum the loss is a parabola in ln LR; far from it, it is not (above, it diverges), so settings far from both
the best and the sweep's own are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array

# Points within this factor of the stretch between the best setting tried and the reference are fitted; a factor of 2
# between settings thus gives the neighbours on both sides.
WINDOW_FACTOR = 2.3
# Settings are the same where they differ by less (batches are rounded).
SAME_SETTING_LOG = 0.1


@dataclass(frozen=True)
class Bowl:
    """Quadratics fitted to many loss vectors of one cell: leading axis samples, the point estimate first."""

    optimum: Array
    """(samples, dims) ln(best / reference), where the quadratic has its minimum; within what was tried."""
    hessian: Array
    """(samples, dims, dims) second derivatives, nats."""
    floor_nats: float
    """Loss at the point estimate's minimum."""
    residual_squares: float
    """Of the point estimate, nats^2."""
    n_settings: int
    n_runs: int

    @property
    def debt_nats(self) -> Array:
        """(samples,) loss at the reference less that at the optimum."""
        return debt_at(-self.optimum, self.hessian)


def debt_at(offset: Array, hessian: Array) -> Array:
    """(...,) the quadratic's height at `offset` (..., dims) from its minimum: offset' H offset / 2."""
    return np.asarray(0.5 * np.einsum("...i,...ij,...j->...", offset, hessian, offset))


def window(x: Array, loss: Array) -> NDArray[np.bool_]:
    """(runs,) which runs are near enough. `x` is (runs, dims), ln of the setting over the reference."""
    best = best_setting(x, loss)
    margin = np.log(WINDOW_FACTOR)
    low, high = np.minimum(best, 0.0) - margin, np.maximum(best, 0.0) + margin
    return np.asarray(((x >= low) & (x <= high)).all(axis=1))


def at_the_edge(x: Array, loss: Array) -> bool:
    """Whether the best of the settings `x` (runs, dims) is the least or the largest that was tried of any of them."""
    best = best_setting(x, loss)
    return bool(((best <= x.min(axis=0)) | (best >= x.max(axis=0))).any())


def best_setting(x: Array, loss: Array) -> Array:
    """(dims,) of the settings `x` (runs, dims) the one with the lowest mean: a single seed may be lucky."""
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


def why_no_bowl(x: Array) -> str | None:
    """Why the settings `x` (runs, dims) determine no quadratic; None where they do."""
    matrix = features(x)
    distinct = len(np.unique(settings_of(x)))
    if distinct < matrix.shape[1]:
        return f"{distinct} settings are near enough, {matrix.shape[1]} are needed"
    if np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return "the settings lie on a line"
    return None


def fit_bowl(x: Array, losses: Array) -> Bowl | str:
    """Least squares for every row of `losses` (samples, runs) at settings `x` (runs, dims); the sentence that says why
    where the first row has no minimum among the settings.

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
    floor = float(coefficients[0, 0] - debt_at(optimum[0], hessian[0]))
    return Bowl(np.clip(optimum, low, high), hessian, floor, float(residual @ residual), distinct, len(x))
