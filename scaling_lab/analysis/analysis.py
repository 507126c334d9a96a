"""The analysis as a whole: `analyze(observations, settings) -> Analysis`, and reading observations for it.

    settings = AnalysisSettings(columns={"loss": "val_loss"})
    analysis = analyze(read_observations("runs.csv", settings), settings)
    json.dumps(analysis.to_json_dict(command="..."))

`Analysis.to_json_dict` is analysis.json (analysis_json.py, analysis.schema.json).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scaling_lab.analysis.analysis_json import document, law_fields
from scaling_lab.analysis.approaches import IsoFlop, Parametric
from scaling_lab.analysis.approaches.isoflop.grid_bias import GridBias, bias_sentence, grid_bias
from scaling_lab.analysis.data.observations import AS_GIVEN, Observations
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.analysis.data.sweep_records import SweepRecords
from scaling_lab.analysis.data.table_observations import from_table
from scaling_lab.analysis.data.tables.table import Table, read_table
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.finding import Finding
from scaling_lab.analysis.inference.agreement import Agreement, compare_approaches, explain_disagreement
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.bootstrap import Approach, bootstrap
from scaling_lab.analysis.inference.caveats import interval_caveats
from scaling_lab.analysis.inference.prediction import Backtest, Prediction, backtest, predict
from scaling_lab.analysis.inference.sensitivity import SensitivityRow, sensitivity
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.analysis.studies import NO_STUDY, find_all, get_study
from scaling_lab.analysis.studies.base import LawAnalysis, StudyInput
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord

# Where the optimum is predicted by default, in multiples of the largest observed compute: the next decade.
_NEXT_DECADE = 10.0


@dataclass(frozen=True)
class Analysis:
    """Everything that the report and analysis.json show, as values."""

    observations: Observations
    """Every row, before `points` chose among them."""
    settings: AnalysisSettings
    estimates: tuple[Estimate, ...]
    """Always envelope, isoflop, parametric, in this order."""
    bands: tuple[Band, ...]
    """One for each estimate."""
    mean_compute_flops: float
    """Geometric mean of the points' FLOPs, where all approaches are compared."""
    at_mean_compute: tuple[Prediction | None, ...]
    agreement: Agreement
    sensitivity: tuple[SensitivityRow, ...]
    backtest: tuple[Backtest, ...]
    predictions: tuple[Prediction, ...]
    grid_bias: GridBias | None = None
    """The bias that IsoFLOP's sizes and budgets give it, under the fitted law; None where it is unknown."""
    findings: tuple[Finding, ...] = ()
    """What the studies found whose data are there, by name."""

    def __repr__(self) -> str:
        """Short: the arrays of an analysis are thousands of numbers long."""
        return f"Analysis({self.observations!r}, {', '.join(map(repr, self.estimates))})"

    @cached_property
    def points(self) -> Observations:
        """The points that IsoFLOP and the parametric fit used."""
        return select_points(self.observations, self.settings)

    def estimate(self, approach: str) -> Estimate:
        return next(e for e in self.estimates if e.approach == approach)

    def band(self, approach: str) -> Band:
        return next(b for b in self.bands if b.approach == approach)

    def finding(self, study: str) -> Finding | None:
        """What a study found; None where its data are not there."""
        return next((f for f in self.findings if f.name == study), None)

    def to_json_dict(
        self, command: str = "", versions: dict[str, str] | None = None, source: str | None = None
    ) -> dict[str, Any]:
        """analysis.json as plain data: see analysis.schema.json."""
        laws = law_fields(
            settings=self.settings,
            observations=self.observations,
            points=self.points,
            estimates=self.estimates,
            bands=self.bands,
            at_mean_compute=self.at_mean_compute,
            mean_compute_flops=self.mean_compute_flops,
            grid_bias=self.grid_bias,
            agreement=self.agreement,
            sensitivity=self.sensitivity,
            backtest=self.backtest,
            predictions=self.predictions,
        )
        return document(command=command, versions=versions, source=source, findings=self.findings, laws=laws)


def read_observations(path: str | Path, settings: AnalysisSettings | None = None) -> Observations:
    """Observations from a CSV, Parquet, JSON or JSON-lines table, as the settings say (metric, where, columns, units, ...).

    Raises:
        UserError: no such file, a missing column, too few usable rows.
    """
    s = settings or AnalysisSettings()
    table = read_table(
        path,
        columns=s.columns,
        where=s.where,
        metric=s.metric,
        metrics=s.metrics,
        units=s.units,
        decimal=s.decimal,
    )
    return observations_of_table(table, s)


def observations_of_table(table: Table, settings: AnalysisSettings) -> Observations:
    """Observations from a table that was read, as the settings say (convention, strict, points, best_of, pool).

    Raises:
        UserError: a missing column, too few usable rows.
    """
    return from_table(
        table,
        convention=settings.convention or AS_GIVEN,
        strict=settings.strict,
        each_row=settings.points == "all",
        best_of=settings.best_of,
        pool=settings.pool,
    )


def observations_of_sweep(
    records: Iterable[RunRecord], settings: AnalysisSettings | None = None
) -> Observations:
    """Observations from a sweep's run records, as the settings say (convention, metric, metrics, approach.envelope.curve).

    Raises:
        UserError: no completed run, a metric that the records lack, or `as_given`, which is for tables.
    """
    s = settings or AnalysisSettings()
    if s.convention == AS_GIVEN:
        raise UserError(
            f"convention={AS_GIVEN} is for tables; a sweep is counted under one of {', '.join(Convention)}."
        )
    convention = None if s.convention is None else Convention(s.convention)
    return observations_from_records(records, convention, s.approach.envelope.curve, s.metric, s.metrics)


