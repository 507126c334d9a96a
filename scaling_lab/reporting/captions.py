"""The report's sentences: the answer in one line, its caveats, the key numbers. All from analysis.json as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling_lab.analysis.estimate import BudgetStatus, FitStatus
from scaling_lab.analysis.text import SHORT_APPROACH_NAMES, format_count, format_flops, format_loss
from scaling_lab.core.record import RunRecord

Document = Mapping[str, Any]
"""analysis.json, or one of its objects."""

# Kaplan's and Chinchilla's exponents are .23 apart: an interval wider than that does not distinguish them.
WIDE_INTERVAL = 0.23
# The approach that the headline quotes: the first of these with a converged answer. IsoFLOP first, because it assumes
# neither a formula nor that runs are optimal in their middle.
HEADLINE_ORDER = ("isoflop", "parametric", "envelope")
# An exponent beyond this would make the best model a thousand times larger for ten times the compute: no such law is known.
CREDIBLE_EXPONENT = 3.0

STATUS_WORDS = {
    FitStatus.CONVERGED: "converged",
    FitStatus.MAX_STEPS: "the fit did not converge",
    FitStatus.AT_BOUND: "a parameter ended at its bound",
    FitStatus.STARTS_DISAGREE: "fits from different starts disagree",
    FitStatus.NOT_IDENTIFIED: "these data do not determine the answer",
    FitStatus.NOT_APPLICABLE: "cannot be applied to these data",
}


@dataclass(frozen=True)
class KeyNumber:
    """One tile at the top of the page."""

    value: str
    label: str
    note: str = ""


def estimate_of(document: Document, approach: str) -> Document:
    """The estimate of one approach."""
    found: Document = next(e for e in document["estimates"] if e["approach"] == approach)
    return found


def has_frontier(estimate: Document) -> bool:
    """Whether the approach has an optimal N for each compute."""
    return estimate["compute_range_flops"] is not None


def headline_estimate(document: Document) -> Document | None:
    """The estimate that the first sentence quotes: converged if any is, in `HEADLINE_ORDER`."""
    known = [
        e for a in HEADLINE_ORDER for e in document["estimates"] if e["approach"] == a and has_frontier(e)
    ]
    return next((e for e in known if e["status"] == FitStatus.CONVERGED), known[0] if known else None)


def headline(document: Document) -> str:
    """The answer in one sentence."""
    estimate = headline_estimate(document)
    if estimate is None:
        return "These runs do not yet show how the optimal model size grows with compute."
    span = interval_words(estimate, "params_exponent")
    name = SHORT_APPROACH_NAMES[estimate["approach"]]
    inside = f"{span}, {name}" if span else name
    a, b = (_fixed(estimate[key], ".2f") for key in ("params_exponent", "tokens_exponent"))
    return f"Compute-optimal N grows as C^{a} ({inside}), and D as C^{b}."


def _fixed(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def interval_words(estimate: Document, quantity: str) -> str:
    """ "90%: 0.47 to 0.55", or nothing where there is no interval."""
    interval = estimate["interval"].get(quantity)
    if interval is None:
        return ""
    low, high = (_fixed(end, ".2f") for end in interval)
    return f"{estimate['interval']['level']:.0%}: {low} to {high}"


def plain_meaning(document: Document) -> str:
    """What the exponent means for somebody with ten times the compute."""
    estimate = headline_estimate(document)
    if estimate is None:
        return "The sections below show what there is and what is missing."
    a, b = estimate["params_exponent"], estimate["tokens_exponent"]
    if not all(e is not None and abs(e) <= CREDIBLE_EXPONENT for e in (a, b)):
        return (
            "These runs do not show how the best size grows with compute: the exponents are far outside anything "
            "plausible. More budgets, or budgets further apart, would help."
        )
    return (
        f"With ten times the compute, the best model here is {10**a:.1f} times larger and reads {10**b:.1f} times more "
        "tokens. Equal shares would be 3.2 times each."
    )


def caveats(document: Document) -> list[str]:
    """What limits the answer, in plain language, the most serious first."""
    out = []
    for estimate in document["estimates"]:
        name = SHORT_APPROACH_NAMES[estimate["approach"]]
        interval = estimate["interval"]
        if estimate["status"] != FitStatus.CONVERGED:
            out.append(f"{name}: {STATUS_WORDS[FitStatus(estimate['status'])]}. {estimate['message']}")
        elif interval["params_exponent"] is None:
            out.append(f"{name} has no interval: {interval['message'] or 'too few resamples succeeded.'}")
    lost = [b for e in document["estimates"] for b in e["budgets"] if b["status"] != BudgetStatus.OK]
    if lost:
        shown = "; ".join(f"{format_flops(b['budget_flops'])} ({b['status']})" for b in lost[:6])
        more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
        out.append(f"{len(lost)} budget(s) show no usable minimum: {shown}{more}.")
    if document["agreement"]["agree"] is False:
        out.append(f"The approaches disagree: {document['agreement']['message']}")
    quoted = headline_estimate(document)
    if quoted is not None and quoted["approach"] != HEADLINE_ORDER[0]:
        name = SHORT_APPROACH_NAMES[quoted["approach"]]
        out.append(f"The headline quotes the {name} approach, as IsoFLOP gives no answer.")
    return [*out, *(said for e in document["estimates"] if (said := _wide_interval(e)))]


def _wide_interval(estimate: Document) -> str:
    """That an interval is too wide to be useful, or nothing."""
    low, high = estimate["interval"]["params_exponent"] or (None, None)
    if low is None or high is None or high - low <= WIDE_INTERVAL:
        return ""
    return (
        f"{SHORT_APPROACH_NAMES[estimate['approach']]}: the {estimate['interval']['level']:.0%} interval for the exponent of "
        f"N, {low:.2f} to {high:.2f}, is too wide to be useful. More budgets, and budgets further apart, narrow it most."
    )


def key_numbers(document: Document, records: Sequence[RunRecord]) -> list[KeyNumber]:
    """The tiles: exponents, tokens per parameter, the irreducible loss, predicted and reached loss, and the cost."""
    tiles = []
    for estimate in document["estimates"]:
        if has_frontier(estimate):
            span = interval_words(estimate, "params_exponent") or "no interval"
            name = f"exponent of N, {SHORT_APPROACH_NAMES[estimate['approach']]}"
            tiles.append(KeyNumber(_fixed(estimate["params_exponent"], ".3f"), name, span))
    observations = document["observations"]
    # The range of the points and the total are of version 2.
    largest = observations.get("points_compute_range_flops", observations["compute_range_flops"])[1]
    quoted = headline_estimate(document)
    if quoted is not None:
        n, d = (_power_law(quoted, which, largest) for which in ("params", "tokens"))
        note = f"at {format_flops(largest)} FLOPs: N = {format_count(n)}, D = {format_count(d)}"
        tiles.append(KeyNumber(f"{d / n if n else math.nan:.3g}", "tokens a parameter", note))
    tiles += _law_tiles(document)
    hours = sum(r.wall_time_s for r in records) / 3600
    time = f", {hours * 60:.3g} minutes of training" if hours < 2 else f", {hours:.3g} hours"
    total = observations.get("total_flops")
    cost = "" if total is None else f"{format_flops(total)} FLOPs{time if records else ''}"
    return [*tiles, KeyNumber(str(observations["n_runs"]), "runs analyzed", cost)]


def _power_law(estimate: Document, which: str, compute_flops: float) -> float:
    """N_opt or D_opt ("params", "tokens") at a compute, from that at the mean compute: a coefficient may overflow."""
    at_mean, exponent = estimate["at_mean_compute"], estimate[f"{which}_exponent"]
    there = at_mean[f"{which}_opt"]["estimate"]
    if there is None or exponent is None:
        return math.nan
    try:
        return float(there * (compute_flops / at_mean["compute_flops"]) ** exponent)
    except OverflowError:
        return math.inf


def _law_tiles(document: Document) -> list[KeyNumber]:
    """The fitted E, and what the law predicted of the largest budget without it."""
    tiles = []
    parametric = estimate_of(document, "parametric")
    fitted = (parametric["parameters"] or {}).get("E")
    if fitted is not None:
        se = parametric["standard_errors"].get("E")
        note = "no standard error" if se is None else f"standard error {se:.2g}"
        tiles.append(KeyNumber(f"{fitted:.3f}", "irreducible loss E, nats", note))
    for test in document["backtest"]:
        loss = test["predicted"]["loss_opt"]["estimate"] if test["predicted"] else None
        # The law has an irreducible loss, which two points of a frontier cannot show.
        if test["approach"] == "parametric" and loss is not None:
            note = (
                f"at {format_flops(test['budget_flops'])} FLOPs, without its runs; its best run reached "
                f"{format_loss(test['best_sampled_loss_nats'])}"
            )
            tiles.append(KeyNumber(format_loss(loss), "predicted loss, nats", note))
    return tiles
