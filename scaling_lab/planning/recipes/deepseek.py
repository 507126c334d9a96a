"""The `deepseek` recipe: LR and batch as power laws of compute (DeepSeek LLM, 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention, train_flops
from scaling_lab.core.schedules import MultiStep
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.planning.recipes.base import (
    Hyperparameters,
    RuleOverrides,
    SweepHorizons,
    extrapolation_note,
)

# LR = 0.3118 C^-0.1250, batch = 0.2920 C^0.3271 tokens with C = M D, M the non-embedding FLOPs per token (Bi et al. 2024,
# arXiv 2401.02954, equation 1).
LR_COEFFICIENT, LR_EXPONENT = 0.3118, -0.1250
BATCH_COEFFICIENT, BATCH_EXPONENT = 0.2920, 0.3271
# Linear warmup over 2,000 steps (same paper, section 2.3).
WARMUP_STEPS = 2000
# Our choice: at most this fraction of a run, since small runs have few steps.
LONGEST_WARMUP_FRACTION = 0.1
# Compute of the runs that the rules were fitted to (same paper, section 3.1).
FITTED_FLOPS = (1e17, 2e19)


@dataclass(frozen=True)
class DeepSeekRecipe(RuleOverrides):
    """LR and batch depend only on compute; constant LR for 80% of the run, then two steps down."""

    kind: ClassVar[str] = "deepseek"

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that is not a multiple of the context."""
        compute = train_flops(shape.count().flops_per_token(Convention.DEEPSEEK_M), train_tokens)
        batch, rule_batch = self.resolve_batch(BATCH_COEFFICIENT * compute**BATCH_EXPONENT, shape.context)
        warmup_tokens = min(WARMUP_STEPS * batch, LONGEST_WARMUP_FRACTION * train_tokens)
        lr, warmup, notes = self.resolve_warmup(
            LR_COEFFICIENT * compute**LR_EXPONENT, warmup_tokens, train_tokens
        )
        # AdamW with betas 0.9 and 0.95, decay 0.1, clipping at 1 (same paper, section 2.3): OptimizerSpec's defaults.
        return Hyperparameters(
            batch,
            OptimizerSpec(peak_lr=lr),
            warmup,
            (*extrapolation_note(self.kind, "FLOPs (M D)", compute, *FITTED_FLOPS), *notes),
            rule_batch,
            MultiStep(),
        )
