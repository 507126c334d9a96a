"""Fit a law to observations: one fit from many starts, or a batch of fits (all bootstrap resamples at once).

    result = fit(get_law("chinchilla"), {"n_params": n, "n_tokens": d}, loss_nats=loss)
    batch = fit_many(law, data, loss_nats=loss, weights=counts)      # counts (B, n): one resample per row

The result is the lowest local minimum over all starts, with a status and a sentence that explains it. First-order
optimality is checked by a scale-free test (`fitting.newton`). The objective is defined in `fitting.objective`, profile
intervals in `fitting.profile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array, FitResult, FitStatus
from scaling_lab.analysis.fitting.newton import minimize
from scaling_lab.analysis.fitting.objective import OBJECTIVES, Objective, ObjectiveName, Penalty
from scaling_lab.analysis.fitting.search import Starts, distinct_minima, resolve_starts, solve_starts
from scaling_lab.analysis.fitting.status import assess_minima
from scaling_lab.analysis.laws.base import ComputeOptimum, LossLaw, read_column
from scaling_lab.core.errors import UserError, unknown

# Hoffmann et al. 2022 (arXiv 2203.15556, eq. 3) use delta = 1e-3.
DEFAULT_HUBER_DELTA = 1e-3
# Two starts reached the same minimum if their objectives agree to this fraction.
AGREEMENT = 1e-6
# Number of starts for the second attempt at batch members that did not converge.
_RETRY_STARTS = 20
# Number of (problem, start) pairs minimized in lockstep: limits memory.
_BLOCK_SIZE = 20_000


@dataclass(frozen=True)
class FitBatch:
    """B fits of one law to the same columns."""

    law: LossLaw
    parameters: Mapping[str, Array]
    """Natural parameters by name, (B,) each."""
    objective: Array
    """(B,): sum over points, as in `FitResult`, with the weights of each problem."""
    status: NDArray[np.str_]
    """(B,): values of `FitStatus`."""
    messages: tuple[str, ...]
    starts_tried: int
    """Starts per problem (a problem that did not converge was given a few more)."""
    starts_agreeing: NDArray[np.intp]
    """(B,): starts whose objective equals the best one to `AGREEMENT`."""
    scaled_gradient: Array
    """(B,): the largest gradient component relative to its size before cancellation; first-order optimal if tiny."""

    def __len__(self) -> int:
        return len(self.objective)

    @property
    def reached(self) -> NDArray[np.bool_]:
        """(B,): whether the fit reached a minimum that the data determine (it converged, possibly at a bound)."""
        return np.isin(self.status, [FitStatus.CONVERGED, FitStatus.AT_BOUND, FitStatus.STARTS_DISAGREE])

    def counts(self) -> dict[str, int]:
        """Number of fits with each status."""
        names, counts = np.unique(self.status, return_counts=True)
        return {str(k): int(v) for k, v in zip(names, counts)}

    def frontier(self) -> ComputeOptimum | None:
        """Closed-form frontier coefficients, arrays (B,); None if the law has none."""
        return self.law.frontier(self.parameters)


def fit(
    law: LossLaw,
    data: Any,
    *,
    loss_nats: Any = None,
    weights: Any = None,
    huber_delta: float = DEFAULT_HUBER_DELTA,
    objective: ObjectiveName = "huber_log",
    starts: Starts | None = None,
    max_steps: int = 200,
) -> FitResult:
    """Fit `law` to observations, from all its starts at once.

    Args:
        law: a law of `scaling_lab.analysis.laws`.
        data: mapping, table or `Observations` with the law's columns, each (n,), in any unit.
        loss_nats: (n,) losses in nats per token; by default the column `loss_nats` of `data`.
        weights: (n,) nonnegative; 1 by default.
        huber_delta: half-width of the quadratic part of the Huber function, in ln L.
        objective: `huber_log`, `mse_log` or `mse` (see `fitting.objective`).
        starts: natural parameters (a mapping of scalars or arrays, or a list of mappings) or internal ones (S, p); by
            default the law's own starts.
        max_steps: maximum number of steps of the minimizer.

    Raises:
        UserError: a column is missing, has the wrong length, or is not positive; an unknown objective.
    """
    problem, loss = make_objective(law, data, loss_nats, weights, huber_delta, objective)
    theta = resolve_starts(law, problem.inputs, starts, problem.log_loss[0])
    minima = solve_starts(problem, theta, max_steps)
    best = int(np.argmin(np.where(np.isfinite(minima.value), minima.value, np.inf)))
    agreeing = int(np.count_nonzero(_agree(minima.value, minima.value[best], problem.total_weight[0])))
    one = np.zeros(1, dtype=np.intp)
    status, message = assess_minima(problem, minima, one + best, one, len(theta), one + agreeing)
    log_fit, _ = law.evaluate(minima.theta[best : best + 1], problem.inputs)
    return FitResult(
        law=law.name,
        parameters={k: float(v) for k, v in law.to_natural(minima.theta[best], problem.inputs).items()},
        objective=float(minima.value[best] * objective_scale(problem)),
        n_observations=len(loss),
        residuals_log=log_fit[0] + problem.inputs.log_loss_center - np.log(loss),
        status=FitStatus(status[0]),
        message=message[0],
        starts_tried=len(theta),
        starts_agreeing=agreeing,
    )


def fit_many(
    law: LossLaw,
    data: Any,
    *,
    loss_nats: Any = None,
    weights: Any = None,
    huber_delta: float = DEFAULT_HUBER_DELTA,
    objective: ObjectiveName = "huber_log",
    starts: Starts | None = None,
    max_steps: int = 200,
) -> FitBatch:
    """Fit `law` with B sets of weights (bootstrap resamples, folds) or to B sets of losses at the same columns, in one pass.

    Args:
        loss_nats: (n,), or (B, n) for simulated losses.
        weights: (n,) or (B, n), nonnegative; see `weights_from_indices` for index matrices.
        starts: as in `fit`, shared by all problems. By default the best few distinct minima of the problem with unit
            weights and the (geometric) mean loss, found from all the law's starts. Each problem keeps its best result.

    Raises:
        UserError: as in `fit`, or shapes that do not match.
    """
    problem, _ = make_objective(law, data, loss_nats, weights, huber_delta, objective)
    count = max(len(problem.weights), len(problem.log_loss))
    if starts is None:
        theta = distinct_minima(problem, max_steps)
    else:
        theta = resolve_starts(law, problem.inputs, starts, problem.log_loss.mean(axis=0))
    retry_starts = law.starts(problem.inputs, problem.log_loss.mean(axis=0))
    retry_starts = retry_starts[:: max(1, len(retry_starts) // _RETRY_STARTS)]
    s = len(theta)
    block = max(1, _BLOCK_SIZE // s)
    parts = [np.arange(i, min(i + block, count)) for i in range(0, count, block)]
    pieces = [
        _retry_failed(problem, _solve_block(problem, theta, part, max_steps), part, retry_starts, max_steps)
        for part in parts
    ]
    natural = law.to_natural(np.concatenate([p.theta for p in pieces]), problem.inputs)
    return FitBatch(
        law=law,
        parameters=natural,
        objective=np.concatenate([p.value for p in pieces]) * objective_scale(problem),
        status=np.concatenate([p.status for p in pieces]),
        messages=tuple(m for p in pieces for m in p.messages),
        starts_tried=s,
        starts_agreeing=np.concatenate([p.agreeing for p in pieces]),
        scaled_gradient=np.concatenate([p.scaled_gradient for p in pieces]),
    )


def weights_from_indices(indices: Any, n_observations: int) -> NDArray[np.uint16]:
    """Weights for `fit_many`: the counts (B, n) of resampled row indices (B, m)."""
    indices = np.atleast_2d(np.asarray(indices))
    offsets = np.arange(len(indices))[:, None] * n_observations
    flat = np.bincount((indices + offsets).ravel(), minlength=len(indices) * n_observations)
    return flat.reshape(len(indices), n_observations).astype(np.uint16)


# -- building blocks, shared with fitting.profile ------------------------------------------------------------------------
def make_objective(
    law: LossLaw,
    data: Any,
    loss_nats: Any,
    weights: Any,
    huber_delta: float,
    objective: ObjectiveName,
    penalty: Penalty | None = None,
) -> tuple[Objective, Array]:
    """Check and center the data. Also returns the losses as given (the first row if there are several)."""
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if not (np.isfinite(huber_delta) and huber_delta > 0):
        raise UserError(f"huber_delta={huber_delta!r} must be positive.")
    loss = (
        read_column(data, "loss_nats", "the fit")
        if loss_nats is None
        else np.asarray(loss_nats, dtype=np.float64)
    )
    if loss.ndim not in (1, 2) or not loss.size or not np.all(np.isfinite(loss) & (loss > 0)):
        raise UserError("loss_nats must be a non-empty array of finite, positive losses (nats per token).")
    inputs = law.prepare(data, loss)
    n = inputs.n_observations
    w = np.ones((1, n)) if weights is None else np.atleast_2d(np.asarray(weights))
    if w.ndim != 2 or w.shape[1] != n or not np.all(np.isfinite(w) & (w >= 0)):
        raise UserError(
            f"weights must be finite, nonnegative and of shape ({n},) or (B, {n}), got shape {w.shape}."
        )
    log_loss = np.atleast_2d(np.log(loss)) - inputs.log_loss_center
    if len(w) > 1 and len(log_loss) > 1 and len(w) != len(log_loss):
        raise UserError(
            f"weights have {len(w)} rows and loss_nats {len(log_loss)}: the numbers must match, or one must be 1."
        )
    return Objective(law, inputs, log_loss, w, objective, float(huber_delta), penalty), np.atleast_2d(loss)[0]


def objective_scale(problem: Objective) -> float:
    """Factor from internal units of the objective to those of the caller: linear losses were divided by exp(log_loss_center)."""
    return float(np.exp(2.0 * problem.inputs.log_loss_center)) if problem.kind == "mse" else 1.0


# -- private -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _BlockFit:
    theta: Array
    value: Array
    status: NDArray[np.str_]
    messages: list[str]
    agreeing: NDArray[np.intp]
    scaled_gradient: Array


def _solve_block(problem: Objective, starts: Array, rows: NDArray[np.intp], max_steps: int) -> _BlockFit:
    """Fit the problems `rows`, each from every start, and keep the best result of each."""
    s = len(starts)
    minima = minimize(problem, np.tile(starts, (len(rows), 1)), np.repeat(rows, s), max_steps)
    values = minima.value.reshape(len(rows), s)
    best = np.argmin(values, axis=1)
    flat = np.arange(len(rows)) * s + best
    total = problem.total_weight if len(problem.weights) == 1 else problem.total_weight[rows]
    agreeing = np.count_nonzero(
        _agree(values, minima.value[flat][:, None], np.reshape(total, (-1, 1))), axis=1
    )
    # The starts of a batch are known minima, not a global search: one start that reaches the best is enough.
    status, messages = assess_minima(problem, minima, flat, rows, 1, agreeing)
    return _BlockFit(
        theta=minima.theta[flat],
        value=minima.value[flat],
        status=status,
        messages=messages,
        agreeing=agreeing,
        scaled_gradient=minima.scaled_gradient[flat],
    )


def _retry_failed(
    problem: Objective, block: _BlockFit, rows: NDArray[np.intp], starts: Array, max_steps: int
) -> _BlockFit:
    """Fit the problems that did not converge again, from starts spread over the whole range of the law."""
    failed = np.flatnonzero(block.status == FitStatus.MAX_STEPS.value)
    if not len(failed):
        return block
    again = _solve_block(problem, starts, rows[failed], max_steps)
    for k in np.flatnonzero(again.value <= block.value[failed] * (1.0 + AGREEMENT)):
        i = failed[k]
        for name in ("theta", "value", "status", "messages", "agreeing", "scaled_gradient"):
            getattr(block, name)[i] = getattr(again, name)[k]
    return block


def _agree(values: Array, best: Any, total_weight: Any) -> NDArray[np.bool_]:
    """Whether objectives equal the best one to AGREEMENT, or both are zero up to rounding (noise-free data)."""
    return values <= best * (1.0 + AGREEMENT) + 1e-20 * total_weight
