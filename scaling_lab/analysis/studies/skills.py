"""Study: the three approaches on several loss columns of the same runs, and whether their optima differ.

A model is trained once and evaluated on many sets (code, knowledge, another language). Each set's loss has its own
compute-optimal size: what is learned from rare facts asks for more parameters, what is learned from rules for fewer. Here
every column is analyzed like the loss itself, on the same runs, and N_opt is compared between columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from scaling_lab.analysis.data.observations import MIN_ROWS, Curves, Observations
from scaling_lab.analysis.estimate import Array, Estimate, Interval
from scaling_lab.analysis.finding import (
    Axis,
    Cell,
    Chart,
    Column,
    Finding,
    FindingStatus,
    FindingTable,
    KeyQuantity,
    Panel,
    Series,
)
from scaling_lab.analysis.frontiers import at_compute
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.bootstrap import Approach, bootstrap
from scaling_lab.analysis.inference.prediction import Prediction, Quantity, predict
from scaling_lab.analysis.json_parts import estimate_json, interval_json, number, prediction_json
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.analysis.text import SHORT_APPROACH_NAMES, format_count, format_flops, format_range
from scaling_lab.core.errors import unknown

QUESTION = "How large is the best model for each loss, and do the losses differ in that?"
NEEDS = "two loss columns or more: metrics=[NAME,NAME]"

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


def find(given: StudyInput) -> Finding | None:
    if given.laws is None:
        return None
    skills = skill_optima(given.laws.observations, given.settings, given.laws.mean_compute_flops)
    if skills is None:
        return None
    best = [(skill.column, skill.best) for skill in skills.columns]
    any_best = any(b is not None for _, b in best)
    return Finding(
        name="skills",
        title="Optima per skill",
        question=QUESTION,
        answer=_answer(skills),
        status=FindingStatus.ANSWERED if any_best else FindingStatus.NOT_ANSWERED,
        reason=None if any_best else " ".join(_why_no_optimum(s) for s in skills.columns),
        caveats=tuple(_why_no_optimum(s) for s in skills.columns if s.best is None) if any_best else (),
        level=given.settings.bootstrap.level,
        quantities=_quantities(skills),
        tables=(
            _optima_table(skills),
            *([_budget_table(skills)] if any_best else []),
            *([_ratio_table(skills)] if skills.ratios else []),
        ),
        chart=_chart(skills) if any_best else None,
        documented={"skills": _documented(skills)},
    )


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


# -- as a finding


def _why_no_optimum(skill: Skill) -> str:
    if skill.message is not None:
        return f"{skill.column}: {skill.message}"
    reasons = "; ".join(f"{SHORT_APPROACH_NAMES[e.approach]}: {e.message}" for e in skill.estimates)
    return f"{skill.column}: no approach has an optimum ({reasons})."


def _quoted_ratios(skills: Skills) -> list[SkillRatio]:
    """Of each pair the ratio by the approach that is quoted for both columns."""
    quoted = {s.column: s.best.approach for s in skills.columns if s.best is not None}
    return [r for r in skills.ratios if {quoted.get(c) for c in r.columns} == {r.approach}]


def _answer(skills: Skills) -> str:
    best = [(s.column, s.best) for s in skills.columns if s.best is not None]
    if not best:
        return "No loss column shows an optimum."
    told = ", ".join(f"{format_count(p.params_opt.estimate)} for {column}" for column, p in best)
    answer = f"At {format_flops(skills.compute_flops)} FLOPs the best N is {told}."
    words = {True: "they differ", False: "no difference beyond the intervals", None: "no interval"}
    ratios = [
        f"N_opt of {r.columns[0]} is {format_range(r.ratio, _ends(r.interval), 'sig3')} times that of {r.columns[1]}: "
        f"{words[r.differ]}"
        for r in _quoted_ratios(skills)
    ]
    return f"{answer} {'; '.join(ratios)}." if ratios else answer


def _quantities(skills: Skills) -> tuple[KeyQuantity, ...]:
    optima = [
        KeyQuantity(
            f"N_opt, {s.column}", s.best.params_opt.estimate, _ends(s.best.params_opt.interval), form="count"
        )
        for s in skills.columns
        if s.best is not None
    ]
    ratios = [
        KeyQuantity(f"N_opt of {r.columns[0]} over {r.columns[1]}", r.ratio, _ends(r.interval))
        for r in _quoted_ratios(skills)
    ]
    return (*optima, *ratios)


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.lo, interval.hi)


def _with_ends(quantity: Quantity | None) -> Cell:
    if quantity is None or quantity.interval is None:
        return None if quantity is None else quantity.estimate
    return (quantity.estimate, quantity.interval.lo, quantity.interval.hi)


def _optima_table(skills: Skills) -> FindingTable:
    """The optimum of every loss column at the mean compute, by every approach that has one."""
    rows: list[tuple[Cell, ...]] = []
    warnings: list[int] = []
    for skill in skills.columns:
        shown = [p for p in skill.at_mean_compute if p is not None]
        rows += [
            (
                skill.column,
                SHORT_APPROACH_NAMES[p.approach],
                _with_ends(p.params_opt),
                _with_ends(p.tokens_opt),
                _with_ends(p.tokens_per_param),
                _with_ends(p.loss_opt),
            )
            for p in shown
        ]
        if not shown:
            warnings.append(len(rows))
            rows.append((skill.column, *(None,) * 5))
    left_out = [f"{s.column}: {s.n_left_out}" for s in skills.columns if s.n_left_out]
    note = f"All at {format_flops(skills.compute_flops)} FLOPs, the mean of the runs."
    if left_out:
        note += f" Points without a usable loss in a column: {', '.join(left_out)}."
    return FindingTable(
        name="optima",
        caption="The best run for each loss",
        columns=(
            Column("loss"), Column("approach"), Column("best N", "count"), Column("best D", "count"),
            Column("D / N", "sig3"), Column("loss there", ".4f", "nats"),
        ),
        rows=tuple(rows),
        warnings=tuple(warnings),
        note=note,
        in_terminal=False,
    )  # fmt: skip


def _budget_table(skills: Skills) -> FindingTable:
    """The optimum of every loss column at every budget, by the approach that is quoted for it."""
    rows: list[tuple[Cell, ...]] = [
        (
            s.column if i == 0 else "",
            SHORT_APPROACH_NAMES[p.approach],
            p.compute_flops,
            _with_ends(p.params_opt),
            _with_ends(p.tokens_per_param),
            _with_ends(p.loss_opt),
        )
        for s in skills.columns
        if s.best is not None
        for i, p in enumerate(p for p in s.at_budgets if p.approach == s.best.approach)
    ]
    return FindingTable(
        name="budgets",
        caption="The best run for each loss at every budget",
        columns=(
            Column("loss"), Column("approach"), Column("FLOPs", "flops"), Column("best N", "count"),
            Column("D / N", "sig3"), Column("loss there", ".4f", "nats"),
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _ratio_table(skills: Skills) -> FindingTable:
    """How many times larger one column's best model is than another's."""
    words = {True: "yes", False: "no", None: "not known"}
    return FindingTable(
        name="ratios",
        caption="How the best sizes compare",
        columns=(Column("best N of"), Column("approach"), Column("ratio", "sig3"), Column("differ")),
        rows=tuple(
            (
                f"{r.columns[0]} over {r.columns[1]}",
                SHORT_APPROACH_NAMES[r.approach],
                r.ratio if r.interval is None else (r.ratio, r.interval.lo, r.interval.hi),
                words[r.differ],
            )
            for r in skills.ratios
        ),
        note="The runs are the same in every column, so the ratios are, if anything, better known than these intervals show.",
    )


def _chart(skills: Skills) -> Chart:
    """A row for each loss column, a marker for each approach, on a logarithmic axis of N."""
    found = [(i, p) for i, s in enumerate(skills.columns) for p in s.at_mean_compute if p is not None]
    approaches = [a for a in SHORT_APPROACH_NAMES if any(p.approach == a for _, p in found)]
    series, seen = [], []
    for rank, approach in enumerate(approaches):
        own = [(i, p.params_opt) for i, p in found if p.approach == approach]
        # An interval that reaches 0 has no place on a logarithmic axis.
        ends = [q.interval if q.interval is not None and q.interval.lo > 0 else None for _, q in own]
        beside = 0.24 * (rank - (len(approaches) - 1) / 2)
        series.append(
            Series(
                "points",
                tuple(q.estimate for _, q in own),
                tuple(i + beside for i, _ in own),
                tuple(None if e is None else e.lo for e in ends),
                tuple(None if e is None else e.hi for e in ends),
                label=SHORT_APPROACH_NAMES[approach],
                error_axis="x",
                color=approach,
            )
        )
        seen += [v for (_, q), e in zip(own, ends) for v in (q.estimate, *((e.lo, e.hi) if e else ()))]
    middle = sorted(seen)[len(seen) // 2]
    # An unbounded interval (a valley that some resamples do not show) must not shrink all others to a dot.
    inside = [v for v in seen if middle / 1e3 < v < middle * 1e3]
    told = "; ".join(
        f"{s.column}: N = {format_count(s.best.params_opt.estimate)}" for s in skills.columns if s.best
    )
    return Chart(
        name="skills",
        title="Optima per skill",
        caption=f"The best size at {format_flops(skills.compute_flops)} FLOPs for each loss: the same runs, evaluated on "
        "different text. A row further right asks for a larger model trained on fewer tokens. Where bars overlap, two "
        "skills may or may not differ; the table of ratios below gives it pair by pair.",
        alt=f"Best parameters of each loss column. {told}.",
        panels=(
            Panel(
                Axis("best parameters N", log=True, form="count", low=min(inside), high=max(inside)),
                Axis("", categories=tuple(s.column for s in skills.columns)),
                tuple(series),
            ),
        ),
        height_inches=1.1 + 0.42 * len(skills.columns),
    )


def _documented(skills: Skills) -> dict[str, Any]:
    """The field `skills` of analysis.json."""
    return {
        "compute_flops": skills.compute_flops,
        "budgets_flops": list(skills.budgets_flops),
        "columns": [
            {
                "column": s.column,
                "n_runs": s.n_runs,
                "n_points": s.n_points,
                "n_left_out": s.n_left_out,
                "message": s.message,
                "estimates": [
                    estimate_json(e, b, p, skills.compute_flops)
                    for e, b, p in zip(s.estimates, s.bands, s.at_mean_compute)
                ],
                "at_mean_compute": [prediction_json(p) for p in s.at_mean_compute if p is not None],
                "at_budgets": [prediction_json(p) for p in s.at_budgets],
            }
            for s in skills.columns
        ],
        "params_opt_ratios": [
            {
                "columns": list(r.columns),
                "approach": r.approach,
                "compute_flops": r.compute_flops,
                "ratio": number(r.ratio),
                "interval": interval_json(r.interval),
                "differ": r.differ,
            }
            for r in skills.ratios
        ],
    }
