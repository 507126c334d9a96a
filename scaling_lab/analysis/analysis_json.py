"""Owns analysis.json, the public format of an analysis: versioned, described by analysis.schema.json. Missing is null."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scaling_lab.analysis.approaches.isoflop.grid_bias import GridBias
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import BudgetOptimum, Estimate, Interval
from scaling_lab.analysis.inference.agreement import Agreement
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.law_comparison import HeldOutError, LawComparison
from scaling_lab.analysis.inference.prediction import Backtest, Prediction, Quantity
from scaling_lab.analysis.inference.profiles import Profile
from scaling_lab.analysis.inference.sensitivity import SensitivityRow
from scaling_lab.analysis.studies.known_floor import KnownFloor
from scaling_lab.analysis.studies.skills import Skills

if TYPE_CHECKING:
    from scaling_lab.analysis.analysis import Analysis

SCHEMA_VERSION = 1
# Of millions of bad rows so many are listed one by one; the count is always whole.
MAX_DROPPED_LISTED = 10_000

_FRONTIER_QUANTITIES = ("params_exponent", "tokens_exponent")


def to_json_dict(
    analysis: Analysis,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """The analysis as plain data, ready for `json.dumps(..., allow_nan=False)`; `source`: the path of a table."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "source": source,
        "versions": dict(versions) if versions is not None else default_versions(),
        "observations": _observations(analysis.observations, analysis.points.n_points),
        "estimates": [
            {
                **_estimate(e, b, p, analysis.mean_compute_flops),
                "profile": _profile(analysis.profile) if e.approach == "parametric" else None,
                "grid_bias": _grid_bias(analysis.grid_bias, e) if e.approach == "isoflop" else None,
            }
            for e, b, p in zip(analysis.estimates, analysis.bands, analysis.at_mean_compute)
        ],
        "agreement": _agreement(analysis.agreement),
        "sensitivity": [_sensitivity(row) for row in analysis.sensitivity],
        "backtest": [_backtest(row) for row in analysis.backtest],
        "predictions": [_prediction(p) for p in analysis.predictions],
        "skills": _skills(analysis.skills),
        "law_comparison": _law_comparison(analysis.law_comparison),
        "tuning": _tuning(analysis),
        "known_floor": _known_floor(analysis.known_floor),
    }


def _known_floor(known: KnownFloor | None) -> dict[str, Any] | None:
    if known is None:
        return None
    line = known.line
    return {
        "floor_nats": known.floor_nats,
        "fitted_nats": number(known.fitted_nats),
        "interval": None if known.interval is None else [number(end) for end in known.interval],
        "standard_error_nats": number(known.standard_error_nats),
        "standard_error_simulated": known.error_simulated,
        "z": number(known.z),
        "reducible": [
            {"compute_flops": c, "loss_nats": r}
            for c, r in zip(known.compute_flops.tolist(), known.reducible_nats.tolist())
        ],
        "line": None
        if line is None
        else {
            "exponent": line.exponent,
            "compute_range_flops": list(line.compute_range_flops),
            "n_points": line.n_points,
            "largest_deviation": line.largest_deviation,
            "curvature_per_decade": number(line.curvature_per_decade),
            "local_exponents": None if line.local_exponents is None else list(line.local_exponents),
        },
    }


def default_versions() -> dict[str, str]:
    """What computed the analysis."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("scaling-lab", "numpy", "scipy", "pandas"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def number(value: Any) -> float | None:
    """A finite float, or None."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def _pair(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [number(interval.lo), number(interval.hi)]


def _observations(obs: Observations, n_points: int) -> dict[str, Any]:
    return {
        "n_runs": obs.n_runs,
        "n_points": n_points,
        "n_rows": obs.n_points,
        "convention": obs.convention,
        "compute_range_flops": [float(obs.compute_flops.min()), float(obs.compute_flops.max())],
        "curves": obs.curves.kind,
        "n_dropped": len(obs.dropped),
        "dropped": [
            {"run_id": d.run_id, "row": d.row, "reason": d.reason} for d in obs.dropped[:MAX_DROPPED_LISTED]
        ],
        "units": {name: {"unit": u.name, "factor": u.factor} for name, u in obs.units.items()},
        "warnings": list(obs.warnings),
    }


