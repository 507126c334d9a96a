"""Batched minimizer with bounds: damped Newton steps for thousands of small problems in lockstep.

At delta = 1e-3 the Huber objective is nearly an L1 norm: on the Chinchilla data one residual in six is inside delta.
Iteratively reweighted least squares (IRLS) alone converges slowly there, and Newton's method alone overshoots because H
contains only the residuals inside. The step solves (H + damping M) s = -g with the exact Hessian H and the IRLS matrix M
(`fitting.objective`): large damping gives a short IRLS step, which always descends; small damping gives Newton's step,
which converges quadratically once the set of inside residuals no longer changes. Damping with M instead of the identity
makes the path independent of the scaling of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.fitting.objective import Objective, ObjectiveValue

# A problem has converged when an undamped Newton step would lower its objective by less than this fraction ...
_DECREMENT_TOLERANCE = 1e-11
# ... and its gradient is this small relative to its size before cancellation.
_GRADIENT_TOLERANCE = 1e-6
# Residuals this small (in ln L) are rounding errors: with all residuals below it a fit is exact.
_ROUNDING_RESIDUAL = 1e-11

_DAMPING_RANGE = (1e-9, 1e12)


@dataclass(frozen=True)
class Minima:
    """The end point of each start: theta (P, p), value (P,), and whether it is a minimum."""

    theta: Array
    value: Array
    converged: NDArray[np.bool_]
    """First-order optimal within the bounds, checked at the final point (not inferred from small steps)."""
    scaled_gradient: Array
    """(P,): the largest |gradient| of a free parameter relative to its size before cancellation."""
    at_bound: NDArray[np.bool_]
    """(P, p): parameters that are at a bound."""
    gram: Array
    """(P, p, p): J^T W J at theta, over all points."""
    steps: NDArray[np.intp]


def minimize(objective: Objective, theta: Array, rows: NDArray[np.intp], max_steps: int = 200) -> Minima:
    """Minimize problem rows[i] from start theta[i] (P, p), all in lockstep; finished problems drop out."""
    lower, upper = objective.law.bounds(objective.inputs)
    theta = np.clip(theta, lower, upper)
    current = objective.evaluate(theta, rows)
    count = len(theta)
    damping = np.ones(count)
    steps = np.zeros(count, dtype=np.intp)
    active = np.flatnonzero(np.isfinite(current.value))
    total = objective.total_weight
    exact_value = 0.5 * _ROUNDING_RESIDUAL**2 * (total if len(total) == 1 else total[rows]) + np.zeros(count)
    for _ in range(max_steps):
        if not len(active):
            break
        steps[active] += 1
        at = _take(current, active)
        step, used, decrement, curvature_term = _steps(theta[active], at, damping[active], lower, upper)
        trial = np.clip(theta[active] + step, lower, upper)
        predicted = -np.einsum("bi,bi->b", at.gradient, step) - 0.5 * curvature_term
        rounding = 1e-14 * at.value + 1e-6 * exact_value[active]
        finishing = (decrement <= _DECREMENT_TOLERANCE * at.value + 1e-4 * exact_value[active]) & (
            used <= 1e-2
        )
        new = objective.evaluate(trial, rows[active])
        gain = at.value - new.value
        accept = gain >= 0
        with np.errstate(all="ignore"):
            ratio = np.where(predicted > 0, gain / predicted, np.sign(gain))
        stuck = ~accept & (np.abs(predicted) <= rounding) & (decrement <= rounding)
        factor = np.where(accept & (ratio > 0.75), 1 / 6, np.where(accept & (ratio > 0.25), 1.0, 4.0))
        damping[active] = np.clip(used * factor, *_DAMPING_RANGE)
        moved = active[accept]
        theta[moved] = trial[accept]
        for name in ("value", "gradient", "hessian", "majorizer"):
            getattr(current, name)[moved] = getattr(new, name)[accept]
        finished = (
            finishing
            | stuck
            | (damping[active] >= _DAMPING_RANGE[1])
            | (current.value[active] <= 1e-8 * exact_value[active])
        )
        active = active[~finished]
    return _as_minima(objective, theta, rows, current, exact_value, steps, active, lower, upper)


def _as_minima(
    objective: Objective,
    theta: Array,
    rows: NDArray[np.intp],
    current: ObjectiveValue,
    exact_value: Array,
    steps: NDArray[np.intp],
    unfinished: NDArray[np.intp],
    lower: Array,
    upper: Array,
) -> Minima:
    gradient, size, gram = objective.first_order(theta, rows)
    at_bound = _held_at_bound(theta, gradient, lower, upper)
    with np.errstate(all="ignore"):
        relative = np.where(at_bound | (size == 0), 0.0, np.abs(gradient) / size)
    scaled = np.max(relative, axis=1, initial=0.0)
    done = np.ones(len(theta), dtype=bool)
    done[unfinished] = False
    exact = current.value <= exact_value
    converged = np.isfinite(current.value) & (exact | (done & (scaled <= _GRADIENT_TOLERANCE)))
    at_bound |= (theta <= lower) | (theta >= upper)
    return Minima(theta, current.value, converged, scaled, at_bound, gram, steps)


def _take(evaluation: ObjectiveValue, index: NDArray[np.intp]) -> ObjectiveValue:
    return ObjectiveValue(
        evaluation.value[index],
        evaluation.gradient[index],
        evaluation.hessian[index],
        evaluation.majorizer[index],
    )


def _held_at_bound(theta: Array, gradient: Array, lower: Array, upper: Array) -> NDArray[np.bool_]:
    """Parameters at a bound that a descent step would push further out: they are held fixed."""
    return ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))


def _steps(
    theta: Array, at: ObjectiveValue, damping: Array, lower: Array, upper: Array
) -> tuple[Array, Array, Array, Array]:
    """Steps s (b, p) within the bounds, the damping that was used (b,), s . (H + damping M) s and s . H s, each (b,).

    A parameter whose step would leave its bounds is set to the bound, and the step of the others is solved for again:
    merely clipping a Newton step can turn it into an ascent direction.
    """
    diagonal = np.arange(theta.shape[1])
    # Along directions that the data do not determine, H and M are singular: a tiny ridge keeps the system solvable.
    scale = np.maximum(at.majorizer[:, diagonal, diagonal], np.finfo(np.float64).tiny)
    damping = damping.copy()
    step = np.zeros_like(theta)
    fixed = _held_at_bound(theta, at.gradient, lower, upper)
    system = np.empty_like(at.hessian)
    pending = np.arange(len(theta))
    for _ in range(60 + theta.shape[1]):
        held = fixed[pending]
        matrix = at.hessian[pending] + damping[pending, None, None] * at.majorizer[pending]
        matrix[:, diagonal, diagonal] += (1.0 + damping[pending, None]) * 1e-11 * scale[pending]
        system[pending] = matrix
        displacement = np.where(held, step[pending], 0.0)
        force = at.gradient[pending] + np.einsum("bij,bj->bi", matrix, displacement)
        matrix = np.where(held[:, :, None] | held[:, None, :], 0.0, matrix)
        matrix[:, diagonal, diagonal] += np.where(held, scale[pending], 0.0)
        solution, positive = solve_positive(matrix, np.where(held, 0.0, force))
        # Not positive definite: increase the damping, which needs no further evaluation.
        damping[pending[~positive]] = np.maximum(4.0 * damping[pending[~positive]], 1e-3)
        proposal = np.where(held, displacement, -solution)
        target = theta[pending] + proposal
        outside = ~held & ((target < lower) | (target > upper)) & positive[:, None]
        step[pending[positive]] = np.clip(target, lower, upper)[positive] - theta[pending[positive]]
        fixed[pending] |= outside
        pending = pending[~positive | outside.any(axis=1)]
        if not len(pending):
            break
    return step, damping, _quadratic(step, system), _quadratic(step, at.hessian)


def _quadratic(step: Array, matrices: Array) -> Array:
    return np.einsum("bi,bij,bj->b", step, matrices, step, optimize=True)


def solve_positive(matrices: Array, vectors: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Solve A x = b for symmetric A (b, p, p) by Cholesky; the second result says whether each A was positive definite.

    Each operation runs over the whole batch, which for p of 3 to 9 is much faster than one LAPACK call per matrix.
    """
    p = matrices.shape[1]
    a = np.ascontiguousarray(matrices.transpose(1, 2, 0))
    x = np.ascontiguousarray(vectors.T).copy()
    lower = np.zeros_like(a)
    positive = np.ones(len(matrices), dtype=bool)
    with np.errstate(all="ignore"):
        for j in range(p):
            pivot = a[j, j] - np.einsum("kb,kb->b", lower[j, :j], lower[j, :j])
            good = pivot > 1e-13 * a[j, j]
            positive &= good
            lower[j, j] = np.sqrt(np.where(good, pivot, 1.0))
            for i in range(j + 1, p):
                lower[i, j] = (a[i, j] - np.einsum("kb,kb->b", lower[i, :j], lower[j, :j])) / lower[j, j]
        for i in range(p):
            x[i] = (x[i] - np.einsum("kb,kb->b", lower[i, :i], x[:i])) / lower[i, i]
        for i in reversed(range(p)):
            x[i] = (x[i] - np.einsum("kb,kb->b", lower[i + 1 :, i], x[i + 1 :])) / lower[i, i]
    positive &= np.isfinite(x).all(axis=0)
    return x.T, positive
