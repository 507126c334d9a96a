"""Global search: starting points of a fit, and the distinct minima from which a batch of fits starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.fitting.newton import Minima, minimize
from scaling_lab.analysis.fitting.objective import Objective
from scaling_lab.analysis.laws.base import LawInputs, LossLaw
from scaling_lab.core.errors import UserError

# Starts that have not converged by then are on a plateau; only the best one is continued.
_START_STEPS = 60
# Each member of a batch starts from at most this many distinct minima of the unweighted problem ...
_MAX_MINIMA = 4
# ... without those whose log-likelihood, n ln(objective) with a fitted noise scale, is this far below the best:
# resampling n points changes the difference by about its square root, so such a minimum is the best in no resample.
# Points of one run are not independent, so n is capped.
_MAX_LOG_LIKELIHOOD_GAP = 25.0
_MAX_INDEPENDENT_POINTS = 100
# Longer tables are searched on a random sample of this many rows; its distinct minima are then refined on all rows.
_SEARCH_POINTS = 1000

Starts = Mapping[str, Any] | Sequence[Mapping[str, Any]] | Array


def resolve_starts(law: LossLaw, inputs: LawInputs, starts: Starts | None, log_loss: Array) -> Array:
    """Convert starts in any accepted form to finite internal parameters (S, p) within the bounds."""
    if starts is None:
        theta = law.starts(inputs, log_loss)
    elif isinstance(starts, np.ndarray):
        theta = np.atleast_2d(np.asarray(starts, dtype=np.float64))
    elif isinstance(starts, Mapping):
        theta = np.atleast_2d(law.from_natural(starts, inputs))
    else:
        theta = np.concatenate([np.atleast_2d(law.from_natural(s, inputs)) for s in starts])
    lower, upper = law.bounds(inputs)
    theta = theta[np.isfinite(theta).all(axis=1)]
    if not len(theta) or theta.shape[1] != len(lower):
        raise UserError(f"starts of law={law.name} need values of {', '.join(law.parameters)}.")
    return np.clip(theta, lower, upper)


def solve_starts(problem: Objective, theta: Array, max_steps: int) -> Minima:
    """Minimize problem 0 from all starts; the best one continues to `max_steps` if it has not converged."""
    if problem.inputs.n_observations > _SEARCH_POINTS and len(theta) > _MAX_MINIMA:
        return _search_on_sample(problem, theta, max_steps)
    minima = minimize(problem, theta, np.zeros(len(theta), dtype=np.intp), min(_START_STEPS, max_steps))
    best = int(np.argmin(minima.value))
    if minima.converged[best] or max_steps <= _START_STEPS:
        return minima
    last = minimize(problem, minima.theta[best : best + 1], np.zeros(1, dtype=np.intp), max_steps)
    for name in ("theta", "value", "converged", "scaled_gradient", "at_bound", "gram"):
        getattr(minima, name)[best] = getattr(last, name)[0]
    return minima


def _search_on_sample(problem: Objective, theta: Array, max_steps: int) -> Minima:
    """As `solve_starts`, but search on a sample of the rows. Each start gets the minimum of all rows that is reached from its
    minimum of the sample."""
    weighted = np.flatnonzero(problem.row(problem.weights, np.zeros(1, dtype=np.intp))[0])
    size = min(_SEARCH_POINTS, len(weighted))
    rows = np.sort(np.random.default_rng(0).choice(weighted, size, replace=False))
    sample = replace(
        problem,
        inputs=problem.inputs.take(rows),
        log_loss=problem.log_loss[:1, rows],
        weights=problem.weights[:1, rows],
    )
    found = solve_starts(sample, theta, max_steps)
    leaders, group = _group_starts(found, sample.total_weight[0])
    full = minimize(problem, found.theta[leaders], np.zeros(len(leaders), dtype=np.intp), max_steps)
    led = group >= 0
    minima = Minima(
        theta=found.theta,
        value=np.full(len(theta), np.inf),
        converged=np.zeros(len(theta), dtype=bool),
        scaled_gradient=found.scaled_gradient,
        at_bound=found.at_bound,
        gram=found.gram,
        steps=found.steps,
    )
    for name in ("theta", "value", "converged", "scaled_gradient", "at_bound", "gram"):
        getattr(minima, name)[led] = getattr(full, name)[group[led]]
    return minima


def _group_starts(minima: Minima, total_weight: float) -> tuple[list[int], NDArray[np.intp]]:
    """Indices of the best distinct minima, at most `_MAX_MINIMA`, and for each start which of them it reached (or -1)."""
    group = np.full(len(minima.value), -1, dtype=np.intp)
    leaders: list[int] = []
    for i in np.argsort(minima.value):
        if not np.isfinite(minima.value[i]):
            break
        if not leaders or minima.value[i] > minima.value[leaders[-1]] * (1.0 + 1e-6) + 1e-18 * total_weight:
            if len(leaders) == _MAX_MINIMA:
                break
            leaders.append(int(i))
        group[i] = len(leaders) - 1
    return leaders, group


def distinct_minima(problem: Objective, max_steps: int) -> Array:
    """The best distinct minima (at most `_MAX_MINIMA`) of the problem with unit weights and the mean log loss."""
    central = Objective(
        problem.law,
        problem.inputs,
        problem.log_loss.mean(axis=0, keepdims=True),
        np.ones((1, problem.inputs.n_observations)),
        problem.kind,
        problem.huber_delta,
    )
    theta = resolve_starts(problem.law, problem.inputs, None, central.log_loss[0])
    minima = solve_starts(central, theta, max_steps)
    order = np.argsort(np.where(minima.converged, minima.value, np.inf))
    if not minima.converged[order[0]]:
        return minima.theta[np.argsort(minima.value)[:_MAX_MINIMA]]
    rounding = 1e-18 * central.total_weight[0]
    points = min(problem.inputs.n_observations, _MAX_INDEPENDENT_POINTS)
    highest = minima.value[order[0]] * np.exp(_MAX_LOG_LIKELIHOOD_GAP / points) + rounding
    chosen = [int(order[0])]
    for i in order:
        if len(chosen) == _MAX_MINIMA or not (minima.converged[i] and minima.value[i] <= highest):
            break
        if minima.value[i] > minima.value[chosen[-1]] * (1.0 + 1e-4) + rounding:
            chosen.append(int(i))
    return minima.theta[chosen]
