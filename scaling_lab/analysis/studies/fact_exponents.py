"""Study: trained models' exponents in D next to those that the frequencies of facts predict (`data=zipf_facts`).

What a model does not know after D statements is taken to be what a reader would not have seen after D / tau: tau, how often
a fact must be stated on average to be known, is the one number that is fitted. The share unknown then has a local exponent,
and far from both ends Michaud et al.'s s / (1 + s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

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
    PublishedValue,
    Series,
    values,
)
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.sources.generation.zipf_exposure import (
    asymptotic_exponent,
    expected_share_unknown,
    unknown_exponent,
)
from scaling_lab.core.sources.zipf_facts import ZipfFacts

QUESTION = "Does the loss of facts fall with D as the frequencies of the facts predict?"
NEEDS = "completed runs of data=zipf_facts: one size at three numbers of training tokens or more"

# Scales beyond these are not credible: a model that needs a million statements of a fact does not learn facts.
SCALES = (1e-2, 1e6)
MIN_HORIZONS = 3


@dataclass(frozen=True)
class Exponent:
    """-slope of ln y over ln D by least squares."""

    value: float
    standard_error: float
    """From the scatter about the line; a curve that bends widens it."""


@dataclass(frozen=True)
class Comparison:
    """One score of one corpus against its prediction."""

    score: str
    """`1 - exact_match`, a share, or `value_loss_nats`, nats per token of a value."""
    source: ZipfFacts
    train_tokens: NDArray[np.float64]
    """D of each run, ascending, (n,)."""
    measured: NDArray[np.float64]
    """The score of each run, (n,)."""
    predicted: NDArray[np.float64]
    """The same with the fitted scale, (n,)."""
    scale: float
    """tau."""
    scale_of_each: tuple[float | None, ...]
    """The tau of each run alone: constant where the prediction holds; None for a run that no tau explains."""
    exponent: Exponent
    predicted_exponent: float
    """Of `predicted`, by the same least squares over the same D."""
    local_exponents: tuple[float, float]
    """Predicted at the smallest and at the largest D."""

    @property
    def asymptote(self) -> float:
        return asymptotic_exponent(self.source.slope)

    @property
    def rms_log(self) -> float:
        """Error of the prediction, root mean square of ln(measured / predicted)."""
        return float(np.sqrt(np.mean(np.log(self.measured / self.predicted) ** 2)))


def find(given: StudyInput) -> Finding | None:
    records = of_one_size(given.records.all)
    if not records:
        return None
    try:
        found = comparisons(records)
    except (
        UserError
    ) as error:  # a score of 0, or one that no scale explains: the data are there, and give no answer
        return Finding(
            name="fact_exponents",
            title="Exponents predicted from frequencies",
            question=QUESTION,
            answer="The measured scores cannot be compared with the prediction.",
            status=FindingStatus.NOT_ANSWERED,
            reason=str(error),
        )
    return as_finding(found)


def of_one_size(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Of each corpus of facts the completed runs of the largest size that was trained at enough horizons."""
    done = [
        r
        for r in records
        if r.status is RunStatus.COMPLETED
        and isinstance(r.spec.data, ZipfFacts)
        and {"exact_match", "value_loss_nats"} <= r.metrics.keys()
    ]
    kept: list[RunRecord] = []
    for source in dict.fromkeys(r.spec.data for r in done):
        by_size: dict[float, list[RunRecord]] = {}
        for r in done:
            if r.spec.data == source:
                by_size.setdefault(r.spec.n_params(), []).append(r)
        enough = [n for n, own in by_size.items() if len({r.spec.train_tokens for r in own}) >= MIN_HORIZONS]
        kept += by_size[max(enough)] if enough else []
    return kept


def as_finding(found: Sequence[Comparison]) -> Finding:
    """The exponents of every corpus and score, and the figure."""
    told = "; ".join(
        f"at slope {c.source.slope:g} {_SCORES[c.score]} falls as D^-{c.exponent.value:.3f} "
        f"(± {c.exponent.standard_error:.3f}), where the frequencies predict D^-{c.predicted_exponent:.3f}"
        for c in found
    )
    return Finding(
        name="fact_exponents",
        title="Exponents predicted from frequencies",
        question=QUESTION,
        answer=f"{told[:1].upper()}{told[1:]}.",
        quantities=_quantities(found),
        tables=(_table(found),),
        chart=_chart(found),
    )


