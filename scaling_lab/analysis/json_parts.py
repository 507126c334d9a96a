"""Estimates, intervals and predictions as plain data, as they stand in analysis.json."""

from __future__ import annotations

import math
from typing import Any

from scaling_lab.analysis.estimate import BudgetOptimum, Estimate, Interval
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.prediction import Prediction, Quantity

_FRONTIER_QUANTITIES = ("params_exponent", "tokens_exponent")


def number(value: Any) -> float | None:
    """A finite float, or None."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def interval_json(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [number(interval.lo), number(interval.hi)]


def quantity_json(quantity: Quantity | None) -> dict[str, Any]:
    if quantity is None:
        return {"estimate": None, "interval": None}
    return {"estimate": number(quantity.estimate), "interval": interval_json(quantity.interval)}


def estimate_json(
    estimate: Estimate, band: Band, at_mean: Prediction | None, mean_compute_flops: float
) -> dict[str, Any]:
    """One approach's estimate with its intervals, and its optimum at the mean compute."""
    f = estimate.frontier
    fit = estimate.fits[0] if estimate.fits else None
    return {
        "approach": estimate.approach,
        "law": estimate.law,
        "status": estimate.status.value,
        "message": estimate.message,
        "params_exponent": number(f.params.exponent) if f else None,
        "params_coefficient": number(f.params.coefficient) if f else None,
        "tokens_exponent": number(f.tokens.exponent) if f else None,
        "tokens_coefficient": number(f.tokens.coefficient) if f else None,
        "compute_range_flops": [number(c) for c in f.compute_range_flops] if f else None,
        "at_mean_compute": {
            "compute_flops": mean_compute_flops,
            "params_opt": quantity_json(at_mean.params_opt if at_mean else None),
            "tokens_opt": quantity_json(at_mean.tokens_opt if at_mean else None),
            "loss_opt": quantity_json(at_mean.loss_opt if at_mean else None),
        },
        "loss_curve": {
            "floor_nats": number(f.loss.floor_nats),
            "coefficient": number(f.loss.coefficient),
            "exponent": number(f.loss.exponent),
        }
        if f and f.loss
        else None,
        "interval": _intervals(band),
        "standard_errors": _standard_errors(band),
        "parameters": {k: number(v) for k, v in fit.parameters.items()} if fit else None,
        "objective": number(fit.objective) if fit else None,
        "n_observations": fit.n_observations if fit else None,
        "starts_tried": fit.starts_tried if fit else None,
        "starts_agreeing": fit.starts_agreeing if fit else None,
        "budgets": [budget_json(b) for b in estimate.budgets],
        "diagnostics": list(estimate.diagnostics),
    }


def _parameter_names(band: Band) -> list[str]:
    """The law's own parameters among the band's quantities, by their names in the law."""
    internal = ("params_", "tokens_", "loss_")
    return [name for name in band.samples if not name.startswith(internal)]


def _intervals(band: Band) -> dict[str, Any]:
    names = (*_FRONTIER_QUANTITIES, *_parameter_names(band))
    return {
        "level": band.level,
        "unit": band.unit,
        "method": band.method,
        "resamples": band.requested,
        "failed": band.failed,
        "seed": band.seed,
        "message": band.message,
        **{name: interval_json(band.interval(name)) for name in names},
    }


def _standard_errors(band: Band) -> dict[str, Any]:
    names = (*_FRONTIER_QUANTITIES, *_parameter_names(band))
    return {"method": band.method, **{name: number(band.standard_error(name)) for name in names}}


def budget_json(budget: BudgetOptimum) -> dict[str, Any]:
    """The valley of one IsoFLOP budget."""
    return {
        "budget_flops": budget.budget_flops,
        "n_runs": budget.n_runs,
        "params_opt": number(budget.params_opt),
        "tokens_opt": number(budget.tokens_opt),
        "loss_opt": number(budget.loss_opt),
        "status": budget.status.value,
        "message": budget.message,
    }


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """The compute-optimal run at a budget, as one approach predicts it."""
    return {
        "approach": prediction.approach,
        "compute_flops": prediction.compute_flops,
        "params_opt": quantity_json(prediction.params_opt),
        "tokens_opt": quantity_json(prediction.tokens_opt),
        "tokens_per_param": quantity_json(prediction.tokens_per_param),
        "loss_opt": quantity_json(prediction.loss_opt),
        "extrapolation_factor": number(prediction.extrapolation_factor),
    }
