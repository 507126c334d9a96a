"""Owns the batched minimiser: damped Newton steps for thousands of small problems in lockstep, with bounds.

At delta = 1e-3 the Huber objective is nearly an L1 norm: on the Chinchilla data one residual in six is inside delta.
IRLS alone converges slowly there, and Newton's method alone overshoots, because H sees only the residuals inside. The step
solves (H + damping M) s = -g with the exact Hessian H and the IRLS matrix M (`fitting_objective`): large damping gives a
short IRLS step, which always descends; small damping gives Newton's, which converges quadratically once the set of inside
residuals has settled. Because M, not the identity, is the yardstick, the path does not depend on how parameters are scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.fitting.objective import Evaluation, Objective

# A problem has converged when one undamped Newton step would lower its objective by less than this fraction ...
_DECREMENT_TOLERANCE = 1e-11
# ... and its gradient is this small against its own size before cancellation.
_GRADIENT_TOLERANCE = 1e-6
# Residuals this small (in ln L) are rounding: a sum of squares below it is an exact fit.
_EXACT_RESIDUAL = 1e-11

_DAMPING_RANGE = (1e-9, 1e12)


@dataclass(frozen=True)
class Minima:
    """Where each start ended: theta (P, p), value (P,), and how."""

    theta: Array
    value: Array
    converged: NDArray[np.bool_]
    """First-order optimal within the bounds, proved on the final point (not inferred from small steps)."""
    scaled_gradient: Array
    """(P,): the largest |gradient| of a free parameter against its size before cancellation."""
    at_bound: NDArray[np.bool_]
    """(P, p): parameters held by a bound."""
    gram: Array
    """(P, p, p): J^T W J at theta, over all points."""
    steps: NDArray[np.intp]


def minimise(objective: Objective, theta: Array, rows: NDArray[np.intp], max_steps: int = 200) -> Minima:
    """Minimises problem rows[i] from start theta[i] (P, p), all in lockstep; the finished ones drop out."""
    lower, upper = objective.law.bounds(objective.design)
    theta = np.clip(theta, lower, upper)
    current = objective.evaluate(theta, rows)
    count = len(theta)
    damping = np.ones(count)
    steps = np.zeros(count, dtype=np.intp)
    active = np.flatnonzero(np.isfinite(current.value))
    total = objective.total_weight
    noise = 0.5 * _EXACT_RESIDUAL**2 * (total if len(total) == 1 else total[rows]) + np.zeros(count)
    for _ in range(max_steps):
        if not len(active):
            break
        steps[active] += 1
        at = _take(current, active)
        step, used, decrement, bending = _steps(theta[active], at, damping[active], lower, upper)
        trial = np.clip(theta[active] + step, lower, upper)
        predicted = -np.einsum("bi,bi->b", at.gradient, step) - 0.5 * bending
        rounding = 1e-14 * at.value + 1e-6 * noise[active]
        finishing = (decrement <= _DECREMENT_TOLERANCE * at.value + 1e-4 * noise[active]) & (used <= 1e-2)
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
            | (current.value[active] <= 1e-8 * noise[active])
        )
        active = active[~finished]
    return _conclude(objective, theta, rows, current, noise, steps, active, lower, upper)


def _conclude(
    objective: Objective,
    theta: Array,
    rows: NDArray[np.intp],
    current: Evaluation,
    noise: Array,
    steps: NDArray[np.intp],
    unfinished: NDArray[np.intp],
    lower: Array,
    upper: Array,
) -> Minima:
    gradient, size, gram = objective.first_order(theta, rows)
    at_bound = _held(theta, gradient, lower, upper)
    with np.errstate(all="ignore"):
        relative = np.where(at_bound | (size == 0), 0.0, np.abs(gradient) / size)
    scaled = np.max(relative, axis=1, initial=0.0)
    done = np.ones(len(theta), dtype=bool)
    done[unfinished] = False
    exact = current.value <= noise
    converged = np.isfinite(current.value) & (exact | (done & (scaled <= _GRADIENT_TOLERANCE)))
    at_bound |= (theta <= lower) | (theta >= upper)
    return Minima(theta, current.value, converged, scaled, at_bound, gram, steps)


def _take(evaluation: Evaluation, index: NDArray[np.intp]) -> Evaluation:
    return Evaluation(
        evaluation.value[index],
        evaluation.gradient[index],
        evaluation.hessian[index],
        evaluation.majorizer[index],
    )


def _held(theta: Array, gradient: Array, lower: Array, upper: Array) -> NDArray[np.bool_]:
    """Parameters at a bound whose gradient pushes further out: the step leaves them where they are."""
    return ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))


def _steps(
    theta: Array, at: Evaluation, damping: Array, lower: Array, upper: Array
) -> tuple[Array, Array, Array, Array]:
    """Steps s (b, p) within the bounds, the damping that was needed (b,), s . (H + damping M) s and s . H s, each (b,).

    A parameter whose step would leave its bounds is put on the bound, and the others are solved for again with it
    there: merely clipping a Newton step can turn it uphill.
    """
    diagonal = np.arange(theta.shape[1])
    # In a direction that the data do not determine both H and M are singular: a hair of ridge keeps the system solvable.
    scale = np.maximum(at.majorizer[:, diagonal, diagonal], np.finfo(np.float64).tiny)
    damping = damping.copy()
    step = np.zeros_like(theta)
    fixed = _held(theta, at.gradient, lower, upper)
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
        # Not positive definite: more of M, at no cost in evaluations.
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
    """Solves A x = b for symmetric A (b, p, p) by Cholesky, across the batch; second result: A was positive definite.

    Each operation runs over the whole batch, which for p of 3 to 9 is far faster than one LAPACK call a matrix.
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