def exponent_of(x: ArrayLike, y: ArrayLike) -> Exponent:
    """Of y ~ x^-exponent; at least three points, all positive."""
    line = scipy.stats.linregress(np.log(x), np.log(y))
    return Exponent(-float(line.slope), float(line.stderr))


def fitted_scale(source: ZipfFacts, statements: ArrayLike, unknown: ArrayLike) -> float:
    """The tau at which the share unknown at `statements` / tau is nearest to `unknown`, in mean square of its logarithm.

    Raises `UserError` where no scale within `SCALES` fits best.
    """
    d, log_unknown = np.asarray(statements, dtype=np.float64), np.log(np.asarray(unknown, dtype=np.float64))

    def misfit(log_scale: float) -> float:
        expected = [expected_share_unknown(source, each / math.exp(log_scale)) for each in d]
        return float(((np.log(expected) - log_unknown) ** 2).sum())

    low, high = (math.log(each) for each in SCALES)
    # The sum of squares has one minimum, but is flat where nothing is known: the search begins at a grid's best point.
    grid = np.linspace(low, high, 40)
    at = int(np.argmin([misfit(each) for each in grid]))
    if at in (0, len(grid) - 1):
        raise UserError(
            f"data=zipf_facts, slope {source.slope:g}: no scale from {SCALES[0]:g} to {SCALES[1]:g} brings the "
            "predicted share unknown to the measured one: the models know nothing, or more than they can have read."
        )
    found = scipy.optimize.minimize_scalar(misfit, bounds=(grid[at - 1], grid[at + 1]), method="bounded")
    return math.exp(float(found.x))


def _scale_of_one(source: ZipfFacts, statements: float, unknown: float) -> float | None:
    try:
        return fitted_scale(source, [statements], [unknown])
    except UserError:
        return None


def compare(
    source: ZipfFacts, train_tokens: Sequence[float], score: str, measured: Sequence[float]
) -> Comparison:
    """One score at several D. Raises `UserError` for fewer than three D or a score that is not positive."""
    order = np.argsort(np.asarray(train_tokens, dtype=np.float64), kind="stable")
    d = np.asarray(train_tokens, dtype=np.float64)[order]
    y = np.asarray(measured, dtype=np.float64)[order]
    if len(np.unique(d)) < MIN_HORIZONS:
        raise UserError(
            f"{score}: {len(np.unique(d))} horizons, an exponent needs at least {MIN_HORIZONS} (design.horizons_tokens)."
        )
    if not (y > 0).all():
        raise UserError(
            f"{score} is 0 at D={d[y <= 0][0]:.3g} tokens: raise eval.tokens, or lower design.horizons_tokens."
        )
    # A model that does not know a value guesses among all letters.
    unit = math.log(source.symbols) if score == "value_loss_nats" else 1.0
    statements = d / source.statement_tokens
    tau = fitted_scale(source, statements, y / unit)
    predicted = unit * np.array([expected_share_unknown(source, each / tau) for each in statements])
    return Comparison(
        score=score,
        source=source,
        train_tokens=d,
        measured=y,
        predicted=predicted,
        scale=tau,
        scale_of_each=tuple(
            _scale_of_one(source, each, share) for each, share in zip(statements, y / unit, strict=True)
        ),
        exponent=exponent_of(d, y),
        predicted_exponent=exponent_of(d, predicted).value,
        local_exponents=(
            unknown_exponent(source, statements[0] / tau),
            unknown_exponent(source, statements[-1] / tau),
        ),
    )


