"""analysis.json, the public format of an analysis: versioned, described by analysis.schema.json. Missing is null."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_lab.analysis.approaches.isoflop.grid_bias import GridBias
from scaling_lab.analysis.choices import choices, law_formula
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Estimate
from scaling_lab.analysis.finding import Finding
from scaling_lab.analysis.inference.agreement import Agreement
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.prediction import Backtest, Prediction
from scaling_lab.analysis.inference.sensitivity import SensitivityRow
from scaling_lab.analysis.json_parts import budget_json, estimate_json, interval_json, number, prediction_json
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.errors import UserError

SCHEMA_VERSION = 2
# Of millions of bad rows so many are listed one by one; the count is always complete.
MAX_DROPPED_LISTED = 10_000
# Fields of single studies as documented in version 1, null where the study found nothing. New studies have none.
_DOCUMENTED_FIELDS = ("skills", "law_comparison", "tuning", "known_floor")


def document(
    *,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    source: str | None = None,
    findings: Sequence[Finding] = (),
    laws: Mapping[str, Any] | None = None,
    problem: str | None = None,
) -> dict[str, Any]:
    """analysis.json as plain data, ready for `json.dumps(..., allow_nan=False)`.

    Args:
        command: that made it.
        versions: of what computed it; default: `default_versions()`.
        source: absolute path of the table; None for a sweep.
        laws: what `law_fields` gives; None where no law could be fitted and there are findings alone.
        problem: why there are no laws.
    """
    documented = {key: value for finding in findings for key, value in finding.documented.items()}
    fields = dict(_NO_LAWS if laws is None else laws)
    fields["estimates"] = [
        # Of the parametric estimate alone, and null for the others.
        {**each, "profile": documented.get("profile") if each["approach"] == "parametric" else None}
        for each in fields["estimates"]
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "source": source,
        "versions": dict(versions) if versions is not None else default_versions(),
        "problem": problem,
        **fields,
        **{key: documented.get(key) for key in _DOCUMENTED_FIELDS},
        "findings": [finding.to_json() for finding in findings],
    }


_NO_LAWS: dict[str, Any] = {
    "observations": None, "choices": [], "estimates": [], "agreement": None, "sensitivity": [], "backtest": [],
    "predictions": [],
}  # fmt: skip


def law_fields(
    *,
    settings: AnalysisSettings,
    observations: Observations,
    points: Observations,
    estimates: Sequence[Estimate],
    bands: Sequence[Band],
    at_mean_compute: Sequence[Prediction | None],
    mean_compute_flops: float,
    grid_bias: GridBias | None,
    agreement: Agreement,
    sensitivity: Sequence[SensitivityRow],
    backtest: Sequence[Backtest],
    predictions: Sequence[Prediction],
) -> dict[str, Any]:
    """The fields of the three approaches. `points`: those that IsoFLOP and the parametric fit used."""
    return {
        "observations": _observations(observations, points),
        "choices": [
            {"what": what, "which": which} for what, which in choices(settings, observations, points)
        ],
        "estimates": [
            {
                **estimate_json(e, b, p, mean_compute_flops),
                "fit": _fit(settings, e) if e.approach == "parametric" else None,
                "profile": None,  # of the study of that name
                "grid_bias": _grid_bias(grid_bias, e) if e.approach == "isoflop" else None,
            }
            for e, b, p in zip(estimates, bands, at_mean_compute)
        ],
        "agreement": _agreement(agreement),
        "sensitivity": [_sensitivity(row) for row in sensitivity],
        "backtest": [_backtest(row) for row in backtest],
        "predictions": [prediction_json(p) for p in predictions],
    }


def read_document(path: str | Path) -> dict[str, Any]:
    """An analysis.json as plain data. Raises `UserError` for a file that is missing, not one, or of a newer version."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    version = found.get("schema_version") if isinstance(found, dict) else None
    if not isinstance(version, int) or "estimates" not in found:
        raise UserError(f"{path} is not an analysis.json of scaling-lab.")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version}; this version of scaling-lab reads up to {SCHEMA_VERSION}: update it."
        )
    return found


def findings_of(document: Mapping[str, Any]) -> tuple[Finding, ...]:
    """The findings of an analysis.json; none in one of version 1. Raises `UserError` where they are damaged."""
    try:
        return tuple(Finding.from_json(each) for each in document.get("findings") or ())
    except ValueError as error:
        raise UserError(f"the findings of this analysis.json cannot be read: {error}.") from None


def default_versions() -> dict[str, str]:
    """Versions of what computed the analysis."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("scaling-lab", "numpy", "scipy", "pandas"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _fit(settings: AnalysisSettings, estimate: Estimate) -> dict[str, Any] | None:
    """How the law was fitted; None where none was."""
    if not estimate.fits:
        return None
    return {
        "message": estimate.fits[0].message,
        "formula": law_formula(settings, estimate.law),
        "huber_delta": settings.approach.parametric.huber_delta,
    }


def _observations(obs: Observations, points: Observations) -> dict[str, Any]:
    return {
        "n_runs": obs.n_runs,
        "n_points": points.n_points,
        "n_rows": obs.n_points,
        "convention": obs.convention,
        "compute_range_flops": [float(obs.compute_flops.min()), float(obs.compute_flops.max())],
        "points_compute_range_flops": [float(points.compute_flops.min()), float(points.compute_flops.max())],
        "total_flops": number(obs.final().compute_flops.sum()),
        "curves": obs.curves.kind,
        "n_dropped": len(obs.dropped),
        "dropped": [
            {"run_id": d.run_id, "row": d.row, "reason": d.reason} for d in obs.dropped[:MAX_DROPPED_LISTED]
        ],
        "units": {name: {"unit": u.name, "factor": u.factor} for name, u in obs.units.items()},
        "warnings": list(obs.warnings),
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


def _agreement(a: Agreement) -> dict[str, Any]:
    return {
        "agree": a.agree,
        "message": a.message,
        "pairs": [
            {
                "approaches": list(p.approaches),
                "quantity": p.quantity,
                "difference": number(p.difference),
                "interval": interval_json(p.interval),
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


def _backtest(b: Backtest) -> dict[str, Any]:
    return {
        "approach": b.approach,
        "budget_flops": b.budget_flops,
        "n_held_out": b.n_held_out,
        "predicted": None if b.predicted is None else prediction_json(b.predicted),
        "observed": budget_json(b.observed),
        "best_sampled_loss_nats": b.best_sampled_loss_nats,
        "loss_rms_log": number(b.loss_rms_log),
        "message": b.message,
    }
