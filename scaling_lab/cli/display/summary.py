"""Owns the printed summary of an analysis: three exponents with intervals, the law, the backtest. Numbers, no prose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from scaling_lab.analysis.estimate import FitStatus, Interval
from scaling_lab.cli.display.console import Console
from scaling_lab.core.formatting import human_count

if TYPE_CHECKING:
    from scaling_lab.analysis.analysis import Analysis
    from scaling_lab.analysis.data.observations import Dropped
    from scaling_lab.analysis.estimate import Estimate
    from scaling_lab.analysis.inference.bands import Band
    from scaling_lab.analysis.inference.law_comparison import LawComparison
    from scaling_lab.analysis.inference.prediction import Prediction, Quantity
    from scaling_lab.analysis.studies.skills import Skills
    from scaling_lab.analysis.studies.tuning import Tuning


def print_analysis(console: Console, analysis: Analysis) -> None:
    """The summary that quickstart, analyze and report end with."""
    obs = analysis.observations
    lo, hi = float(obs.compute_flops.min()), float(obs.compute_flops.max())
    dropped = f", {len(obs.dropped)} dropped ({dropped_reasons(obs.dropped)})" if obs.dropped else ""
    console.print(
        f"{obs.n_runs} runs, {analysis.points.n_points} points{dropped}; {lo:.2g} to {hi:.2g} FLOPs; "
        f"N and C counted as {obs.convention}"
    )
    for warning in obs.warnings:
        console.print(f"  note: {warning}", markup=False)
    console.print(exponents_table(analysis))
    for estimate in analysis.estimates:
        if estimate.status is not FitStatus.CONVERGED:
            console.print(f"  {estimate.approach}: {estimate.status.value}: {estimate.message}", markup=False)
    for band in analysis.bands:
        if band.message and analysis.estimate(band.approach).message not in band.message:
            console.print(f"  {band.approach}: {band.message}", markup=False)
    _print_law(console, analysis)
    if analysis.known_floor is not None:
        from scaling_lab.reporting.floor_words import floor_words

        console.print(floor_words(analysis.known_floor), markup=False)
    console.print(f"agreement: {analysis.agreement.message}", markup=False)
    _print_backtest(console, analysis)
    if analysis.tuning is not None:
        _print_tuning(console, analysis.tuning)
    if analysis.skills is not None:
        _print_skills(console, analysis.skills)
    if analysis.law_comparison is not None:
        console.print(laws_table(analysis.law_comparison))
        for s in analysis.law_comparison.scores:
            if s.cross_validation is None:
                console.print(f"  {s.law.label}: {s.status.value}: {s.message}", markup=False)


def dropped_reasons(dropped: Sequence[Dropped], most: int = 3) -> str:
    """The commonest reasons with their counts, without the cells' own values: `4 loss is missing, 1 ...`."""
    counts = Counter(d.reason.split(":")[0] for d in dropped).most_common()
    told = "; ".join(f"{n}: {reason}" for reason, n in counts[:most])
    rest = sum(n for _, n in counts[most:])
    return told + (f"; {rest} for other reasons" if rest else "")


def exponents_table(analysis: Analysis) -> Table:
    """One row an approach: N_opt = k C^a, D_opt = k C^b, beside what was published."""
    level = f"{analysis.bands[0].level:.0%}" if analysis.bands else ""
    table = Table(title="compute-optimal exponents", title_justify="left")
    for name in (
        "approach",
        "status",
        f"a: N ~ C^a ({level})",
        f"b: D ~ C^b ({level})",
        "tokens per parameter",
    ):
        table.add_column(name)
    for estimate, band, at_mean in zip(analysis.estimates, analysis.bands, analysis.at_mean_compute):
        table.add_row(
            estimate.approach,
            estimate.status.value.replace("_", " "),
            _exponent(estimate, band, "params"),
            _exponent(estimate, band, "tokens"),
            "-"
            if at_mean is None
            else f"{at_mean.tokens_per_param.estimate:.3g} at {at_mean.compute_flops:.2g} FLOPs",
        )
    # Hoffmann et al. 2022 (arXiv 2203.15556), table 2; Kaplan et al. 2020 as given there.
    table.add_section()
    table.add_row("Chinchilla", "published", "0.50, 0.49, 0.46", "0.50, 0.51, 0.54", "20", style="dim")
    table.add_row("Kaplan", "published", "0.73", "0.27", "", style="dim")
    return table


