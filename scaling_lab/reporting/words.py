"""Owns the report's sentences: the answer in one line, its caveats, the key numbers. Every number is the analysis' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.estimate import BudgetStatus, Estimate, FitStatus
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.core.counts import Convention
from scaling_lab.core.record import RunRecord
from scaling_lab.reporting.style import SHORT_APPROACH_NAMES, format_count, format_flops, format_loss

# Kaplan's and Chinchilla's exponents are .23 apart: an interval wider than that decides nothing.
WIDE_INTERVAL = 0.23
# The approach that the headline quotes: the first of these with an answer it stands by. IsoFLOP first, because it
# assumes neither a formula nor that runs are optimal in their middle.
HEADLINE_ORDER = ("isoflop", "parametric", "envelope")

CONVENTION_WORDS = {
    "as_given": "as the table gives them: N is its column params, C its column flops.",
    Convention.SIX_N_TOTAL: "N counts all parameters, embeddings included; C = 6 N D.",
    Convention.SIX_N_NON_EMBEDDING: "N counts no embeddings and no head (Kaplan et al. 2020); C = 6 N D.",
    Convention.SIX_N_WITH_HEAD: "N counts the blocks and the head, not the input embedding (Porian et al. 2024); C = 6 N D.",
    Convention.MATMUL_PLUS_ATTENTION: "N counts the blocks and the head; C is every matrix product actually run, "
    "attention over the full context included.",
    Convention.CHINCHILLA_APPENDIX_F: "N counts all parameters; C as in Hoffmann et al. 2022, appendix F.",
    Convention.DEEPSEEK_M: "C = M D with M the non-embedding FLOPs per token, attention included; N = M / 6 (DeepSeek LLM).",
}


@dataclass(frozen=True)
class KeyNumber:
    """One tile at the top of the page."""

    value: str
    label: str
    note: str = ""


def convention_words(convention: str) -> str:
    """What N and C count under this convention, in a sentence."""
    return CONVENTION_WORDS.get(convention, convention)


def headline_estimate(analysis: Analysis) -> Estimate | None:
    """The estimate that the first sentence quotes: converged if any is, in `HEADLINE_ORDER`."""
    known = [
        e for a in HEADLINE_ORDER for e in analysis.estimates if e.approach == a and e.frontier is not None
    ]
    return next((e for e in known if e.status is FitStatus.CONVERGED), known[0] if known else None)


def headline(analysis: Analysis) -> str:
    """The answer in one sentence."""
    estimate = headline_estimate(analysis)
    if estimate is None or estimate.frontier is None:
        return "These runs do not yet say how the optimal model size grows with compute."
    a, b = estimate.frontier.params.exponent, estimate.frontier.tokens.exponent
    span = interval_words(analysis.band(estimate.approach), "params_exponent")
    inside = (
        f"{span}, {SHORT_APPROACH_NAMES[estimate.approach]}"
        if span
        else SHORT_APPROACH_NAMES[estimate.approach]
    )
    return f"Compute-optimal N grows as C^{a:.2f} ({inside}), and D as C^{b:.2f}."


def interval_words(band: Band, quantity: str) -> str:
    """ "90%: 0.47 to 0.55", or nothing where there is no interval."""
    interval = band.interval(quantity)
    return "" if interval is None else f"{band.level:.0%}: {interval.lo:.2f} to {interval.hi:.2f}"


# The best model a thousand times larger for ten times the compute: no law of this kind is known.
CREDIBLE_EXPONENT = 3.0


def plain_meaning(analysis: Analysis) -> str:
    """What the exponent means for somebody with ten times the compute."""
    estimate = headline_estimate(analysis)
    if estimate is None or estimate.frontier is None:
        return "The sections below say what is there and what is missing."
    a, b = estimate.frontier.params.exponent, estimate.frontier.tokens.exponent
    if not all(abs(exponent) <= CREDIBLE_EXPONENT for exponent in (a, b)):
        return (
            "These runs do not show how the best size grows with compute: the exponents come out beyond anything that a "
            "model could follow. More budgets, or budgets further apart, would tell."
        )
    return (
        f"With ten times the compute, the best model here is {10**a:.1f} times larger and reads {10**b:.1f} times more "
        "tokens. Equal shares would be 3.2 times each."
    )


def caveats(analysis: Analysis) -> list[str]:
    """What keeps the answer from being taken at its word, in plain language, the gravest first."""
    out = []
    for estimate, band in zip(analysis.estimates, analysis.bands):
        name = SHORT_APPROACH_NAMES[estimate.approach]
        if estimate.status is not FitStatus.CONVERGED:
            out.append(f"{name}: {STATUS_WORDS[estimate.status]}. {estimate.message}")
        elif band.interval("params_exponent") is None:
            out.append(f"{name} has no interval: {band.message or 'too few resamples succeeded.'}")
    lost = [b for e in analysis.estimates for b in e.budgets if b.status is not BudgetStatus.OK]
    if lost:
        shown = "; ".join(f"{format_flops(b.budget_flops)} ({b.status.value})" for b in lost[:6])
        more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
        out.append(f"{len(lost)} budget(s) show no usable minimum: {shown}{more}.")
    if analysis.agreement.agree is False:
        out.append(f"The approaches disagree: {analysis.agreement.message}")
    quoted = headline_estimate(analysis)
    if quoted is not None and quoted.approach != HEADLINE_ORDER[0]:
        out.append(
            f"The headline quotes the {SHORT_APPROACH_NAMES[quoted.approach]} approach, as IsoFLOP gives no answer."
        )
    for band in analysis.bands:
        interval = band.interval("params_exponent")
        if interval is not None and interval.width > WIDE_INTERVAL:
            out.append(
                f"{SHORT_APPROACH_NAMES[band.approach]} hardly says anything here: its {band.level:.0%} interval for the "
                f"exponent of N goes from {interval.lo:.2f} to {interval.hi:.2f}. More budgets, and budgets further apart, "
                "narrow it most."
            )
    return out


STATUS_WORDS = {
    FitStatus.CONVERGED: "converged",
    FitStatus.MAX_STEPS: "the fit did not converge",
    FitStatus.AT_BOUND: "a parameter ended at its bound",
    FitStatus.STARTS_DISAGREE: "fits from different starts disagree",
    FitStatus.NOT_IDENTIFIED: "these data do not fix the answer",
    FitStatus.NOT_APPLICABLE: "cannot be applied to these data",
}


def key_numbers(analysis: Analysis, records: Sequence[RunRecord]) -> list[KeyNumber]:
    """The tiles: exponents, tokens per parameter, the irreducible loss, what was predicted and reached, what it cost."""
    tiles = []
    for estimate, band in zip(analysis.estimates, analysis.bands):
        if estimate.frontier is not None:
            span = interval_words(band, "params_exponent") or "no interval"
            name = f"exponent of N, {SHORT_APPROACH_NAMES[estimate.approach]}"
            tiles.append(KeyNumber(f"{estimate.frontier.params.exponent:.3f}", name, span))
    estimate_now = headline_estimate(analysis)
    points = analysis.points
    largest = float(points.compute_flops.max())
    if estimate_now is not None and estimate_now.frontier is not None:
        n, d = float(estimate_now.frontier.params(largest)), float(estimate_now.frontier.tokens(largest))
        note = f"at {format_flops(largest)} FLOPs: N = {format_count(n)}, D = {format_count(d)}"
        tiles.append(KeyNumber(f"{d / n:.3g}", "tokens a parameter", note))
    parametric = analysis.estimate("parametric")
    if parametric.fits and "E" in parametric.fits[0].parameters:
        se = analysis.band("parametric").standard_error("E")
        note = "no standard error" if se is None else f"standard error {se:.2g}"
        tiles.append(KeyNumber(f"{parametric.fits[0].parameters['E']:.3f}", "irreducible loss E, nats", note))
    for test in analysis.backtest:
        loss = test.predicted.loss_opt if test.predicted is not None else None
        # The law has an irreducible loss, which two points of a frontier cannot show.
        if test.approach == "parametric" and loss is not None:
            note = f"at {format_flops(test.budget_flops)} FLOPs, without its runs; its best run reached {format_loss(test.best_sampled_loss_nats)}"
            tiles.append(KeyNumber(format_loss(loss.estimate), "predicted loss, nats", note))
    total = float(analysis.observations.final().compute_flops.sum())
    hours = sum(r.wall_time_s for r in records) / 3600
    time = (
        f", {hours * 60:.3g} minutes of training"
        if records and hours < 2
        else f", {hours:.3g} hours"
        if records
        else ""
    )
    tiles.append(KeyNumber(str(points.n_runs), "runs analysed", f"{format_flops(total)} FLOPs{time}"))
    return tiles
