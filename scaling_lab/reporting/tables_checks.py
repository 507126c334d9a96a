"""Owns the report's tables of what an analysis may hold beside the three approaches: profile intervals, optima per skill,
laws by their error out of sample."""

from __future__ import annotations

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.inference.law_comparison import LawComparison
from scaling_lab.analysis.inference.profiles import Profile
from scaling_lab.analysis.studies.skills import Skills
from scaling_lab.reporting.style import SHORT_APPROACH_NAMES, format_count, format_flops, significant
from scaling_lab.reporting.tables import GREEK, NOTHING, Row, TextTable, quantity_text, span_text

_QUANTITIES = {"params_exponent": "a, the exponent of N", "tokens_exponent": "b, the exponent of D"}


def profile(profile: Profile | None, analysis: Analysis) -> TextTable | None:
    """Profile-likelihood intervals beside the bootstrap's; None where there are none (`Profile.message` says why)."""
    if profile is None or not profile.intervals:
        return None
    estimate, band = analysis.estimate("parametric"), analysis.band("parametric")
    frontier = estimate.frontier
    values = dict(estimate.fits[0].parameters) if estimate.fits else {}
    if frontier is not None:
        values |= {"params_exponent": frontier.params.exponent, "tokens_exponent": frontier.tokens.exponent}
    rows = []
    for name, ends in profile.intervals.items():
        open_end = ends.lo is None or ends.hi is None
        low = "unbounded" if ends.lo is None else significant(ends.lo, 4)
        high = "unbounded" if ends.hi is None else significant(ends.hi, 4)
        value = NOTHING if name not in values else significant(values[name], 4)
        boot = span_text(band.interval(name), lambda v: significant(v, 4))
        cells = (
            _QUANTITIES.get(name, GREEK.get(name, name)),
            value,
            f"{low} to {high}",
            boot,
            ends.message or "",
        )
        rows.append(Row(cells, "warn" if open_end else ""))
    level = f"{profile.level:.0%}"
    columns = ("", "value", f"profile, {level}", f"bootstrap, {band.level:.0%}", "")
    note = (
        "A profile moves one quantity, fits the others anew, and takes the values at which the fit is not yet too bad by the"
        " noise of its own residuals. Where it and the bootstrap differ much, the wider is the safer."
    )
    return TextTable(columns, tuple(rows), frozenset({1, 2, 3}), note)


def skills(found: Skills) -> TextTable:
    """The optimum of every loss column at the mean compute, by every approach that has one."""
    rows, reasons = [], []
    for skill in found.columns:
        shown = [p for p in skill.at_mean_compute if p is not None]
        for p in shown:
            cells = (
                skill.column,
                SHORT_APPROACH_NAMES[p.approach],
                quantity_text(p.params_opt, format_count),
                quantity_text(p.tokens_opt, format_count),
                quantity_text(p.tokens_per_param, lambda v: f"{v:.3g}"),
                quantity_text(p.loss_opt, lambda v: f"{v:.4f}"),
            )
            rows.append(Row(cells))
        if not shown:
            why = skill.message or "no approach has an optimum"
            rows.append(Row((skill.column, *(NOTHING,) * 5), "warn"))
            reasons.append(f"{skill.column}: {why}")
    left_out = [f"{s.column}: {s.n_left_out}" for s in found.columns if s.n_left_out]
    note = f"All at {format_flops(found.compute_flops)} FLOPs, the mean of the runs; other budgets are in analysis.json."
    note = " ".join([note, *reasons])
    if left_out:
        note += f" Points without a usable loss in a column: {', '.join(left_out)}."
    return TextTable(("loss", "by", "best N", "best D", "D / N", "loss there"), tuple(rows),
                     frozenset(range(2, 6)), note)  # fmt: skip


def skill_ratios(found: Skills) -> TextTable:
    """How many times larger one column's best model is than another's."""
    rows = [
        Row(
            (
                f"{r.columns[0]} over {r.columns[1]}",
                SHORT_APPROACH_NAMES[r.approach],
                f"{r.ratio:.3g}",
                span_text(r.interval, lambda v: f"{v:.3g}"),
                {True: "yes", False: "no", None: "not known"}[r.differ],
            )
        )
        for r in found.ratios
    ]
    note = "Runs are the same in every column, so that the ratios are, if anything, better known than these intervals say."
    columns = ("best N of", "by", "ratio", "interval", "differ")
    return TextTable(columns, tuple(rows), frozenset({2, 3}), note)


def laws(found: LawComparison) -> TextTable:
    """Laws in order of their error on points that they were not fitted to."""
    rows = []
    for s in found.scores:
        excess = _percent(s.excess)
        if s.excess is not None and s.excess_standard_error is not None:
            excess += f" ± {s.excess_standard_error:.2%}"
        cells = (
            s.law.title or s.law.label,
            str(s.n_parameters),
            _percent(s.in_sample_mean_abs),
            _percent(None if s.cross_validation is None else s.cross_validation.mean_abs),
            excess,
            _percent(None if s.extrapolation is None else s.extrapolation.mean_abs),
            "" if s.status is FitStatus.CONVERGED else s.message,
        )
        rows.append(Row(cells, "" if s.status is FitStatus.CONVERGED else "warn"))
    note = (
        f"Mean |error| of the loss. Left out: each of {found.n_groups} runs predicted by a fit without it ({found.folds} folds)."
        " Excess: over the best law; less than twice its standard error is no evidence."
    )
    if found.threshold_flops is not None:
        note += f" Extrapolated: runs above {format_flops(found.threshold_flops)} FLOPs from those below."
    columns = ("law", "parameters", "in sample", "left out", "excess", "extrapolated", "")
    return TextTable(columns, tuple(rows), frozenset(range(1, 6)), note)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2%}"
