"""Predictions from a fitted frontier and its band: N, D and loss at a budget; and the backtest, which predicts the largest
budget from the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches import IsoFlop, Parametric
from scaling_lab.analysis.approaches.law_frontier import law_columns
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, BudgetOptimum, BudgetStatus, Estimate, Interval
from scaling_lab.analysis.frontiers import at_compute
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.bootstrap import Approach, BootstrapSettings, bootstrap

# Fewer resamples suffice for a backtest, whose intervals are only a check.
_BACKTEST_RESAMPLES = 400
_HELD_OUT_RUNS = 3
_POINTS_FOR_A_FLOOR = 3
# Up to this factor outside the range of the frontier, compute still counts as inside.
_NEARBY = 1.2


@dataclass(frozen=True)
class Quantity:
    """An estimate and its interval at the level of the band (None if there is none)."""

    estimate: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Prediction:
    """The compute-optimal run at a budget, as predicted by one approach."""

    approach: str
    compute_flops: float
    params_opt: Quantity
    tokens_opt: Quantity
    tokens_per_param: Quantity
    loss_opt: Quantity | None
    extrapolation_factor: float
    """Distance beyond the range of the frontier: C over its largest C (or its smallest C over C); 1 inside."""


@dataclass(frozen=True)
class Backtest:
    """The prediction of an approach for the largest budget, made without it, and the observed result."""

    approach: str
    budget_flops: float
    n_held_out: int
    predicted: Prediction | None
    observed: BudgetOptimum
    best_sampled_loss_nats: float
    loss_rms_log: float | None
    """Root mean square of ln predicted - ln observed over the held-out runs (parametric only)."""
    message: str


def predict(estimate: Estimate, band: Band | None, compute_flops: float) -> Prediction | None:
    """The optimum at `compute_flops` with intervals; None if the approach has no frontier."""
    frontier = estimate.frontier
    if frontier is None:
        return None
    lo, hi = frontier.compute_range_flops
    samples: dict[str, Array] = {}
    if band is not None and band.samples:
        samples = at_compute(band.samples, compute_flops)

    def quantity(name: str, value: float) -> Quantity:
        return Quantity(value, replace(band, samples=samples).interval(name) if band is not None else None)

    n, d = float(frontier.params(compute_flops)), float(frontier.tokens(compute_flops))
    outside = max(1.0, compute_flops / hi, lo / compute_flops)
    # Two losses do not determine a floor: a power law through them is valid only between them.
    no_floor = frontier.compute_flops.size < _POINTS_FOR_A_FLOOR and outside > _NEARBY
    loss = None
    if frontier.loss is not None and not no_floor:
        loss = quantity("loss_opt", float(frontier.loss(compute_flops)))
    # An absurd exponent far outside the data underflows to N = 0.
    tokens_per_param = d / n if n > 0 else math.inf
    return Prediction(
        estimate.approach,
        compute_flops,
        quantity("params_opt", n),
        quantity("tokens_opt", d),
        quantity("tokens_per_param", tokens_per_param),
        loss,
        outside,
    )


def backtest(
    approaches: Sequence[Approach],
    observations: Observations,
    settings: BootstrapSettings,
    seed: int,
    weights: Array | None = None,
) -> tuple[Backtest, ...]:
    """Fit without the largest budget, predict its optimum and loss, and compare. Empty if there is only one budget."""
    held_out = largest_budget(observations)
    if held_out is None:
        return ()
    budget, runs = held_out
    train = observations.runs(~runs)
    if train.n_points == 0:
        return ()
    test = observations.runs(runs)
    train_weights = None if weights is None else weights[~runs[observations.run_index]]
    resampling = replace(settings, resamples=min(settings.resamples, _BACKTEST_RESAMPLES))
    isoflop = next((a for a in approaches if isinstance(a, IsoFlop)), IsoFlop())
    observed = _observed(isoflop, test, budget)
    best = float(test.loss_nats.min())
    out = []
    for approach in approaches:
        estimate = approach.estimate(train, train_weights)
        band = bootstrap(approach, train, estimate, resampling, seed, train_weights)
        rms = _held_out_error(approach, estimate, test)
        at = observed.budget_flops
        prediction = predict(estimate, band, at)
        message = _sentence(estimate, prediction, observed, best)
        out.append(Backtest(approach.name, at, test.n_runs, prediction, observed, best, rms, message))
    return tuple(out)


def largest_budget(observations: Observations) -> tuple[float, NDArray[np.bool_]] | None:
    """The largest budget with at least three runs, and a mask (runs,) of the runs at or above it."""
    final = observations.final()
    budgets = final.with_budgets().budget_flops
    values, counts = np.unique(budgets, return_counts=True)
    enough = values[counts >= _HELD_OUT_RUNS]
    if values.size < 2 or enough.size == 0 or enough[-1] <= values[0]:
        return None
    mask = np.zeros(observations.n_runs, dtype=bool)
    mask[final.run_index[budgets >= enough[-1] * (1 - 1e-12)]] = True
    return float(enough[-1]), mask


def _observed(isoflop: IsoFlop, test: Observations, budget: float) -> BudgetOptimum:
    budgets = isoflop.estimate(test.final()).budgets
    return min(budgets, key=lambda b: abs(np.log(b.budget_flops / budget)))


def _held_out_error(approach: Approach, estimate: Estimate, test: Observations) -> float | None:
    if not isinstance(approach, Parametric) or not estimate.fits:
        return None
    law = approach.law
    predicted = np.asarray(law.loss_nats(estimate.fits[0].parameters, law_columns(test, law)))
    error = np.log(predicted) - np.log(test.loss_nats)
    return float(np.sqrt(np.mean(error**2)))


def _sentence(estimate: Estimate, prediction: Prediction | None, observed: BudgetOptimum, best: float) -> str:
    if prediction is None:
        return f"Without the largest budget: {estimate.message}"
    if prediction.loss_opt is None:
        return (
            f"Predicted N = {prediction.params_opt.estimate:.4g}. No loss is predicted, because two budgets do not determine"
            " its floor."
        )
    text = f"Predicted {prediction.loss_opt.estimate:.4f} nats; its best run reached {best:.4f}"
    interval = prediction.loss_opt.interval
    if interval is not None:
        inside = "inside" if interval.contains(best) else "outside"
        text += f" ({inside} {interval.lo:.4f} to {interval.hi:.4f})"
    if observed.loss_opt is not None:
        text += f"; the fitted minimum of its valley is {observed.loss_opt:.4f}"
    text += f"; {prediction.extrapolation_factor:.3g} times beyond the fitted range."
    if observed.status is not BudgetStatus.OK:
        text += f" The valley of this budget has no minimum ({observed.status.value}), so its best sampled run is compared."
    return text
