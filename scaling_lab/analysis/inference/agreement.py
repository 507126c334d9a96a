"""Whether the three approaches agree within their intervals, and what explains a disagreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from scaling_lab.analysis.approaches.isoflop.grid_bias import GridBias
from scaling_lab.analysis.estimate import Array, Estimate, Interval
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.sensitivity import SensitivityRow

_NO_CHOICE = "No single other choice that was tried"
_EXPLAINS = "that choice explains it"


@dataclass(frozen=True)
class PairAgreement:
    """Comparison of one quantity between two approaches."""

    approaches: tuple[str, str]
    quantity: str
    """params_exponent, tokens_exponent, or params_opt at the mean compute (compared in ln)."""
    difference: float
    """First minus second."""
    interval: Interval | None
    agree: bool | None
    """None if an interval is missing."""


@dataclass(frozen=True)
class Agreement:
    """Comparison of all pairs of approaches that have a frontier."""

    agree: bool | None
    pairs: tuple[PairAgreement, ...]
    message: str


def compare_approaches(
    estimates: Sequence[Estimate], bands: Sequence[Band], compute_flops: float
) -> Agreement:
    """Compare all pairs of approaches: they agree if the interval of their difference contains 0.

    The samples of two approaches are treated as independent. Since both use the same runs, the true uncertainty of the
    difference is, if anything, smaller.
    """
    usable = [(e, b) for e, b in zip(estimates, bands) if e.frontier is not None]
    pairs = []
    for (one, band_one), (two, band_two) in combinations(usable, 2):
        for quantity in ("params_exponent", "tokens_exponent", "log_params_opt"):
            x, y = _value(one, quantity, compute_flops), _value(two, quantity, compute_flops)
            xs, ys = _samples(band_one, quantity, compute_flops), _samples(band_two, quantity, compute_flops)
            interval = _difference_interval(xs, ys, band_one.level)
            agree = None if interval is None or not np.isfinite(x - y) else interval.contains(0.0)
            pairs.append(PairAgreement((one.approach, two.approach), quantity, x - y, interval, agree))
    return _summary(estimates, usable, pairs)


def _summary(
    estimates: Sequence[Estimate], usable: Sequence[tuple[Estimate, Band]], pairs: Sequence[PairAgreement]
) -> Agreement:
    if len(usable) < 2:
        left_out = [e.approach for e in estimates if e.frontier is None]
        return Agreement(None, tuple(pairs), f"Nothing to compare: no frontier from {', '.join(left_out)}.")
    if all(p.agree is None for p in pairs):
        return Agreement(
            None, tuple(pairs), "The approaches cannot be compared, because they have no intervals."
        )
    apart = [p for p in pairs if p.agree is False]
    if not apart:
        unknown = sorted({a for p in pairs if p.agree is None for a in p.approaches})
        text = f"{', '.join(e.approach for e, _ in usable)} agree within their intervals."
        return Agreement(
            True, tuple(pairs), text + (f" Some have no intervals ({', '.join(unknown)})." if unknown else "")
        )
    worst = max(apart, key=_excess)
    names = {"log_params_opt": "N_opt at the mean compute", "params_exponent": "the exponent of N"}
    what = names.get(worst.quantity, "the exponent of D")
    size = _size(worst.quantity, worst.difference)
    reasons = [_possible_reason(e) for e, _ in usable if e.approach in worst.approaches]
    text = (
        f"{worst.approaches[0]} and {worst.approaches[1]} disagree on {what} ({size}; beyond their intervals). "
        + " ".join(r for r in reasons if r)
    ).strip()
    return Agreement(False, tuple(pairs), text)


def explain_disagreement(
    found: Agreement,
    rows: Sequence[SensitivityRow],
    estimates: Sequence[Estimate],
    bias: GridBias | None = None,
) -> Agreement:
    """Add to a disagreement what explains it: the bias of IsoFLOP's grid, another choice, or neither.

    The explanation is about the two approaches that are furthest apart. Without a disagreement `found` is returned
    unchanged.

    Args:
        rows: the sensitivity analysis; a choice explains a disagreement if it brings the approaches within their interval.
        bias: of IsoFLOP under the fitted law, at the compute where `found` compares N_opt; None if unknown.
    """
    worst = max((p for p in found.pairs if p.agree is False), key=_excess, default=None)
    if worst is None:
        return found
    apart = [p for p in found.pairs if p.agree is False and p.approaches == worst.approaches]
    by_bias, is_explained = _bias_sentence(worst, apart, bias)
    of_choices = max((p for p in apart if p.quantity != "log_params_opt"), key=_excess, default=None)
    by_choice = "" if of_choices is None else _choice_sentence(of_choices, rows, estimates)
    if is_explained:
        by_choice = (
            "" if by_choice.startswith(_NO_CHOICE) else by_choice.replace(_EXPLAINS, f"{_EXPLAINS} too")
        )
    reasons = " ".join(filter(None, (by_bias, by_choice)))
    return replace(found, message=f"{found.message.rstrip('.')}. {reasons}") if reasons else found


def _bias_sentence(
    worst: PairAgreement, apart: Sequence[PairAgreement], bias: GridBias | None
) -> tuple[str, bool]:
    """A sentence on whether correcting IsoFLOP's bias resolves the disagreement of a pair ('' if that does not apply), and
    whether it does for all quantities in which they are `apart`."""
    if bias is None or not bias.large or "isoflop" not in worst.approaches:
        return "", False
    sign = 1.0 if worst.approaches[0] == "isoflop" else -1.0
    left = {p.quantity: p.difference - sign * float(getattr(bias, p.quantity)) for p in apart}
    if not np.isfinite(left[worst.quantity]):
        return "", False
    size = _size(worst.quantity, left[worst.quantity])
    if all(abs(left[p.quantity]) <= _half_width(p) for p in apart):
        return (
            "The bias of IsoFLOP's sizes and budgets explains it: on noise-free losses of the fitted law it is off by as much;"
            f" corrected for this bias (grid_bias), {size} remains."
        ), True
    return (
        f"The bias of IsoFLOP's sizes and budgets does not explain it alone: corrected for it (grid_bias), {size} remains."
    ), False


def _choice_sentence(
    worst: PairAgreement, rows: Sequence[SensitivityRow], estimates: Sequence[Estimate]
) -> str:
    """A sentence on the choice that brings the exponents of a pair together, or that none does; '' if none was tried."""
    if not rows:
        return ""
    base = {e.approach: _value(e, worst.quantity, 1.0) for e in estimates if e.frontier is not None}
    other: dict[str, dict[str, float]] = {}
    for row in rows:
        value = getattr(row, worst.quantity)
        if row.kind != "influence" and row.approach in worst.approaches and value is not None:
            other.setdefault(row.choice, {})[row.approach] = value
    one, two = worst.approaches
    differences = {c: v.get(one, base[one]) - v.get(two, base[two]) for c, v in other.items()}
    what = "N" if worst.quantity == "params_exponent" else "D"
    closest = min(differences, key=lambda c: abs(differences[c]), default=None)
    if closest is not None and abs(differences[closest]) <= _half_width(worst):
        return f"With {closest} their exponents of {what} are {differences[closest]:+.3f} apart: {_EXPLAINS}."
    return f"{_NO_CHOICE} (sensitivity) brings their exponents of {what} together."


def _size(quantity: str, difference: float) -> str:
    """A difference, formatted."""
    if quantity == "log_params_opt":
        return f"a factor {np.exp(abs(difference)):.2f}"
    return f"{difference:+.3f}"


def _half_width(pair: PairAgreement) -> float:
    assert pair.interval is not None
    return pair.interval.width / 2


def _excess(pair: PairAgreement) -> float:
    """Distance of the difference from 0, in half-widths of its interval."""
    return abs(pair.difference) / max(_half_width(pair), 1e-12)


def _possible_reason(estimate: Estimate) -> str:
    """The diagnostic of an approach that may explain the disagreement."""
    reasons = ("may be biased", "not used", "numerically", "smooth function")
    found = [d for d in estimate.diagnostics if any(t in d for t in reasons)]
    return f"{estimate.approach}: {found[-1]}" if found else ""


def _value(estimate: Estimate, quantity: str, compute_flops: float) -> float:
    frontier = estimate.frontier
    assert frontier is not None
    if quantity == "params_exponent":
        return frontier.params.exponent
    if quantity == "tokens_exponent":
        return frontier.tokens.exponent
    # If the coefficient underflowed to 0 there is no N to compare.
    log_k = frontier.params.log_k
    return (
        log_k + frontier.params.exponent * float(np.log(compute_flops))
        if np.isfinite(log_k)
        else float("nan")
    )


def _samples(band: Band, quantity: str, compute_flops: float) -> Array | None:
    if not band.samples:
        return None
    if quantity == "log_params_opt":
        s = band.samples
        values = s["params_log_coefficient"] + s["params_exponent"] * np.log(compute_flops)
    else:
        values = band.samples[quantity]
    return np.asarray(values[np.isfinite(values)])


def _difference_interval(xs: Array | None, ys: Array | None, level: float) -> Interval | None:
    if xs is None or ys is None or min(xs.size, ys.size) < 20:
        return None
    rng = np.random.default_rng(0)
    size = max(xs.size, ys.size)
    difference = rng.choice(xs, size) - rng.choice(ys, size)
    tail = (1 - level) / 2
    lo, hi = np.quantile(difference, [tail, 1 - tail])
    return Interval(float(lo), float(hi))
