"""The `step_law` recipe: LR and batch as power laws of N and D (Li et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.planning.recipes.base import (
    Hyperparameters,
    RuleOverrides,
    SweepHorizons,
    extrapolation_note,
)

# LR = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens, N without embeddings (Li et al. 2025, arXiv 2503.04715,
# equation 1).
LR_COEFFICIENT, LR_N_EXPONENT, LR_D_EXPONENT = 1.79, -0.713, 0.307
BATCH_COEFFICIENT, BATCH_EXPONENT = 0.58, 0.571
# The cosine ends at this LR regardless of its peak: a final LR proportional to the peak biases the optimum (same paper,
# section 3).
FINAL_LR = 1e-5
# Linear warmup over 2,000 steps (same paper, section 3).
WARMUP_STEPS = 2000
# Our choice: at most this fraction of a run, since small runs have few steps.
LONGEST_WARMUP_FRACTION = 0.1
# Dense models of 60M to 1B parameters without embeddings (same paper, section 4).
FITTED_PARAMS = (6e7, 1e9)
# Horizons of its released dense grid, in tokens.
FITTED_TOKENS = (4e9, 1e11)


@dataclass(frozen=True)
class StepLawRecipe(RuleOverrides):
    """LR falls with N and rises with D, batch grows with D; a cosine to a fixed final LR."""

    kind: ClassVar[str] = "step_law"

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that is not a multiple of the context."""
        n = shape.count().n_params(Convention.SIX_N_NON_EMBEDDING)
        batch, rule_batch = self.resolve_batch(
            BATCH_COEFFICIENT * train_tokens**BATCH_EXPONENT, shape.context
        )
        rule_lr = LR_COEFFICIENT * n**LR_N_EXPONENT * train_tokens**LR_D_EXPONENT
        warmup_tokens = min(WARMUP_STEPS * batch, LONGEST_WARMUP_FRACTION * train_tokens)
        lr, warmup, notes = self.resolve_warmup(rule_lr, warmup_tokens, train_tokens)
        outside = extrapolation_note(
            self.kind, "parameters without embeddings", n, *FITTED_PARAMS
        ) or extrapolation_note(self.kind, "training tokens", train_tokens, *FITTED_TOKENS)
        # AdamW with betas 0.9 and 0.95, decay 0.1, clipping at 1 (same paper, section 3): OptimizerSpec's defaults.
        return Hyperparameters(
            batch,
            OptimizerSpec(peak_lr=lr),
            warmup,
            (*outside, *notes),
            rule_batch,
            Cosine(final_fraction=min(1.0, FINAL_LR / lr)),
        )
