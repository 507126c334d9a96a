"""The result of an analysis: numbers with intervals, figures, predictions, frames, a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.api import frames
from scaling_lab.api.approaches import ApproachResult
from scaling_lab.api.html import html_table
from scaling_lab.api.plots import Plots
from scaling_lab.api.predictions import PredictedRun, Predictions
from scaling_lab.core.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.analysis.analysis import Analysis
    from scaling_lab.analysis.finding import Finding
    from scaling_lab.core.record import RunRecord
    from scaling_lab.reporting.page import ReportOptions


class AnalysisResult:
    """What `analyze` and `load` return. Its numbers are those of analysis.json, the format that `to_dict` gives.

    >>> analysis
    my_runs.csv: 36 runs, 1e+19 to 1e+21 FLOPs, counted as_given
      envelope    not_applicable: ...
      isoflop     N ~ C^0.5..., D ~ C^0.4...
      parametric  N ~ C^0.5..., D ~ C^0.4...
    >>> analysis.isoflop.exponent.interval
    Interval(lo=0.4..., hi=0.5...)
    >>> analysis.parametric.parameters["alpha"].estimate < 1
    True
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        name: str,
        analysis: Analysis | None = None,
        live: LiveReport | None = None,
    ) -> None:
        self._document, self.name = document, name
        self._analysis, self._live = analysis, live

    # -- the numbers
    @cached_property
    def approaches(self) -> tuple[ApproachResult, ...]:
        """Envelope, IsoFLOP and parametric, in this order; empty where no law can be fitted to the runs (`problem`)."""
        return tuple(ApproachResult(node) for node in self._document["estimates"])

    def _approach(self, name: str) -> ApproachResult:
        if not self.approaches:
            raise UserError(f"{name}: there is no scaling law here. {self.problem}")
        return next(a for a in self.approaches if a.name == name)

    @property
    def problem(self) -> str | None:
        """Why there is no scaling law, where there are findings alone."""
        return self._document.get("problem")

    @property
    def envelope(self) -> ApproachResult:
        """Approach 1: the lower envelope of the loss curves (Hoffmann et al. 2022, section 3.1)."""
        return self._approach("envelope")

    @property
    def isoflop(self) -> ApproachResult:
        """Approach 2: the minimum of each compute budget's valley (Hoffmann et al. 2022, section 3.2)."""
        return self._approach("isoflop")

    @property
    def parametric(self) -> ApproachResult:
        """Approach 3: a law L(N, D) fitted to all final losses (Hoffmann et al. 2022, section 3.3)."""
        return self._approach("parametric")

    @property
    def agreement(self) -> str:
        """Whether the approaches agree within their intervals, in a sentence."""
        found = self._document["agreement"]
        return str(self.problem) if found is None else str(found["message"])

    @property
    def n_runs(self) -> int:
        """Runs that laws were fitted to."""
        return int((self._document["observations"] or {"n_runs": 0})["n_runs"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was assumed in reading the data, and what is odd about them."""
        return tuple((self._document["observations"] or {"warnings": ()})["warnings"])

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the studies found whose data are there: answer, quantities, tables. Empty where there are none."""
        from scaling_lab.analysis.analysis_json import findings_of

        return findings_of(self._document)

    def finding(self, study: str) -> Finding:
        """What one study found. Raises `UserError` with those that there are.

        >>> analysis.finding("profile").answer
        'By profile likelihood (90%), the exponent of N is 0.50... and E is 1.8...'
        """
        found = {finding.name: finding for finding in self.findings}
        if study not in found:
            raise unknown("study", study, found)
        return found[study]

    @property
    def analysis(self) -> Analysis:
        """The analysis's own values: observations, estimates, resamples. Raises `UserError` for a result that was loaded."""
        if self._live is not None and self._analysis is None:
            raise UserError(f"{self.name} has no scaling law: {self.problem}")
        if self._analysis is None:
            raise UserError(
                f"{self.name} was loaded from analysis.json, which holds no runs: figures and new predictions need them. "
                "Analyze the runs again with sl.analyze(...)."
            )
        return self._analysis

    # -- what can be done with it
    @property
    def plot(self) -> Plots:
        """Figures on matplotlib axes: `plot.isoflop(ax=None)`, `plot.frontier()`, `plot.parametric()`, ..."""
        return Plots(lambda: self.analysis, self.finding)

    def predict(self, compute_flops: float | Iterable[float]) -> Predictions:
        """The compute-optimal parameters, tokens and loss at a budget, by each approach, with intervals.

        Args:
            compute_flops: training FLOPs, one budget or several.

        Raises:
            UserError: a budget is not positive; the result was loaded and the budget is not among those saved.

        >>> analysis.predict(1e21).parametric.loss_opt.interval
        Interval(lo=2..., hi=2...)
        """
        budgets = budgets_of(compute_flops)
        messages = {a.name: a.message for a in self.approaches}
        if self._analysis is None:
            return self._saved(budgets, messages)
        from scaling_lab.analysis.inference.prediction import predict

        found = [
            (predict(estimate, band, budget), band.level)
            for budget in budgets
            for estimate, band in zip(self._analysis.estimates, self._analysis.bands)
        ]
        return Predictions([PredictedRun.of(p, level) for p, level in found if p is not None], messages)

    def _saved(self, budgets: Sequence[float], messages: Mapping[str, str]) -> Predictions:
        """The predictions that analysis.json holds."""
        level = self.parametric.level
        saved = Predictions([PredictedRun.of_json(p, level) for p in self._document["predictions"]], messages)
        return Predictions([run for budget in budgets for run in saved.at(budget).runs], messages)

    def report(self, folder: str | Path) -> Path:
        """Write report.html, analysis.json and the figures into `folder`; returns the page's path.

        Of a result that was loaded from analysis.json the page has no figures of the three approaches and no table of runs.

        Raises:
            UserError: the folder holds a report.html that scaling-lab did not write.
            DiskError: the folder cannot be written.

        >>> analysis.report("report").name
        'report.html'
        """
        from scaling_lab.cli.commands.analyze import checked_out, writing_into
        from scaling_lab.reporting.page import ANALYSIS_NAME, ReportOptions, report_from_json, write_report

        target = checked_out(Path(folder).expanduser())
        options = ReportOptions(command=str(self._document["command"]), source=self._document["source"])
        with writing_into(target):
            if self._live is not None:
                return write_report(self._analysis, self._live.records, target, self._live.options)
            if self._analysis is not None:
                return write_report(self._analysis, (), target, replace(options, title=self.name))
            target.mkdir(parents=True, exist_ok=True)
            self.to_json(target / ANALYSIS_NAME)
            return report_from_json(target / ANALYSIS_NAME, target, replace(options, title=self.name))

    # -- as text, frames and plain data
    def summary(self, width: int = 110) -> str:
        """The result as the terminal shows it: exponents, the law's parameters, agreement, the backtest.

        >>> print(analysis.summary())
        36 runs, 36 points; 1e+19 to 1e+21 FLOPs; N and C counted as as_given
        ...
        """
        from scaling_lab.cli.display.summary import print_analysis, print_findings

        if self._analysis is not None:
            analysis = self._analysis
            return captured(lambda console: print_analysis(console, analysis), width)
        laws = [*self._parameter_lines(), f"agreement: {self.agreement}"] if self.approaches else []
        findings = captured(lambda console: print_findings(console, self.findings), width)
        return "\n".join((repr(self), *laws, *([findings] if findings else [])))

    def _parameter_lines(self) -> list[str]:
        law = self.parametric
        return [f"law {law.law}", *(f"  {name:<6} {value!r}" for name, value in law.parameters.items())]

    def to_frame(self, what: str = "exponents") -> pd.DataFrame:
        """A table of the result.

        Args:
            what: exponents (one row an approach), parameters (of the law), budgets (IsoFLOP's valleys), predictions,
                sensitivity, backtest, dropped (rows that were left out), points (the runs as they were fitted), findings (one
                row a study), or STUDY.TABLE, a table of a finding.

        Raises:
            UserError: an unknown table, or points of a result that was loaded from analysis.json.

        >>> analysis.to_frame().loc["isoflop", ["params_exponent", "params_exponent_lo", "params_exponent_hi"]].round(1).tolist()
        [0.5, 0.5, 0.5]
        >>> analysis.to_frame("parameters").columns.tolist()
        ['estimate', 'lo', 'hi', 'standard_error', 'profile_lo', 'profile_hi']
        """
        if what == "points":
            return frames.points(self.analysis.points)
        if what == "findings":
            return frames.findings(self.findings)
        study, dot, table = what.partition(".")
        if dot:
            return frames.finding_table(self.finding(study), table)
        return frames.frame(self._document, self.approaches, what)

    def to_dict(self) -> dict[str, Any]:
        """What analysis.json holds: plain data in a documented, versioned format (analysis.schema.json)."""
        found: dict[str, Any] = json.loads(json.dumps(self._document))
        return found

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON text; written to `path` too where one is given (`sl.load` reads it)."""
        from scaling_lab.core.storage.files import write_atomic
        from scaling_lab.core.storage.serialization import dumps

        text = dumps(dict(self._document))
        if path is not None:
            write_atomic(Path(path).expanduser(), text)
        return text

    def __repr__(self) -> str:
        return "\n".join((self._head(), *(f"  {a.name:<10}  {_law_text(a)}" for a in self.approaches)))

    def _head(self) -> str:
        observations = self._document["observations"]
        if observations is None:
            names = ", ".join(finding.name for finding in self.findings)
            return f"{self.name}: findings of {names}; no scaling law: {self.problem}"
        lo, hi = observations["compute_range_flops"]
        return f"{self.name}: {self.n_runs} runs, {lo:.2g} to {hi:.2g} FLOPs, counted {observations['convention']}"

    def _repr_html_(self) -> str:
        rows = [(a.name, a.status, a.exponent, a.tokens_exponent) for a in self.approaches]
        note = " ".join(f"{f.title}: {f.answer}" for f in self.findings)
        return html_table(
            self._head(), ("approach", "status", "a: N ~ C^a", "b: D ~ C^b"), rows, f"{self.agreement} {note}"
        )


@dataclass(frozen=True)
class LiveReport:
    """What a report of a sweep shows besides its analysis."""

    options: ReportOptions
    records: Sequence[RunRecord]


def budgets_of(compute_flops: float | Iterable[float]) -> list[float]:
    """Budgets as plain numbers. Raises `UserError` for one that is no positive number."""
    given = list(compute_flops) if isinstance(compute_flops, Iterable) else [compute_flops]
    if isinstance(compute_flops, str) or not given:
        raise UserError(
            f"compute_flops={compute_flops!r}: wanted training FLOPs such as 1e21, or a list of them."
        )
    for value in given:
        try:
            positive = 0 < float(value) < float("inf")
        except (TypeError, ValueError):
            positive = False
        if not positive:
            raise UserError(f"compute_flops={value!r} must be a positive number of FLOPs, such as 1e21.")
    return [float(value) for value in given]


def captured(show: Any, width: int) -> str:
    """What `show(console)` prints, as text."""
    import io

    from rich.console import Console as RichConsole

    from scaling_lab.cli.display.console import Console

    console, text = Console(), io.StringIO()
    console.out = RichConsole(file=text, width=width, highlight=False, color_system=None)
    show(console)
    lines = text.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _law_text(approach: ApproachResult) -> str:
    if approach.exponent.estimate is None:
        return f"{approach.status}: {approach.message}"
    return f"N ~ C^{approach.exponent!r}, D ~ C^{approach.tokens_exponent!r}"
