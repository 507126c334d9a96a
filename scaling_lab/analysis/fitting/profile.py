"""Profile-likelihood intervals of parameters and of the frontier's exponents.

The profile of a quantity q is f(q), the minimum of the objective over all parameters with that q. The interval contains
the q at which f exceeds its minimum by less than a threshold (`fitting.scale`). Unlike a standard error it follows curved
and asymmetric valleys of the objective.

Observations are assumed to be independent: with several points per run, use the bootstrap by run instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.fitting.fit import (
    DEFAULT_HUBER_DELTA,
    make_objective,
    objective_scale,
)
from scaling_lab.analysis.fitting.newton import minimize
from scaling_lab.analysis.fitting.objective import Objective, ObjectiveName
from scaling_lab.analysis.fitting.scale import SCALES, ScaleName, objective_rise
from scaling_lab.analysis.fitting.search import Starts, resolve_starts, solve_starts
from scaling_lab.analysis.fitting.status import assess_minima
from scaling_lab.analysis.laws.base import LawInputs, LossLaw
from scaling_lab.core.errors import UserError, unknown

FRONTIER_QUANTITIES = ("params_exponent", "tokens_exponent")

# The penalty that keeps q near its target is this many times stiffer than the profile itself.
_STIFFNESS = 100.0
# A side is unbounded if the profile has not reached the threshold at this many expected half-widths ...
_MAX_HALF_WIDTHS = 100.0
# ... or if a step covers less than a twentieth of the requested distance this many times in a row.
_MAX_STALLED = 4
# Maximum number of outward steps on a side, and of steps that refine a crossing.
_MARCH_STEPS = 60
_REFINE_STEPS = 6


@dataclass(frozen=True)
class ProfileInterval:
    """The profile of one quantity. `lo` or `hi` is None if the data do not bound it on that side (`message` says so)."""

    quantity: str
    level: float
    estimate: float
    lo: float | None
    hi: float | None
    scale: ScaleName
    threshold: float
    """Rise of the objective (in its own units) at the ends of the interval."""
    values: Array
    """Profiled values of the quantity, ascending."""
    rises: Array
    """Objective minus its minimum, at `values`."""
    message: str


_IN_SENTENCE = {"params_exponent": "the exponent of N", "tokens_exponent": "the exponent of D"}


@dataclass(frozen=True)
class _Quantity:
    """A scalar function of the internal parameters, with gradients from central differences; its log if `logarithmic`."""

    law: LossLaw
    inputs: LawInputs
    name: str
    logarithmic: bool

    def __call__(self, theta: Array) -> Array:
        natural = self.law.to_natural(theta, self.inputs)
        if self.name in natural:
            value = np.asarray(natural[self.name])
            return np.log(value) if self.logarithmic else value
        optimum = self.law.frontier(natural)
        return np.asarray(getattr(optimum, self.name), dtype=np.float64)

    def gradient(self, theta: Array) -> Array:
        out = np.empty_like(theta)
        for j in range(theta.shape[1]):
            h = np.zeros(theta.shape[1])
            h[j] = 1e-6
            out[:, j] = (self(theta + h) - self(theta - h)) / 2e-6
        return out

    def from_log(self, value: Any) -> Any:
        """The quantity itself, from the value that is profiled."""
        return np.exp(value) if self.logarithmic else value


@dataclass(frozen=True)
class _QuadraticPenalty:
    """The penalty stiffness/2 (q - target)^2. Every minimum with the penalty is a point of the profile, at its own q."""

    quantities: Sequence[_Quantity]
    kinds: NDArray[np.intp]
    targets: Array
    stiffness: Array

    def __call__(self, theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        value, gradient = np.empty(len(theta)), np.empty_like(theta)
        for k in np.unique(self.kinds[rows]):
            here = self.kinds[rows] == k
            quantity = self.quantities[k]
            value[here] = quantity(theta[here]) - self.targets[rows][here]
            gradient[here] = quantity.gradient(theta[here])
        c = self.stiffness[rows]
        hessian = c[:, None, None] * gradient[:, :, None] * gradient[:, None, :]
        return 0.5 * c * value**2, (c * value)[:, None] * gradient, hessian


def profile_intervals(
    law: LossLaw,
    data: Any,
    quantities: Sequence[str] | None = None,
    level: float = 0.9,
    *,
    loss_nats: Any = None,
    weights: Any = None,
    huber_delta: float = DEFAULT_HUBER_DELTA,
    objective: ObjectiveName = "huber_log",
    scale: ScaleName = "robust",
    starts: Starts | None = None,
) -> list[ProfileInterval]:
    """Profile intervals of several quantities, traced in lockstep.

    Args:
        quantities: parameters of the law, `params_exponent` or `tokens_exponent` (if the frontier has a closed form);
            by default all of them.
        level: nominal coverage, in (0, 1).
        scale: how the noise scale is estimated (see `fitting.scale`).
        starts: starts of the fit, as in `fitting.fit` (passing the fitted parameters skips the search).

    Raises:
        UserError: an unknown quantity or scale, a level outside (0, 1), or as in `fitting.fit`.
    """
    if not 0 < level < 1:
        raise UserError(f"level={level!r} must be in (0, 1).")
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    has_frontier = law.frontier(law.example) is not None
    known = law.parameters + (FRONTIER_QUANTITIES if has_frontier else ())
    names = list(known) if quantities is None else list(quantities)
    for name in names:
        if name not in known:
            raise unknown("quantity", name, known)
    problem, _ = make_objective(law, data, loss_nats, weights, huber_delta, objective)
    theta = resolve_starts(law, problem.inputs, starts, problem.log_loss[0])
    minima = solve_starts(problem, theta, 200)
    best = int(np.argmin(minima.value))
    one = np.zeros(1, dtype=np.intp)
    (status,), (sentence,) = assess_minima(problem, minima, one + best, one, 1, one + 1)
    functions = [_Quantity(law, problem.inputs, n, n in law.log_scaled) for n in names]
    optimum = minima.theta[best : best + 1]
    estimates = [float(q.from_log(q(optimum)[0])) for q in functions]
    if status not in ("converged", "at_bound"):
        empty = np.empty(0)
        return [
            ProfileInterval(n, level, e, None, None, scale, np.nan, empty, empty, sentence)
            for n, e in zip(names, estimates)
        ]
    threshold = objective_rise(problem, optimum, float(minima.value[best]), level, scale)
    if not threshold > 0:
        sentence = "The law fits these observations exactly: without noise there is no scale for an interval."
        return [
            ProfileInterval(n, level, e, e, e, scale, 0.0, np.array([e]), np.zeros(1), sentence)
            for n, e in zip(names, estimates)
        ]
    traces = _trace(problem, functions, optimum[0], float(minima.value[best]), threshold)
    unit = objective_scale(problem)
    return [
        _interval(q, level, e, scale, threshold, unit, *trace)
        for q, e, trace in zip(functions, estimates, traces)
    ]


def _interval(
    quantity: _Quantity,
    level: float,
    estimate: float,
    scale: ScaleName,
    threshold: float,
    unit: float,
    values: Array,
    rises: Array,
) -> ProfileInterval:
    """The interval between the crossings of the threshold, interpolated in the square root of the rise."""
    middle = int(np.argmin(rises))
    ends: list[float | None] = []
    for side in (slice(middle, None, -1), slice(middle, None)):
        q, root = values[side], np.sqrt(np.maximum(rises[side], 0.0))
        over = np.flatnonzero(root >= np.sqrt(threshold))
        if not len(over):
            ends.append(None)
            continue
        i = int(over[0])
        t = (np.sqrt(threshold) - root[i - 1]) / (root[i] - root[i - 1])
        ends.append(float(quantity.from_log(q[i - 1] + t * (q[i] - q[i - 1]))))
    missing = [side for side, end in zip(("below", "above"), ends) if end is None]
    message = "Profile interval with a fitted noise scale."
    if missing:
        name = _IN_SENTENCE.get(quantity.name, quantity.name)
        message = f"These data do not bound {name} from {' or '.join(missing)}."
    return ProfileInterval(
        quantity.name,
        level,
        estimate,
        ends[0],
        ends[1],
        scale,
        threshold * unit,
        quantity.from_log(values),
        rises * unit,
        message,
    )


def _trace(
    problem: Objective, functions: Sequence[_Quantity], optimum: Array, lowest: float, threshold: float
) -> list[tuple[Array, Array]]:
    """Profiles of all quantities, in both directions and in lockstep: (ascending values, rises) for each."""
    count = len(functions)
    kinds = np.tile(np.arange(count), 2)
    signs = np.repeat([-1.0, 1.0], count)
    center = np.array([q(optimum[None])[0] for q in functions])[kinds]
    width = np.array([_expected_half_width(problem, q, optimum, threshold) for q in functions])[kinds]
    stiffness = _STIFFNESS * 2.0 * threshold / width**2
    theta = np.tile(optimum, (2 * count, 1))
    points: list[list[tuple[float, float, Array]]] = [[(c, 0.0, optimum)] for c in center]
    step = width / 4
    targets = center.copy()
    marching = np.ones(2 * count, dtype=bool)
    stalled = np.zeros(2 * count, dtype=int)
    for _ in range(_MARCH_STEPS):
        rows = np.flatnonzero(marching)
        if not len(rows):
            break
        targets[rows] = [points[r][-1][0] + signs[r] * step[r] for r in rows]
        theta[rows], values, rises = _solve_at(
            problem, functions, kinds, targets, stiffness, theta, rows, lowest
        )
        for r, value, rise in zip(rows, values, rises):
            grew = rise - points[r][-1][1]
            moved = signs[r] * (value - points[r][-1][0])
            stalled[r] = stalled[r] + 1 if moved < 0.05 * step[r] else 0
            if (
                not (np.isfinite(rise) and np.isfinite(value) and moved > 1e-9 * width[r])
                or stalled[r] == _MAX_STALLED
            ):
                marching[r] = False  # at a bound of the law, or in a valley too flat to follow
                continue
            points[r].append((value, rise, theta[r].copy()))
            if rise >= 1.05 * threshold or signs[r] * (value - center[r]) > _MAX_HALF_WIDTHS * width[r]:
                marching[r] = False
            elif grew < threshold / 20:
                step[r] *= 2.0
                stiffness[r] /= 2.0
    _refine(problem, functions, kinds, stiffness, points, threshold, lowest)
    traces = []
    for k in range(count):
        merged = {round(p[0] / width[k], 9): p for p in points[k] + points[k + count]}
        ordered = [merged[key] for key in sorted(merged)]
        traces.append((np.array([p[0] for p in ordered]), np.array([p[1] for p in ordered])))
    return traces


def _refine(
    problem: Objective,
    functions: Sequence[_Quantity],
    kinds: NDArray[np.intp],
    stiffness: Array,
    points: list[list[tuple[float, float, Array]]],
    threshold: float,
    lowest: float,
) -> None:
    """Add points near each crossing of the threshold, because the profile of a near-L1 objective has kinks."""
    targets = np.zeros(len(points))
    theta = np.stack([p[0][2] for p in points])
    for odd in (False, True) * (_REFINE_STEPS // 2):
        rows = []
        for r, trace in enumerate(points):
            over = [i for i, p in enumerate(trace) if p[1] >= threshold]
            if not over or abs(trace[over[0]][1] / threshold - 1) < 1e-3:
                continue
            before, after = trace[over[0] - 1], trace[over[0]]
            root = np.sqrt(np.maximum([before[1], threshold, after[1]], 0.0))
            # Interpolation alone may approach from one side only, so every second point bisects the bracket.
            share = 0.5 if odd else np.clip((root[1] - root[0]) / (root[2] - root[0]), 0.05, 0.95)
            targets[r] = before[0] + share * (after[0] - before[0])
            theta[r] = before[2] if share < 0.5 else after[2]
            rows.append(r)
        if not rows:
            return
        index = np.array(rows)
        found, values, rises = _solve_at(problem, functions, kinds, targets, stiffness, theta, index, lowest)
        for r, t, value, rise in zip(rows, found, values, rises):
            if np.isfinite(rise) and np.isfinite(value):
                points[r].append((value, rise, t.copy()))
                points[r].sort(key=lambda p, c=points[r][0][0]: abs(p[0] - c))  # type: ignore[misc]


def _solve_at(
    problem: Objective,
    functions: Sequence[_Quantity],
    kinds: NDArray[np.intp],
    targets: Array,
    stiffness: Array,
    theta: Array,
    rows: NDArray[np.intp],
    lowest: float,
) -> tuple[Array, Array, Array]:
    """Profile points near `targets` for the traces `rows`: theta, the quantity there, and the rise of the objective."""
    penalty_term = _QuadraticPenalty(functions, kinds[rows], targets[rows], stiffness[rows])
    penalized = replace(problem, penalty=penalty_term)
    index = np.arange(len(rows))
    minima = minimize(penalized, theta[rows], index, max_steps=100)
    penalty = penalty_term(minima.theta, index)[0]
    values = np.array([functions[kinds[r]](minima.theta[i : i + 1])[0] for i, r in enumerate(rows)])
    return minima.theta, values, minima.value - penalty - lowest


def _expected_half_width(problem: Objective, quantity: _Quantity, optimum: Array, threshold: float) -> float:
    """Approximate half-width of the interval from the curvature at the optimum; the outward steps adapt to errors in it."""
    at = problem.evaluate(optimum[None], np.zeros(1, dtype=np.intp))
    curvature = at.majorizer[0]
    size = np.sqrt(np.maximum(np.diag(curvature), np.finfo(np.float64).tiny))
    values, vectors = np.linalg.eigh(curvature / np.outer(size, size))
    direction = vectors.T @ (quantity.gradient(optimum[None])[0] / size)
    variance = float(np.sum(direction**2 / np.maximum(values, 1e-12)))
    return float(np.sqrt(2.0 * threshold * max(variance, 1e-20)))
