"""Owns the comparison of trained models' exponents in D with those that the frequencies of facts predict (`zipf_facts`).

What a model does not know after D statements is taken to be what a reader would not have seen after D / tau: tau, how often
a fact must be stated on average to be known, is the one number that is fitted. The share unknown then has a local exponent,
and far from both ends Michaud et al.'s s / (1 + s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import linregress

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.sources.generation.zipf_exposure import (
    asymptotic_exponent,
    expected_share_unknown,
    unknown_exponent,
)
from scaling_lab.core.sources.zipf_facts import ZipfFacts

# A scale beyond these is no scale: a model that needs a million statements of a fact does not learn facts.
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
    """The tau that each run alone would have: a constant where the prediction holds; None for a run that no tau explains."""
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
        """How far the prediction is off, root mean square of ln(measured / predicted)."""
        return float(np.sqrt(np.mean(np.log(self.measured / self.predicted) ** 2)))


def exponent_of(x: ArrayLike, y: ArrayLike) -> Exponent:
    """Of y ~ x^-exponent; at least three points, all positive."""
    line = linregress(np.log(x), np.log(y))
    return Exponent(-float(line.slope), float(line.stderr))


def fitted_scale(source: ZipfFacts, statements: ArrayLike, unknown: ArrayLike) -> float:
    """tau by which the share unknown at `statements` / tau is nearest to `unknown` in the mean square of its logarithm.

    Raises `UserError` where no scale within `SCALES` fits best.
    """
    d, log_unknown = np.asarray(statements, dtype=np.float64), np.log(np.asarray(unknown, dtype=np.float64))

    def badness(log_scale: float) -> float:
        expected = [expected_share_unknown(source, each / math.exp(log_scale)) for each in d]
        return float(((np.log(expected) - log_unknown) ** 2).sum())

    low, high = (math.log(each) for each in SCALES)
    # The sum of squares has one valley, but is flat where nothing is known: the search begins at a grid's best point.
    grid = np.linspace(low, high, 40)
    at = int(np.argmin([badness(each) for each in grid]))
    if at in (0, len(grid) - 1):
        raise UserError(
            f"data=zipf_facts, slope {source.slope:g}: no scale from {SCALES[0]:g} to {SCALES[1]:g} brings the share "
            "unknown to what the models do not know: they know nothing, or more than they can have read."
        )
    found = minimize_scalar(badness, bounds=(grid[at - 1], grid[at + 1]), method="bounded")
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
    # Who does not know a value guesses among all letters.
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
