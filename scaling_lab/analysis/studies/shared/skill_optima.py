"""The three approaches on several loss columns of the same runs, and the ratios of their optima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from scaling_lab.analysis.data.observations import Curves, Observations
from scaling_lab.analysis.data.table_observations import MIN_ROWS
from scaling_lab.analysis.estimate import Array, Estimate, Interval
from scaling_lab.analysis.frontiers import at_compute
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.bootstrap import Approach, bootstrap
from scaling_lab.analysis.inference.prediction import Prediction, predict
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.errors import unknown

# Without a grid of budgets (more values than this), so many log-spaced ones stand for the range.
_MOST_BUDGETS, _SPREAD_BUDGETS = 12, 5
# The approach whose numbers are quoted where several have a frontier: the one that assumes least about the law.
_PREFERRED = ("isoflop", "parametric", "envelope")


@dataclass(frozen=True)
class Skill:
    """The analysis of one loss column."""

    column: str
    n_runs: int
    n_points: int
    n_left_out: int
    """Points without a usable value in this column."""
    message: str | None
    """Why there is no analysis, where there is none."""
    estimates: tuple[Estimate, ...] = ()
    bands: tuple[Band, ...] = ()
    at_mean_compute: tuple[Prediction | None, ...] = ()
    """One an approach, at the mean compute of the whole analysis: the same for every column."""
    at_budgets: tuple[Prediction, ...] = ()
    """Every approach with a frontier at every budget of the table."""

    @property
    def best(self) -> Prediction | None:
        """The optimum at the mean compute by the approach that is quoted first."""
        found = {p.approach: p for p in self.at_mean_compute if p is not None}
        return next((found[name] for name in _PREFERRED if name in found), None)


@dataclass(frozen=True)
class SkillRatio:
    """N_opt of one column over that of another, at the mean compute, by one approach."""

    columns: tuple[str, str]
    approach: str
    compute_flops: float
    ratio: float
    interval: Interval | None
    """Treats the columns' resamples as independent; as the runs are the same, the ratio is, if anything, better known."""
    differ: bool | None
    """Whether the interval excludes 1; None without an interval."""


@dataclass(frozen=True)
class Skills:
    """All loss columns asked for, in the order given."""

    columns: tuple[Skill, ...]
    ratios: tuple[SkillRatio, ...]
    """Every pair of columns and every approach that has a frontier for both."""
    budgets_flops: tuple[float, ...]
    compute_flops: float


def skill_optima(
    observations: Observations, settings: AnalysisSettings, compute_flops: float
) -> Skills | None:
    """Analyze every column of `settings.metrics`; None where none is asked for.

    Args:
        observations: every row; the columns are the loss and the further numeric columns.
        compute_flops: where the columns are compared.

    Raises:
        UserError: a column that does not exist.
    """
    if not settings.metrics:
        return None
    budgets = _budgets(observations)
    found = tuple(
        _skill(column, observations, replace(settings, seed=settings.seed + 1 + i), budgets, compute_flops)
        for i, column in enumerate(settings.metrics)
    )
    ratios = [
        ratio
        for one, two in combinations(found, 2)
        for ratio in _ratios(one, two, compute_flops, settings.bootstrap.level)
    ]
    return Skills(found, tuple(ratios), budgets, compute_flops)


def _skill(
    column: str,
    observations: Observations,
    settings: AnalysisSettings,
    budgets: Sequence[float],
    compute_flops: float,
) -> Skill:
    loss = column_of(observations, column)
    usable = np.isfinite(loss) & (loss > 0)
    rows = replace(observations, loss_nats=loss, loss_sem_nats=np.full(loss.size, np.nan)).points(usable)
    # In a table the rows are also the curves, of this column's loss.
    rows = replace(rows, separate_curves=_curves_of(observations, column))
    with_rows = np.bincount(rows.run_index, minlength=rows.n_runs) > 0
    left_out = int(np.count_nonzero(~usable))
    if int(usable.sum()) < MIN_ROWS:
        why = f"{int(usable.sum())} row(s) have a finite, positive value; at least {MIN_ROWS} are needed."
        return Skill(column, int(with_rows.sum()), int(usable.sum()), left_out, why)
    rows = rows.runs(with_rows)
    points = rows.final() if settings.points == "final" else rows
    approaches: tuple[Approach, ...] = settings.approach.all()
    estimates = tuple(a.estimate(points) for a in approaches)
    bands = tuple(
        bootstrap(a, points, e, settings.bootstrap, settings.seed) for a, e in zip(approaches, estimates)
    )
    pairs = list(zip(estimates, bands))
    at_budgets = (predict(e, b, c) for e, b in pairs for c in budgets)
    return Skill(
        column,
        points.n_runs,
        points.n_points,
        left_out,
        None,
        estimates,
        bands,
        tuple(predict(e, b, compute_flops) for e, b in pairs),
        tuple(p for p in at_budgets if p is not None),
    )


def column_of(observations: Observations, column: str) -> Array:
    """(points,) a loss column by name. Raises `UserError` with the names there are."""
    if column == "loss":
        return observations.loss_nats
    if column not in observations.extra:
        raise unknown("metrics", column, ("loss", *observations.extra))
    return observations.extra[column]


def _curves_of(observations: Observations, column: str) -> Curves | None:
    """A column's own curves; None where there are only its rows."""
    if column == "loss":
        return observations.separate_curves
    return observations.column_curves.get(column)


def _budgets(observations: Observations) -> tuple[float, ...]:
    """The table's budgets, or a few over its range where it has no grid of them."""
    final = observations.final().with_budgets()
    values = np.unique(final.budget_flops)
    if values.size > _MOST_BUDGETS:
        values = np.geomspace(final.compute_flops.min(), final.compute_flops.max(), _SPREAD_BUDGETS)
    return tuple(float(v) for v in values)


def _ratios(one: Skill, two: Skill, compute_flops: float, level: float) -> list[SkillRatio]:
    out = []
    for p, q, band_p, band_q in zip(one.at_mean_compute, two.at_mean_compute, one.bands, two.bands):
        if p is None or q is None:
            continue
        interval = _ratio_interval(band_p, band_q, compute_flops, level)
        differ = None if interval is None else not interval.contains(1.0)
        ratio = p.params_opt.estimate / q.params_opt.estimate
        out.append(SkillRatio((one.column, two.column), p.approach, compute_flops, ratio, interval, differ))
    return out


def _ratio_interval(one: Band, two: Band, compute_flops: float, level: float) -> Interval | None:
    if not one.samples or not two.samples:
        return None
    # Each column was resampled with a seed of its own, so the k-th samples are independent.
    x, y = (np.log(at_compute(b.samples, compute_flops)["params_opt"]) for b in (one, two))
    size = min(x.size, y.size)
    difference = x[:size] - y[:size]
    difference = difference[np.isfinite(difference)]
    if difference.size < 20:
        return None
    tail = (1 - level) / 2
    lo, hi = np.exp(np.quantile(difference, [tail, 1 - tail]))
    return Interval(float(lo), float(hi))