def _estimate(e: Estimate, band: Band, at_mean: Prediction | None, mean_compute: float) -> dict[str, Any]:
    f = e.frontier
    fit = e.fits[0] if e.fits else None
    return {
        "approach": e.approach,
        "law": e.law,
        "status": e.status.value,
        "message": e.message,
        "params_exponent": number(f.params.exponent) if f else None,
        "params_coefficient": number(f.params.coefficient) if f else None,
        "tokens_exponent": number(f.tokens.exponent) if f else None,
        "tokens_coefficient": number(f.tokens.coefficient) if f else None,
        "compute_range_flops": [number(c) for c in f.compute_range_flops] if f else None,
        "at_mean_compute": {
            "compute_flops": mean_compute,
            "params_opt": _quantity(at_mean.params_opt if at_mean else None),
            "tokens_opt": _quantity(at_mean.tokens_opt if at_mean else None),
            "loss_opt": _quantity(at_mean.loss_opt if at_mean else None),
        },
        "loss_curve": {
            "floor_nats": number(f.loss.floor_nats),
            "coefficient": number(f.loss.coefficient),
            "exponent": number(f.loss.exponent),
        }
        if f and f.loss
        else None,
        "interval": _interval(band),
        "standard_errors": _standard_errors(band),
        "parameters": {k: number(v) for k, v in fit.parameters.items()} if fit else None,
        "objective": number(fit.objective) if fit else None,
        "n_observations": fit.n_observations if fit else None,
        "starts_tried": fit.starts_tried if fit else None,
        "starts_agreeing": fit.starts_agreeing if fit else None,
        "budgets": [_budget(b) for b in e.budgets],
        "diagnostics": list(e.diagnostics),
    }


def _quantity(q: Quantity | None) -> dict[str, Any]:
    if q is None:
        return {"estimate": None, "interval": None}
    return {"estimate": number(q.estimate), "interval": _pair(q.interval)}


def _parameter_names(band: Band) -> list[str]:
    """The law's own parameters among the band's quantities, by their names in the law."""
    internal = ("params_", "tokens_", "loss_")
    return [name for name in band.samples if not name.startswith(internal)]


def _interval(band: Band) -> dict[str, Any]:
    names = (*_FRONTIER_QUANTITIES, *_parameter_names(band))
    return {
        "level": band.level,
        "unit": band.unit,
        "method": band.method,
        "resamples": band.requested,
        "failed": band.failed,
        "seed": band.seed,
        "message": band.message,
        **{name: _pair(band.interval(name)) for name in names},
    }


def _standard_errors(band: Band) -> dict[str, Any]:
    names = (*_FRONTIER_QUANTITIES, *_parameter_names(band))
    return {"method": band.method, **{name: number(band.standard_error(name)) for name in names}}


def _profile(p: Profile | None) -> dict[str, Any] | None:
    if p is None:
        return None
    return {
        "method": "profile likelihood",
        "scale": p.scale,
        "level": p.level,
        "message": p.message,
        "intervals": {name: [number(ends.lo), number(ends.hi)] for name, ends in p.intervals.items()},
        "messages": {name: ends.message for name, ends in p.intervals.items() if ends.message},
    }


def _grid_bias(bias: GridBias | None, isoflop: Estimate) -> dict[str, Any] | None:
    if bias is None:
        return None
    return {
        "law": bias.law,
        "compute_flops": bias.compute_flops,
        "params_exponent": number(bias.params_exponent),
        "tokens_exponent": number(bias.tokens_exponent),
        "log_params_opt": number(bias.log_params_opt),
        "corrected": {name: number(value) for name, value in vars(bias.corrected(isoflop)).items()},
    }


def _budget(b: BudgetOptimum) -> dict[str, Any]:
    return {
        "budget_flops": b.budget_flops,
        "n_runs": b.n_runs,
        "params_opt": number(b.params_opt),
        "tokens_opt": number(b.tokens_opt),
        "loss_opt": number(b.loss_opt),
        "status": b.status.value,
        "message": b.message,
    }


def _agreement(a: Agreement) -> dict[str, Any]:
    return {
        "agree": a.agree,
        "message": a.message,
        "pairs": [
            {
                "approaches": list(p.approaches),
                "quantity": p.quantity,
                "difference": number(p.difference),
                "interval": _pair(p.interval),
                "agree": p.agree,
            }
            for p in a.pairs
        ],
    }


def _sensitivity(row: SensitivityRow) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "choice": row.choice,
        "approach": row.approach,
        "status": row.status,
        "params_exponent": number(row.params_exponent),
        "tokens_exponent": number(row.tokens_exponent),
        "change": number(row.change),
        "message": row.message,
    }