def _exponent(estimate: Estimate, band: Band, which: str) -> str:
    if estimate.frontier is None:
        return "-"
    law = estimate.frontier.params if which == "params" else estimate.frontier.tokens
    return f"{law.exponent:.3f}{_range(band.interval(f'{which}_exponent'), '.3f')}"


def _range(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f" ({interval.lo:{form}} to {interval.hi:{form}})"


def _print_law(console: Console, analysis: Analysis) -> None:
    """E, A, B, alpha, beta with intervals."""
    estimate, band = analysis.estimate("parametric"), analysis.band("parametric")
    if not estimate.fits:
        return
    parameters = estimate.fits[0].parameters
    formula = ": L = E + A / N^alpha + B / D^beta" if estimate.law == "chinchilla" else ""
    console.print(f"law {estimate.law}{formula}", markup=False)
    for name, value in parameters.items():
        console.print(f"  {name:<6} {value:.4g}{_range(band.interval(name), '.4g')}", markup=False)


def _print_backtest(console: Console, analysis: Analysis) -> None:
    """What the largest budget was predicted to reach from the others, and what it reached."""
    if not analysis.backtest:
        return
    console.print(
        f"largest budget, {analysis.backtest[0].budget_flops:.3g} FLOPs, predicted from the smaller ones:"
    )
    for row in analysis.backtest:
        console.print(f"  {row.approach:<10} {row.message}", markup=False)


def _print_tuning(console: Console, tuning: Tuning) -> None:
    """What each tuned size owes to its learning rate, and the exponents without it."""
    console.print(tuning_table(tuning))
    console.print(f"  noise of one loss: {noise_words(tuning)}", markup=False)
    for cell in tuning.cells:
        if cell.message is not None:
            console.print(
                f"  N = {human_count(cell.n_params)} at {cell.budget_flops:.3g} FLOPs: {cell.message}",
                markup=False,
            )
    if tuning.message is not None:
        console.print(f"  {tuning.message}", markup=False)
    for e in tuning.exponents:
        if e.params_exponent is None or e.tuned_params_exponent is None:
            console.print(f"  {e.approach}: {e.message}", markup=False)
            continue
        change = e.tuned_params_exponent - e.params_exponent
        console.print(
            f"  {e.approach}: a = {e.params_exponent:.3f} as trained, {e.tuned_params_exponent:.3f} if every size were "
            f"tuned ({change:+.3f}{_range(e.change_interval, '+.3f')})",
            markup=False,
        )


def noise_words(tuning: Tuning) -> str:
    """The noise of one loss and where it is from."""
    return (
        tuning.noise_source
        if tuning.noise_nats is None
        else f"{tuning.noise_nats:.2g} nats, from {tuning.noise_source}"
    )


def tuning_table(tuning: Tuning) -> Table:
    """One row a tuned size: its best setting over the sweep's, and what that would have saved."""
    table = Table(
        title="tuning debt: loss above what the best learning rate of the size gives", title_justify="left"
    )
    level = f"{tuning.level:.0%}"
    for name in ("FLOPs", "parameters", "runs", *(f"best / used {v} ({level})" for v in tuning.varied)):
        table.add_column(name, justify="right")
    table.add_column(f"debt, nats ({level})", justify="right")
    for c in tuning.cells:
        best = [
            f"{value:.2f}{_range(interval, '.2f')}"
            for value, interval in zip(c.best_over_used, c.best_over_used_intervals)
        ] or ["-"] * len(tuning.varied)
        debt = "-" if c.debt_nats is None else f"{c.debt_nats:.4f}{_range(c.debt_interval, '.4f')}"
        table.add_row(f"{c.budget_flops:.3g}", human_count(c.n_params), str(c.n_runs), *best, debt)
    return table


def _print_skills(console: Console, skills: Skills) -> None:
    """The optimum of every loss column at every budget, and which columns differ."""
    console.print(skills_table(skills))
    for skill in skills.columns:
        if skill.message is not None:
            console.print(f"  {skill.column}: {skill.message}", markup=False)
        elif skill.best is None:
            reasons = "; ".join(f"{e.approach}: {e.message}" for e in skill.estimates)
            console.print(f"  {skill.column}: no optimum. {reasons}", markup=False)
    for ratio in skills.ratios:
        shown = {s.best.approach for s in skills.columns if s.best is not None and s.column in ratio.columns}
        if shown == {ratio.approach}:
            words = {True: "differ", False: "do not differ beyond their intervals", None: "(no interval)"}
            console.print(
                f"  N_opt of {ratio.columns[0]} / N_opt of {ratio.columns[1]} = {ratio.ratio:.3g}"
                f"{_range(ratio.interval, '.3g')} at {ratio.compute_flops:.2g} FLOPs, {ratio.approach}:"
                f" {words[ratio.differ]}",
                markup=False,
            )


def skills_table(skills: Skills) -> Table:
    """One row a column and budget, by the approach that is shown first; the mean compute last."""
    table = Table(title="optima per skill", title_justify="left")
    for name in ("loss column", "approach", "FLOPs", "parameters", "tokens per parameter", "loss, nats"):
        table.add_column(name)
    for skill in skills.columns:
        if skill.best is None:
            continue
        rows = [p for p in skill.at_budgets if p.approach == skill.best.approach]
        # The mean compute often is one of the budgets.
        between = all(abs(p.compute_flops / skill.best.compute_flops - 1) > 0.01 for p in rows)
        for p, mean in [*((p, "") for p in rows), *([(skill.best, " (mean)")] if between else [])]:
            table.add_row(
                Text(skill.column if p is rows[0] else ""),
                p.approach if p is rows[0] else "",
                f"{p.compute_flops:.3g}{mean}",
                _counted(p.params_opt),
                _counted(p.tokens_per_param),
                "-"
                if p.loss_opt is None
                else f"{p.loss_opt.estimate:.4f}{_range(p.loss_opt.interval, '.4f')}",
            )
        table.add_section()
    return table


def laws_table(comparison: LawComparison) -> Table:
    """One row a law: mean |error| of ln L in sample, on runs left out, and beyond the compute that was fitted."""
    threshold = comparison.threshold_flops
    beyond = "" if threshold is None else f" above {threshold:.2g} FLOPs"
    table = Table(
        title=f"laws by their error on runs left out ({comparison.folds} parts of {comparison.n_groups} runs)",
        title_justify="left",
    )
    for name in (
        "law",
        "parameters",
        "in sample",
        "left out",
        "worse than the best by",
        f"predicted{beyond}",
    ):
        table.add_column(name)
    for s in comparison.scores:
        if s.cross_validation is None:
            continue  # a line below the table says why
        error = "" if s.excess_standard_error is None else f" ± {s.excess_standard_error:.2%}"
        table.add_row(
            s.law.label,
            str(s.n_parameters),
            "-" if s.in_sample_mean_abs is None else f"{s.in_sample_mean_abs:.2%}",
            f"{s.cross_validation.mean_abs:.2%}",
            "best" if s is comparison.scores[0] else "-" if s.excess is None else f"{s.excess:.2%}{error}",
            "-" if s.extrapolation is None else f"{s.extrapolation.mean_abs:.2%}",
        )
    return table


def predictions_table(predictions: list[Prediction], level: float) -> Table:
    """One row an approach and budget."""
    table = Table(title=f"compute-optimal runs ({level:.0%} intervals)", title_justify="left")
    for name in (
        "FLOPs",
        "approach",
        "parameters",
        "tokens",
        "tokens per parameter",
        "loss, nats",
        "beyond the data",
    ):
        table.add_column(name)
    for p in predictions:
        factor = "inside" if p.extrapolation_factor <= 1 else f"{p.extrapolation_factor:.3g}x"
        table.add_row(
            f"{p.compute_flops:.3g}",
            p.approach,
            _counted(p.params_opt),
            _counted(p.tokens_opt),
            _counted(p.tokens_per_param),
            "-" if p.loss_opt is None else f"{p.loss_opt.estimate:.4f}{_range(p.loss_opt.interval, '.4f')}",
            factor,
        )
    return table


def _counted(q: Quantity) -> str:
    if q.interval is None:
        return human_count(q.estimate)
    return f"{human_count(q.estimate)} ({human_count(q.interval.lo)} to {human_count(q.interval.hi)})"
