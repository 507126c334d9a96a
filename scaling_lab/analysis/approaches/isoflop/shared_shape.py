"""Asymmetric IsoFLOP valleys with a shape that all budgets share, fitted for many samples at once.

On a line of equal compute L = E + A N^-alpha + B D^-beta is c0 + c1 exp(-alpha x) + c2 exp(beta x) in x = ln N, with c0,
c1, c2 of each budget. A parabola is the limit alpha = beta -> 0. Fitting a parabola shifts the minimum by a few percent if
alpha != beta or the sizes are off-center, even without noise (Czech et al. 2026, arXiv 2603.22339). Here each budget has
its own c0, c1, c2 (no law ties the minima of the budgets together), and only the two steepnesses alpha and beta are shared:
the variance is as small as a parabola's, without its bias. Given the steepnesses the fit is linear, so they are found by
variable projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array

# Allowed steepnesses: below .02 the shape is a parabola to 1e-3 over any sampled range; published exponents are .05 to .8.
_STEEPNESS_RANGE = (0.02, 4.0)
_GRID = np.geomspace(0.05, 2.0, 9)
_STEPS = 25
# Steepnesses are known to 1e-2 at best, so a relative change of 1e-5 is negligible.
_SMALLEST_MOVE = 1e-5
PARAMETERS_PER_VALLEY = 3
SHARED_PARAMETERS = 2


@dataclass(frozen=True)
class ValleyData:
    """One budget: x (points,) = ln N minus any center; loss and weight (samples, points). Weight 0 leaves a point out; a
    sample with fewer than three distinct x in use must have all its weights 0."""

    x: Array
    loss: Array
    weight: Array


@dataclass(frozen=True)
class SharedFit:
    """The fit of every sample."""

    steepness: Array
    """(samples, 2): of the small-model side (alpha) and the large-model side (beta)."""
    coefficients: Array
    """(samples, valleys, 3) of `basis`; NaN if a valley has no points in a sample."""
    x_min: Array
    """(samples, valleys); NaN if the fitted valley has no minimum."""
    loss_min: Array
    curvature: Array


@dataclass(frozen=True)
class _Stack:
    """Valleys with the same number of points, stacked into arrays for speed."""

    valley: list[int]
    """Their indices among all valleys."""
    x: Array
    """(valleys, 1, points)"""
    loss: Array
    """(valleys, samples, points); samples may be 1 for all."""
    weight: Array

    @property
    def used(self) -> NDArray[np.bool_]:
        """(valleys, samples) which samples have any points."""
        return np.asarray(np.any(self.weight > 0, axis=-1))


def _stacked(valleys: Sequence[ValleyData]) -> list[_Stack]:
    n_samples = max(max(v.loss.shape[0], v.weight.shape[0]) for v in valleys)
    stacks = []
    for points in sorted({v.x.size for v in valleys}):
        at = [i for i, v in enumerate(valleys) if v.x.size == points]
        shape = (n_samples, points)
        stacks.append(
            _Stack(
                at,
                np.stack([valleys[i].x for i in at])[:, None, :],
                np.stack([np.broadcast_to(valleys[i].loss, shape) for i in at]),
                np.stack([np.broadcast_to(valleys[i].weight, shape) for i in at]),
            )
        )
    return stacks


def basis(steepness: Array, x: Array) -> Array:
    """(..., samples, points, 3): the functions 1, about x, and about x^2. They span 1, exp(-alpha x) and exp(beta x), and remain
    linearly independent as the steepnesses go to 0."""
    a, b = steepness[:, :1], steepness[:, 1:]
    falling, rising = np.expm1(-a * x), np.expm1(b * x)
    linear = (rising - falling) / (a + b)
    square = 2.0 * (a * rising + b * falling) / (a * b * (a + b))
    return np.stack([np.ones_like(linear), linear, square], axis=-1)


def fit_shared(valleys: Sequence[ValleyData], start: Array | None = None) -> SharedFit:
    """Fit all valleys of every sample with shared steepnesses, by Levenberg-Marquardt on the projected residuals.

    Args:
        start: (2,) initial steepnesses; None searches a grid on the first sample.
    """
    stacks = _stacked(valleys)
    n_samples = stacks[0].loss.shape[1]
    theta = np.log(np.tile(_grid_start(valleys) if start is None else start, (n_samples, 1)))
    damping = np.full(n_samples, 1e-3)
    residual = _residuals(stacks, np.exp(theta))
    value = (residual**2).sum(axis=1)
    step_size = 1e-4
    for _ in range(_STEPS):
        shifts = (theta + step_size * np.eye(2)[k] for k in (0, 1))
        jacobian = np.stack([(_residuals(stacks, np.exp(t)) - residual) / step_size for t in shifts], axis=-1)
        gram = np.einsum("sni,snj->sij", jacobian, jacobian)
        gradient = np.einsum("sni,sn->si", jacobian, residual)
        ridge = damping[:, None] * np.einsum("sii->si", gram) + 1e-14
        move = np.linalg.solve(gram + ridge[:, :, None] * np.eye(2), gradient[:, :, None])[:, :, 0]
        trial = np.clip(theta - np.clip(move, -0.7, 0.7), *np.log(_STEEPNESS_RANGE))
        trial_residual = _residuals(stacks, np.exp(trial))
        trial_value = (trial_residual**2).sum(axis=1)
        better = trial_value < value
        theta = np.where(better[:, None], trial, theta)
        residual = np.where(better[:, None], trial_residual, residual)
        value = np.where(better, trial_value, value)
        damping = np.where(better, damping / 5, damping * 8)
        if np.all(np.abs(move).max(axis=1) < _SMALLEST_MOVE):
            break
    return _solution(stacks, len(valleys), np.exp(theta))


def shared_curve(steepness: Array, coefficients: Array, x: Array) -> Array:
    """(samples, points) the fitted loss of one valley, for steepness (samples, 2) and coefficients (samples, 3)."""
    return np.einsum("spk,sk->sp", basis(steepness, x), coefficients)


def _grid_start(valleys: Sequence[ValleyData]) -> Array:
    first = _stacked([ValleyData(v.x, v.loss[:1], v.weight[:1]) for v in valleys])
    pairs = np.array([(a, b) for a in _GRID for b in _GRID])
    values = (_residuals(first, pairs) ** 2).sum(axis=1)
    return np.asarray(pairs[int(np.argmin(values))])


def _project(stack: _Stack, steepness: Array) -> tuple[Array, Array]:
    """Residuals (valleys, samples, points) and coefficients (valleys, samples, 3)."""
    used = stack.used[..., None]
    # Samples without points are solved with unit weights, so that the batch stays regular, and set to NaN afterward.
    root = np.sqrt(np.where(used, stack.weight, 1.0))
    design = root[..., None] * basis(steepness, stack.x)
    # Gram-Schmidt on the three columns of the whole batch, which is faster than one LAPACK call per sample.
    residual = root * stack.loss
    r: dict[tuple[int, int], Array] = {}
    q: list[Array] = []
    target: list[Array] = []
    for k in range(3):
        column = design[..., k]
        for j in range(k):
            r[j, k] = (q[j] * column).sum(axis=-1)
            column = column - r[j, k][..., None] * q[j]
        r[k, k] = np.sqrt((column**2).sum(axis=-1))
        q.append(column / r[k, k][..., None])
        target.append((q[k] * residual).sum(axis=-1))
        residual = residual - target[k][..., None] * q[k]
    c2 = target[2] / r[2, 2]
    c1 = (target[1] - r[1, 2] * c2) / r[1, 1]
    c0 = (target[0] - r[0, 1] * c1 - r[0, 2] * c2) / r[0, 0]
    coefficients = np.stack([c0, c1, c2], axis=-1)
    return np.where(used, residual, 0.0), np.where(used, coefficients, np.nan)


def _residuals(stacks: Sequence[_Stack], steepness: Array) -> Array:
    """(samples, points of all valleys)"""
    parts = [np.swapaxes(_project(s, steepness)[0], 0, 1) for s in stacks]
    return np.concatenate([p.reshape(p.shape[0], -1) for p in parts], axis=1)


def _solution(stacks: Sequence[_Stack], n_valleys: int, steepness: Array) -> SharedFit:
    a, b = steepness[:, 0], steepness[:, 1]
    coefficients = np.empty((steepness.shape[0], n_valleys, PARAMETERS_PER_VALLEY))
    for stack in stacks:
        coefficients[:, stack.valley] = np.swapaxes(_project(stack, steepness)[1], 0, 1)
    linear, square = coefficients[:, :, 1], coefficients[:, :, 2]
    a, b = a[:, None], b[:, None]
    # Back to c1 exp(-alpha x) + c2 exp(beta x): a minimum needs both positive.
    c1 = -linear / (a + b) + 2 * square / (a * (a + b))
    c2 = linear / (a + b) + 2 * square / (b * (a + b))
    with np.errstate(invalid="ignore", divide="ignore"):
        x_min = np.where((c1 > 0) & (c2 > 0), np.log(a * c1 / (b * c2)) / (a + b), np.nan)
        curvature = a**2 * c1 * np.exp(-a * x_min) + b**2 * c2 * np.exp(b * x_min)
    loss_min = np.stack(
        [
            np.einsum("sk,sk->s", _basis_at(steepness, x_min[:, i]), coefficients[:, i])
            for i in range(coefficients.shape[1])
        ],
        axis=1,
    )
    return SharedFit(steepness, coefficients, x_min, loss_min, curvature)


def _basis_at(steepness: Array, x: Array) -> Array:
    """(samples, 3) the basis at one x per sample."""
    a, b = steepness[:, 0], steepness[:, 1]
    falling, rising = np.expm1(-a * x), np.expm1(b * x)
    linear = (rising - falling) / (a + b)
    square = 2.0 * (a * rising + b * falling) / (a * b * (a + b))
    return np.stack([np.ones_like(x), linear, square], axis=-1)