def comparisons(records: Sequence[RunRecord]) -> list[Comparison]:
    """Both scores of each corpus of facts among the records, by slope. Raises `UserError` where there is none."""
    done = [r for r in records if r.status == RunStatus.COMPLETED and isinstance(r.spec.data, ZipfFacts)]
    if not done:
        raise UserError("no completed run of data=zipf_facts is among the records.")
    found = []
    for source in sorted({r.spec.data for r in done}, key=lambda each: each.slope):
        of_source = [r for r in done if r.spec.data == source]
        d = [r.spec.train_tokens for r in of_source]
        found.append(compare(source, d, "1 - exact_match", [1 - r.metrics["exact_match"] for r in of_source]))
        found.append(compare(source, d, "value_loss_nats", [r.metrics["value_loss_nats"] for r in of_source]))
    return found


# -- as a finding

_SCORES = {"1 - exact_match": "the share of values not known", "value_loss_nats": "the loss of values"}
_TITLES = {"1 - exact_match": "values not known, share", "value_loss_nats": "loss of values, nats per token"}


def _quantities(found: Sequence[Comparison]) -> tuple[KeyQuantity, ...]:
    quantities = []
    for c in found:
        error = c.exponent.standard_error
        limit = PublishedValue(
            c.asymptote, "s / (1 + s) of infinitely many facts, Michaud et al. 2023 (arXiv 2303.13506)"
        )
        name = f"exponent in D of {_SCORES[c.score]}, slope {c.source.slope:g}"
        # Two standard errors on either side.
        ends = (c.exponent.value - 2 * error, c.exponent.value + 2 * error)
        quantities.append(KeyQuantity(name, c.exponent.value, ends, form=".3f", published=(limit,)))
    return tuple(quantities)


def _table(found: Sequence[Comparison]) -> FindingTable:
    rows: list[tuple[Cell, ...]] = [
        (
            c.source.slope, c.score, c.exponent.value, c.exponent.standard_error, c.predicted_exponent,
            "{:.3f} to {:.3f}".format(*c.local_exponents), c.asymptote, c.scale, c.rms_log,
        )
        for c in found
    ]  # fmt: skip
    return FindingTable(
        name="exponents",
        caption="Exponents in D, measured and predicted",
        columns=(
            Column("slope s", "g"), Column("score"), Column("measured", ".3f"), Column("standard error", ".3f"),
            Column("predicted", ".3f"), Column("local", ".3f"), Column("s / (1 + s)", ".3f"), Column("tau", ".2f"),
            Column("rms of ln(measured / predicted)", ".3f"),
        ),
        rows=tuple(rows),
        note="Measured: -d ln(score) / d ln(D) by least squares over the runs. Predicted: the same of the share of facts not "
        "among D / tau statements, with tau fitted. Local: predicted at the smallest and at the largest D.",
    )  # fmt: skip


def _chart(found: Sequence[Comparison]) -> Chart:
    """Each score against D: dots are runs, lines the prediction with its fitted scale, dashes the slope s / (1 + s)."""
    tokens = Axis("D, training tokens", log=True, form="count")
    panels = []
    for score, title in _TITLES.items():
        series: list[Series] = []
        for color, c in enumerate(c for c in found if c.score == score):
            d = values(c.train_tokens)
            label = f"s = {c.source.slope:g}: {c.exponent.value:.2f}, predicted {c.predicted_exponent:.2f}"
            limit = c.predicted[0] * (c.train_tokens / c.train_tokens[0]) ** -c.asymptote
            series += [
                Series("points", d, values(c.measured), label=label, color=str(color)),
                Series("line", d, values(c.predicted), color=str(color)),
                Series("line", d, values(limit), color=str(color), marker=1),
            ]
        panels.append(Panel(tokens, Axis("", log=True, form="sig2"), tuple(series), title=title))
    return Chart(
        name="fact_exponents",
        title="Scores against training tokens",
        caption="Dots are runs. The line is the prediction from the frequencies of the facts with its one fitted scale, tau; "
        "the dashed line has the slope s / (1 + s) of infinitely many facts.",
        alt=_alt(found),
        panels=tuple(panels),
        columns=2,
        height_inches=3.2,
    )


def _alt(found: Sequence[Comparison]) -> str:
    """Measured and predicted exponents in words."""
    return "Scores against training tokens on log axes: " + "; ".join(
        f"{c.score} at slope {c.source.slope:g} measured {c.exponent.value:.3f}, predicted {c.predicted_exponent:.3f}"
        for c in found
    )
