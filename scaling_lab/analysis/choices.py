"""The conventions and options that decided the numbers of an analysis, in words."""

from __future__ import annotations

from scaling_lab.analysis.data.observations import AS_GIVEN, Observations
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.counts import Convention

CONVENTION_WORDS: dict[str, str] = {
    AS_GIVEN: "as the table gives them: N is its column params, C its column flops.",
    Convention.SIX_N_TOTAL: "N counts all parameters, embeddings included; C = 6 N D.",
    Convention.SIX_N_NON_EMBEDDING: "N counts no embeddings and no head (Kaplan et al. 2020); C = 6 N D.",
    Convention.SIX_N_WITH_HEAD: "N counts the blocks and the head, not the input embedding (Porian et al. 2024); C = 6 N D.",
    Convention.MATMUL_PLUS_ATTENTION: "N counts the blocks and the head; C is every matrix product actually run, "
    "attention over the full context included.",
    Convention.CHINCHILLA_APPENDIX_F: "N counts all parameters; C as in Hoffmann et al. 2022, appendix F.",
    Convention.DEEPSEEK_M: "C = M D with M the non-embedding FLOPs per token, attention included; N = M / 6 (DeepSeek LLM).",
}


def choices(
    settings: AnalysisSettings, observations: Observations, points: Observations
) -> list[tuple[str, str]]:
    """(what, which) of everything that decided the numbers."""
    s, a = settings, settings.approach
    convention = str(observations.convention)
    return [
        ("How N and C are counted", f"{convention}: {CONVENTION_WORDS.get(convention, convention)}"),
        ("C = 6 N D", "holds to 1% at every point" if points.is_six_nd else
         "does not hold here: the frontier uses the FLOPs per token as counted"),
        ("Loss", s.metric or "the validation loss (of a table: the column loss), nats per token"),
        ("Points", "one point a run, its last" if s.points == "final" else "every row"),
        ("Envelope", f"{points.curves.kind}; method {a.envelope.method}, edge sizes: {a.envelope.edge}"),
        ("IsoFLOP", f"{a.isoflop.minimum} in ln N, " + ("all sizes of a budget" if a.isoflop.window_log_params is None
         else f"sizes within {a.isoflop.window_log_params:.3g} in ln N of the best")),
        ("Parametric", f"law {a.parametric.law}, objective {a.parametric.objective}, Huber delta {a.parametric.huber_delta:g}"),
        ("Intervals", f"{s.bootstrap.level:.0%}, {s.bootstrap.resamples} resamples, unit {s.bootstrap.unit}, seed {s.seed}"),
        ("Weights", s.weights or "all points equally"),
    ]  # fmt: skip


def law_formula(settings: AnalysisSettings, law: str | None) -> str | None:
    """The fitted law's formula and its source; None where no law was fitted."""
    if law is None:
        return None
    known = get_law(law, **settings.approach.parametric.law_options)
    return f"{known.formula} ({known.source})" if known.source else known.formula