def _prediction(p: Prediction) -> dict[str, Any]:
    return {
        "approach": p.approach,
        "compute_flops": p.compute_flops,
        "params_opt": _quantity(p.params_opt),
        "tokens_opt": _quantity(p.tokens_opt),
        "tokens_per_param": _quantity(p.tokens_per_param),
        "loss_opt": _quantity(p.loss_opt),
        "extrapolation_factor": number(p.extrapolation_factor),
    }


def _skills(found: Skills | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "compute_flops": found.compute_flops,
        "budgets_flops": list(found.budgets_flops),
        "columns": [
            {
                "column": s.column,
                "n_runs": s.n_runs,
                "n_points": s.n_points,
                "n_left_out": s.n_left_out,
                "message": s.message,
                "estimates": [
                    _estimate(e, b, p, found.compute_flops)
                    for e, b, p in zip(s.estimates, s.bands, s.at_mean_compute)
                ],
                "at_mean_compute": [_prediction(p) for p in s.at_mean_compute if p is not None],
                "at_budgets": [_prediction(p) for p in s.at_budgets],
            }
            for s in found.columns
        ],
        "params_opt_ratios": [
            {
                "columns": list(r.columns),
                "approach": r.approach,
                "compute_flops": r.compute_flops,
                "ratio": number(r.ratio),
                "interval": _pair(r.interval),
                "differ": r.differ,
            }
            for r in found.ratios
        ],
    }


def _law_comparison(found: LawComparison | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "n_groups": found.n_groups,
        "folds": found.folds,
        "threshold_flops": number(found.threshold_flops),
        "laws": [
            {
                "law": s.law.label,
                "n_parameters": s.n_parameters,
                "status": s.status.value,
                "message": s.message,
                "in_sample_mean_abs": number(s.in_sample_mean_abs),
                "cross_validation": _held_out(s.cross_validation),
                "folds_failed": s.folds_failed,
                "excess": number(s.excess),
                "excess_standard_error": number(s.excess_standard_error),
                "extrapolation": _held_out(s.extrapolation),
            }
            for s in found.scores
        ],
    }


def _tuning(analysis: Analysis) -> dict[str, Any] | None:
    t = analysis.tuning
    if t is None:
        return None
    return {
        "varied": list(t.varied),
        "message": t.message,
        "noise_nats": number(t.noise_nats),
        "noise_source": t.noise_source,
        "level": t.level,
        "cells": [
            {
                "n_params": c.n_params,
                "budget_flops": c.budget_flops,
                "n_runs": c.n_runs,
                "status": c.status,
                "message": c.message,
                "best_over_used": {
                    name: {"estimate": number(value), "interval": _pair(interval)}
                    for name, value, interval in zip(t.varied, c.best_over_used, c.best_over_used_intervals)
                },
                "debt_nats": number(c.debt_nats),
                "debt_interval": _pair(c.debt_interval),
                "debt_standard_error": number(c.debt_standard_error),
            }
            for c in t.cells
        ],
        "runs": [
            {"run_id": str(name), "debt_nats": number(debt), "standard_error": number(error)}
            for name, debt, error in zip(analysis.points.run_id, t.debt_nats, t.debt_standard_error)
        ],
        "exponents": [
            {
                "approach": e.approach,
                "status": e.status,
                "message": e.message,
                "params_exponent": number(e.params_exponent),
                "tokens_exponent": number(e.tokens_exponent),
                "tuned_params_exponent": number(e.tuned_params_exponent),
                "tuned_tokens_exponent": number(e.tuned_tokens_exponent),
                "change_interval": _pair(e.change_interval),
            }
            for e in t.exponents
        ],
    }


def _held_out(error: HeldOutError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "n_points": error.n_points,
        "mean_abs": number(error.mean_abs),
        "rms": number(error.rms),
        "bias": number(error.bias),
    }


def _backtest(b: Backtest) -> dict[str, Any]:
    return {
        "approach": b.approach,
        "budget_flops": b.budget_flops,
        "n_held_out": b.n_held_out,
        "predicted": None if b.predicted is None else _prediction(b.predicted),
        "observed": _budget(b.observed),
        "best_sampled_loss_nats": b.best_sampled_loss_nats,
        "loss_rms_log": number(b.loss_rms_log),
        "message": b.message,
    }