def select_points(observations: Observations, settings: AnalysisSettings) -> Observations:
    """One point per run (`points=final`) or every row."""
    return observations.final() if settings.points == "final" else observations


# Starts, resamples and extrapolations may leave float64; whoever uses a number checks that it is finite.
@np.errstate(all="ignore")
def analyze(
    observations: Observations,
    settings: AnalysisSettings | None = None,
    records: SweepRecords | None = None,
) -> Analysis:
    """The three approaches with their intervals, whether they agree, how they react to choices, how they predict, and
    what the studies find.

    An approach that cannot be applied returns an estimate that says why; it is not an error.

    Args:
        records: of the sweep that the observations come from, for the studies that look at runs themselves.

    Raises:
        UserError: the law needs a column that is missing, weights=loss_sem without standard errors, or an unknown study.
    """
    s = settings or AnalysisSettings()
    if s.study not in (None, NO_STUDY):
        get_study(s.study)  # an unknown name is refused before the work
    points = select_points(observations, s)
    weights = point_weights(points, s)
    approaches: tuple[Approach, ...] = s.approach.all()
    estimates = tuple(a.estimate(points, weights) for a in approaches)
    bands = tuple(
        bootstrap(a, points, e, s.bootstrap, s.seed, weights) for a, e in zip(approaches, estimates)
    )
    mean_compute = float(np.exp(np.log(points.compute_flops).mean()))
    budgets = (*s.predict_flops, _NEXT_DECADE * float(points.compute_flops.max()))
    predictions = [predict(e, b, c) for c in sorted(set(budgets)) for e, b in zip(estimates, bands)]
    extrapolation_factor = max(budgets) / float(points.compute_flops.max())
    compared = compare_approaches(estimates, bands, mean_compute)
    estimates, bias = _with_bias(s, estimates, points, mean_compute)
    estimates = tuple(
        replace(
            e,
            diagnostics=(
                *e.diagnostics,
                *interval_caveats(e, b, a.default_unit(points), extrapolation_factor),
            ),
        )
        for a, e, b in zip(approaches, estimates, bands)
    )
    others = sensitivity(approaches, estimates, points, weights) if s.sensitivity else ()
    laws = LawAnalysis(observations, points, weights, mean_compute, estimates, bands)
    return Analysis(
        observations,
        s,
        estimates,
        bands,
        mean_compute,
        tuple(predict(e, b, mean_compute) for e, b in zip(estimates, bands)),
        explain_disagreement(compared, others, estimates, bias),
        others,
        backtest(approaches, points, s.bootstrap, s.seed, weights) if s.backtest else (),
        tuple(p for p in predictions if p is not None),
        grid_bias=bias,
        findings=find_all(StudyInput(s, records or SweepRecords(), laws)),
    )


@np.errstate(all="ignore")
def find_in_records(records: SweepRecords, settings: AnalysisSettings | None = None) -> tuple[Finding, ...]:
    """What the studies find in runs to which no law can be fitted.

    Raises:
        UserError: the study that `settings.study` names does not exist, or its data are not there.
    """
    return find_all(StudyInput(settings or AnalysisSettings(), records))


@dataclass(frozen=True)
class SweepResult:
    """What the records of a sweep gave: an analysis, or findings alone and the reason why there is no law."""

    analysis: Analysis | None
    findings: tuple[Finding, ...]
    problem: str | None = None


def analyze_records(records: SweepRecords, settings: AnalysisSettings | None = None) -> SweepResult:
    """The analysis of a sweep; where no law can be fitted to its runs, what the studies find in them.

    Raises:
        UserError: the study that `settings.study` names does not exist, or its data are not there.
    """
    s = settings or AnalysisSettings()
    try:
        records.require_law()
        analysis = analyze(observations_of_sweep(records.law, s), s, records)
    except UserError as error:
        return SweepResult(None, find_in_records(records, s), str(error))
    return SweepResult(analysis, analysis.findings)


def require_result(result: SweepResult, records: SweepRecords, settings: AnalysisSettings) -> None:
    """Raise `UserError` where a sweep gave nothing of what was asked: without a law, unless findings alone were wanted.

    Runs of which some can have a law are an error without one, unless one study was asked for.
    """
    if result.analysis is None and (not result.findings or (records.law and settings.study is None)):
        raise UserError(str(result.problem))


def _with_bias(
    settings: AnalysisSettings, estimates: tuple[Estimate, ...], points: Observations, compute_flops: float
) -> tuple[tuple[Estimate, ...], GridBias | None]:
    """The estimates, IsoFLOP's with the bias of its grid among its diagnostics, and that bias."""
    envelope, found, fitted = estimates
    isoflop, parametric = IsoFlop(settings.approach.isoflop), Parametric(settings.approach.parametric)
    bias = grid_bias(isoflop, found, parametric, fitted, points, compute_flops)
    if bias is None:
        return estimates, None
    sentence = bias_sentence(bias, found, settings.approach.isoflop.minimum)
    return (envelope, replace(found, diagnostics=(*found.diagnostics, sentence)), fitted), bias


def point_weights(points: Observations, settings: AnalysisSettings) -> Array | None:
    """(points,) 1 / sem^2 with mean 1, or None."""
    if settings.weights is None:
        return None
    missing = int(np.count_nonzero(~np.isfinite(points.loss_sem_nats)))
    if missing:
        raise UserError(
            f"weights=loss_sem needs a loss_sem for every point; {missing} of {points.n_points} have none."
        )
    w = points.loss_sem_nats**-2.0
    return w / w.mean()
