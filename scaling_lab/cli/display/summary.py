"""The printed summary of an analysis: exponents with intervals, the law, the backtest, and what the studies found."""

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
    from scaling_lab.analysis.analysis import Analysis, SweepResult
    from scaling_lab.analysis.data.observations import Dropped
    from scaling_lab.analysis.estimate import Estimate
    from scaling_lab.analysis.finding import Finding, FindingTable
    from scaling_lab.analysis.inference.bands import Band
    from scaling_lab.analysis.inference.prediction import Prediction, Quantity


def print_analysis(console: Console, analysis: Analysis, first: str | None = None) -> None:
    """The summary that quickstart, analyze and report end with; `first`: the study that the sweep was made for."""
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
            console.print(f"  {estimate.approach}: {_status(estimate)}: {estimate.message}", markup=False)
    for band in analysis.bands:
        if band.message and analysis.estimate(band.approach).message not in band.message:
            console.print(f"  {band.approach}: {band.message}", markup=False)
    _print_law(console, analysis)
    console.print(f"agreement: {analysis.agreement.message}", markup=False)
    _print_backtest(console, analysis)
    print_findings(console, analysis.findings, first)


def _status(estimate: Estimate) -> str:
    return estimate.status.value.replace("_", " ")


def print_result(console: Console, result: SweepResult, first: str | None = None) -> None:
    """The summary of an analysis, or of what there is without one."""
    if result.analysis is not None:
        print_analysis(console, result.analysis, first)
    else:
        print_findings(console, result.findings, first)


def print_findings(console: Console, findings: Sequence[Finding], first: str | None = None) -> None:
    """What the studies found: answer, tables and remarks of each; that of the study `first` before the others."""
    for finding in sorted(findings, key=lambda f: f.name != first):
        console.print(f"{finding.title}: {finding.answer}", style="bold", markup=False, highlight=False)
        if finding.reason is not None:
            console.print(f"  {finding.status.value.replace('_', ' ')}: {finding.reason}", markup=False)
        for table in finding.tables:
            if table.in_terminal:
                console.print(finding_table(table))
                if table.note:
                    console.print(f"  {table.note}", markup=False)
        for caveat in finding.caveats:
            console.print(f"  {caveat}", markup=False)


def finding_table(table: FindingTable) -> Table:
    """A finding's table for the terminal, without its columns that are empty here."""
    shown = [
        i
        for i, column in enumerate(table.columns)
        if column.heading or any(row[i] not in (None, "") for row in table.rows)
    ]
    drawn = Table(title=table.caption, title_justify="left")
    for i in shown:
        column = table.columns[i]
        drawn.add_column(Text(column.title), justify="right" if column.form else "left")
    for row in table.rows:
        drawn.add_row(*(Text(table.columns[i].text(row[i])) for i in shown))
    return drawn


def dropped_reasons(dropped: Sequence[Dropped], most: int = 3) -> str:
    """The most common reasons with their counts, without the cells' own values: `4 loss is missing, 1 ...`."""
    counts = Counter(d.reason.split(":")[0] for d in dropped).most_common()
    named = "; ".join(f"{n}: {reason}" for reason, n in counts[:most])
    rest = sum(n for _, n in counts[most:])
    return named + (f"; {rest} for other reasons" if rest else "")


def exponents_table(analysis: Analysis) -> Table:
    """One row for each approach: N_opt = k C^a, D_opt = k C^b, next to the published ones."""
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
            _status(estimate),
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


def predictions_table(predictions: list[Prediction], level: float) -> Table:
    """One row for each approach and budget."""
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
