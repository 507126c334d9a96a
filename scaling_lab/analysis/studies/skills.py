"""Study: the three approaches on several loss columns of the same runs, and whether their optima differ.

A model is trained once and evaluated on many sets (code, knowledge, another language). Each set's loss has its own
compute-optimal size: what is learned from rare facts asks for more parameters, what is learned from rules for fewer. Here
every column is analyzed like the loss itself, on the same runs, and N_opt is compared between columns.
"""

from __future__ import annotations

from typing import Any

from scaling_lab.analysis.estimate import Interval
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
from scaling_lab.analysis.inference.prediction import Quantity
from scaling_lab.analysis.json_parts import estimate_json, interval_json, number, prediction_json
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.analysis.studies.shared.skill_optima import Skill, SkillRatio, Skills, skill_optima
from scaling_lab.analysis.text import SHORT_APPROACH_NAMES, format_count, format_flops, format_range

QUESTION = "How large is the best model for each loss, and do the losses differ in that?"
NEEDS = "two loss columns or more: metrics=[NAME,NAME]"


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
