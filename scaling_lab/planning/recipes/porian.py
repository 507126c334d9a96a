"""The `porian` recipe: the tuned rules of Porian et al. 2024, whose sweep reconciled Kaplan with Chinchilla."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.planning.recipes.base import (
    Hyperparameters,
    RuleOverrides,
    SweepHorizons,
    extrapolation_note,
)

# The reference point and the exponents of the fitted rules (Porian et al. 2024, arXiv 2406.19146, section 4):
# LR = 0.0047 (N / 108e6)^(-1/3), batch = 160 sequences of 2048 tokens times (N / 108e6)^(2/3).
REFERENCE_PARAMS = 108e6
REFERENCE_LR = 0.0047
LR_EXPONENT = -1 / 3
REFERENCE_BATCH_TOKENS = 160 * 2048
BATCH_EXPONENT = 2 / 3
# beta2 = 0.95 averages over too few steps for small batches; they use 0.99 there (same section: "essential at lower batch
# sizes"). The boundary between their tuned values is at about 128 sequences of 2048 tokens.
SMALL_BATCH_TOKENS = 128 * 2048
BETA2_SMALL_BATCH, BETA2_LARGE_BATCH = 0.99, 0.95
# Decay independent of the LR, as in Wortsman et al. 2023 (arXiv 2309.14322), whose training setup they follow.
INDEPENDENT_WEIGHT_DECAY = 1e-4
# Their 16 sizes, 5M to 901M parameters (same paper, table of architectures).
FITTED_PARAMS = (5e6, 9e8)


@dataclass(frozen=True)
class PorianRecipe(RuleOverrides):
    """LR ~ N^(-1/3), batch ~ N^(2/3), a warmup of N tokens; N without embeddings, with the head. The schedule is the
    sweep's: they find that LR decay hardly affects the exponents."""

    kind: ClassVar[str] = "porian"

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that is not a multiple of the context."""
        n = shape.count().n_params(Convention.SIX_N_WITH_HEAD)
        batch, rule_batch = self.resolve_batch(
            REFERENCE_BATCH_TOKENS * (n / REFERENCE_PARAMS) ** BATCH_EXPONENT, shape.context
        )
        rule_lr = REFERENCE_LR * (n / REFERENCE_PARAMS) ** LR_EXPONENT
        lr, warmup, notes = self.resolve_warmup(rule_lr, n, train_tokens)
        optimizer = OptimizerSpec(
            peak_lr=lr,
            beta2=BETA2_SMALL_BATCH if batch <= SMALL_BATCH_TOKENS else BETA2_LARGE_BATCH,
            # In our AdamW the decay is multiplied by the LR.
            weight_decay=INDEPENDENT_WEIGHT_DECAY / lr,
        )
        notes = (*extrapolation_note(self.kind, "parameters", n, *FITTED_PARAMS), *notes)
        in_tokens = self.warmup_fraction is None
        return Hyperparameters(batch, optimizer, warmup, notes, rule_batch, warmup_in_tokens=in_tokens)
