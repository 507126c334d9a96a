"""Owns the analysis as a whole: `analyze(observations, settings) -> Analysis`, and reading observations for it.

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

from scaling_lab.analysis.approaches import IsoFlop, Parametric
from scaling_lab.analysis.approaches.isoflop.grid_bias import GridBias, bias_sentence, grid_bias
from scaling_lab.analysis.data.observations import AS_GIVEN, Observations, from_table
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.analysis.data.tables import read_table
from scaling_lab.analysis.estimate import Array, Estimate, FitStatus
from scaling_lab.analysis.inference.agreement import Agreement, agreement, explained
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.bootstrap import Approach, bootstrap
from scaling_lab.analysis.inference.caveats import caveats
from scaling_lab.analysis.inference.law_comparison import LawComparison, compare_laws
from scaling_lab.analysis.inference.prediction import Backtest, Prediction, backtest, predict
from scaling_lab.analysis.inference.profiles import Profile, profile
from scaling_lab.analysis.inference.sensitivity import SensitivityRow, sensitivity
from scaling_lab.analysis.laws import get_law, law_names
from scaling_lab.analysis.settings import ALL_LAWS, AnalysisSettings
from scaling_lab.analysis.studies.known_floor import KnownFloor, known_floor
from scaling_lab.analysis.studies.skills import Skills, skill_optima
from scaling_lab.analysis.studies.tuning import Tuning
from scaling_lab.analysis.studies.tuning_records import TunedRecords, tuning_of
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord

# Where the optimum is predicted by default, in multiples of the largest observed compute: the next decade.
_NEXT_DECADE = 10.0


@dataclass(frozen=True)
class Analysis:
    """Everything that the report and analysis.json say, as values."""

    observations: Observations
    """Every row, before `points` chose among them."""
    settings: AnalysisSettings
    estimates: tuple[Estimate, ...]
    """Always envelope, isoflop, parametric, in this order."""
    bands: tuple[Band, ...]
    """One an estimate."""
    mean_compute_flops: float
    """Geometric mean of the points' FLOPs, where all approaches are compared."""
    at_mean_compute: tuple[Prediction | None, ...]
    agreement: Agreement
    sensitivity: tuple[SensitivityRow, ...]
    backtest: tuple[Backtest, ...]
    predictions: tuple[Prediction, ...]
    skills: Skills | None = None
    """The optimum of every column of `metrics`; None where none was asked for."""
    law_comparison: LawComparison | None = None
    """Laws by their error out of sample; None where `compare_laws` names none."""
    profile: Profile | None = None
    """Profile-likelihood intervals of the parametric fit (None where they were not asked for)."""
    tuning: Tuning | None = None
    """What the runs owe to their learning rates; None where no runs tell."""
    known_floor: KnownFloor | None = None
    """The true irreducible loss beside the fitted one (None where the corpus's entropy is not known)."""
    grid_bias: GridBias | None = None
    """The bias that IsoFLOP's sizes and budgets give it, under the fitted law; None where that cannot be told."""

    @cached_property
    def points(self) -> Observations:
        """The points that IsoFLOP and the parametric fit used."""
        return select_points(self.observations, self.settings)

    def estimate(self, approach: str) -> Estimate:
        return next(e for e in self.estimates if e.approach == approach)

    def band(self, approach: str) -> Band:
        return next(b for b in self.bands if b.approach == approach)

    def __repr__(self) -> str:
        """Short: the arrays of an analysis are thousands of numbers long."""
        return f"Analysis({self.observations!r}, {', '.join(map(repr, self.estimates))})"

    def to_json_dict(
        self, command: str = "", versions: dict[str, str] | None = None, source: str | None = None
    ) -> dict[str, Any]:
        """analysis.json as plain data: see analysis.schema.json."""
        from scaling_lab.analysis.analysis_json import to_json_dict

        return to_json_dict(self, command, versions, source)


def read_observations(path: str | Path, settings: AnalysisSettings | None = None) -> Observations:
    """Observations from a CSV, Parquet, JSON or JSON-lines table, as the settings say (metric, where, columns, units, ...).

    Raises:
        UserError: no such file, a missing column, too few usable rows.
    """
    s = settings or AnalysisSettings()
    table = read_table(
        path, columns=s.columns, where=s.where, metric=s.metric, metrics=s.metrics, units=s.units
    )
    return from_table(table, convention=s.convention or AS_GIVEN, strict=s.strict)


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
    """One point a run (`points=final`) or every row."""
    return observations.final() if settings.points == "final" else observations


# Starts, resamples and extrapolations may leave float64; whoever uses a number checks that it is finite.
@np.errstate(all="ignore")
def analyze(
    observations: Observations,
    settings: AnalysisSettings | None = None,
    tuned: TunedRecords | None = None,
) -> Analysis:
    """The three approaches with their intervals, whether they agree, how they react to choices, and how they predict.

    An approach that cannot be applied returns an estimate that says why; it is not an error.

    Args:
        tuned: records that measure the tuning debt of the observations' runs (`tuning_records.split_by_role`).

    Raises:
        UserError: the law needs a column that is missing, or weights=loss_sem without standard errors.
    """
    s = settings or AnalysisSettings()
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
    farthest = max(budgets) / float(points.compute_flops.max())
    compared = agreement(estimates, bands, mean_compute)
    estimates, bias = _with_bias(s, estimates, points, mean_compute)
    estimates = tuple(
        replace(e, diagnostics=(*e.diagnostics, *caveats(e, b, a.default_unit(points), farthest)))
        for a, e, b in zip(approaches, estimates, bands)
    )
    others = sensitivity(approaches, estimates, points, weights) if s.sensitivity else ()
    return Analysis(
        observations,
        s,
        estimates,
        bands,
        mean_compute,
        tuple(predict(e, b, mean_compute) for e, b in zip(estimates, bands)),
        explained(compared, others, estimates, bias),
        others,
        backtest(approaches, points, s.bootstrap, s.seed, weights) if s.backtest else (),
        tuple(p for p in predictions if p is not None),
        skill_optima(observations, s, mean_compute),
        _law_comparison(points, s),
        _profile(points, estimates[2], s, weights),
        _tuning(tuned, points, s, approaches, estimates),
        known_floor=known_floor(points, Parametric(s.approach.parametric), estimates[2], bands[2], weights),
        grid_bias=bias,
    )


def anything_estimated(analysis: Analysis) -> bool:
    """Whether at least one approach gave a frontier or an identified fit."""
    return any(
        e.status not in (FitStatus.NOT_APPLICABLE, FitStatus.NOT_IDENTIFIED) for e in analysis.estimates
    )


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


def _law_comparison(points: Observations, settings: AnalysisSettings) -> LawComparison | None:
    """The laws of `compare_laws`, and the analysis's own, on the same points; rows of one run are left out together."""
    if not settings.compare_laws:
        return None
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


def _tuning(
    tuned: TunedRecords | None,
    points: Observations,
    settings: AnalysisSettings,
    approaches: tuple[Approach, ...],
    estimates: tuple[Estimate, ...],
) -> Tuning | None:
    if tuned is None:
        return None
    if settings.metric is not None:
        tuned = tuned.with_loss(settings.metric)
    return tuning_of(tuned, points, approaches, estimates, settings.bootstrap.level, settings.seed)


def _profile(
    points: Observations, parametric: Estimate, settings: AnalysisSettings, weights: Array | None
) -> Profile | None:
    if not settings.profile:
        return None
    approach = Parametric(settings.approach.parametric)
    return profile(approach, points, parametric, settings.bootstrap.level, weights)


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
