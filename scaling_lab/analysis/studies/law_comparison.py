"""Study: which law predicts runs best that it was not fitted to."""

from __future__ import annotations

from typing import Any

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.finding import Cell, Column, Finding, FindingStatus, FindingTable, KeyQuantity
from scaling_lab.analysis.inference.law_comparison import HeldOutError, LawComparison, LawScore, compare_laws
from scaling_lab.analysis.json_parts import number
from scaling_lab.analysis.laws import get_law, law_names
from scaling_lab.analysis.settings import ALL_LAWS, AnalysisSettings
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.analysis.text import format_flops

QUESTION = "Which law predicts best the runs that it was not fitted to?"
NEEDS = "laws to compare: compare_laws=[LAW,LAW], or compare_laws=all"


def find(given: StudyInput) -> Finding | None:
    if given.laws is None or not given.settings.compare_laws:
        return None
    comparison = compare(given.laws.points, given.settings)
    ranked = [s for s in comparison.scores if s.cross_validation is not None]
    return Finding(
        name="law_comparison",
        title="Other laws on the same runs",
        question=QUESTION,
        answer=_answer(ranked),
        status=FindingStatus.ANSWERED if ranked else FindingStatus.NOT_ANSWERED,
        reason=None if ranked else "No law could be fitted.",
        quantities=_quantities(ranked),
        tables=(_table(comparison),),
        documented={"law_comparison": _documented(comparison)},
    )


def compare(points: Observations, settings: AnalysisSettings) -> LawComparison:
    """The laws of `compare_laws` and the analysis's own on the same points; rows of one run are left out together."""
    own = settings.approach.parametric
    names = law_names() if ALL_LAWS in settings.compare_laws else settings.compare_laws
    laws = [get_law(own.law, **own.law_options), *(get_law(n) for n in dict.fromkeys(names) if n != own.law)]
    columns = {
        **points.extra,
        "n_params": points.n_params,
        "n_tokens": points.n_tokens,
        "compute_flops": points.compute_flops,
    }
    return compare_laws(
        laws,
        columns,
        loss_nats=points.loss_nats,
        groups=points.run_index,
        compute_flops=points.compute_flops,
        huber_delta=own.huber_delta,
        objective=own.objective,  # type: ignore[arg-type]
        seed=settings.seed,
    )


def _answer(ranked: list[LawScore]) -> str:
    if not ranked:
        return "No law could be compared."
    best = ranked[0]
    assert best.cross_validation is not None
    answer = (
        f"{best.law.label} predicts runs that were left out of its fit best, with a mean error of "
        f"{best.cross_validation.mean_abs:.2%} of the loss"
    )
    if len(ranked) == 1:
        return f"{answer}."
    second = ranked[1]
    excess = "" if second.excess is None else f" by {second.excess:.2%}"
    error = "" if second.excess_standard_error is None else f" ± {second.excess_standard_error:.2%}"
    return f"{answer}; the next, {second.law.label}, is worse{excess}{error}."


def _quantities(ranked: list[LawScore]) -> tuple[KeyQuantity, ...]:
    return tuple(
        KeyQuantity(f"error on runs left out, {s.law.label}", s.cross_validation.mean_abs, form=".2%")
        for s in ranked
        if s.cross_validation is not None
    )


def _table(comparison: LawComparison) -> FindingTable:
    """Laws in order of their error on points that they were not fitted to."""
    rows: list[tuple[Cell, ...]] = []
    for s in comparison.scores:
        rows.append(
            (
                s.law.title or s.law.label,
                s.n_parameters,
                s.in_sample_mean_abs,
                None if s.cross_validation is None else s.cross_validation.mean_abs,
                s.excess,
                s.excess_standard_error,
                None if s.extrapolation is None else s.extrapolation.mean_abs,
                "" if s.status is FitStatus.CONVERGED else s.message,
            )
        )
    note = (
        f"Mean |error| of the loss. Left out: each of {comparison.n_groups} runs, predicted by a fit without it "
        f"({comparison.folds} folds). Excess: over the best law; less than twice its standard error is not significant."
    )
    if comparison.threshold_flops is not None:
        note += (
            f" Extrapolated: runs above {format_flops(comparison.threshold_flops)} FLOPs from those below."
        )
    return FindingTable(
        name="laws",
        caption="Laws by their error on runs that they were not fitted to",
        columns=(
            Column("law"), Column("parameters", "d"), Column("in sample", ".2%"), Column("left out", ".2%"),
            Column("excess", ".2%"), Column("± standard error", ".2%"), Column("extrapolated", ".2%"), Column(""),
        ),
        rows=tuple(rows),
        warnings=tuple(i for i, s in enumerate(comparison.scores) if s.status is not FitStatus.CONVERGED),
        note=note,
    )  # fmt: skip


def _documented(comparison: LawComparison) -> dict[str, Any]:
    """The field `law_comparison` of analysis.json."""
    return {
        "n_groups": comparison.n_groups,
        "folds": comparison.folds,
        "threshold_flops": number(comparison.threshold_flops),
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
            for s in comparison.scores
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
