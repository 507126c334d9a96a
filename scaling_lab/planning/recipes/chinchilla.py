"""The `chinchilla` recipe: how Hoffmann et al. 2022 trained their sweep."""

from __future__ import annotations

import math
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
from scaling_lab.planning.recipes.kaplan import check_relative_to_smallest

# Peak LR from 2e-4 for the smallest to 1.25e-4 for the largest models (Hoffmann et al. 2022, arXiv 2203.15556, appendix D),
# 70M to 16B parameters (their abstract); we interpolate ln LR linearly in ln N.
LR_OF_SMALLEST, LR_OF_LARGEST = 2e-4, 1.25e-4
FITTED_PARAMS = (7e7, 1.6e10)
# The paper gives neither the batch nor the warmup of its sweep; it follows Gopher (Rae et al. 2021, arXiv 2112.11446, table
# 1 and section 3.2): 0.25M tokens per step up to 1.4B parameters, a warmup of 1,500 steps. At its smallest budget, 6e18
# FLOPs, the optimum of about 220M parameters has 4.5e9 tokens: 18,000 steps, of which the warmup takes a twelfth.
WARMUP_OF_SMALLEST_HORIZON = 1500 / 18000
# Our choice: 18,000 steps would leave a tiny sweep with less than one sequence per step.
STEPS_OF_SMALLEST_HORIZON = 1500.0


@dataclass(frozen=True)
class ChinchillaRecipe(RuleOverrides):
    """A fixed batch and warmup in tokens, AdamW, and a cosine that decays by 10x over the run's own horizon."""

    kind: ClassVar[str] = "chinchilla"

    warmup_of_smallest_horizon: float = WARMUP_OF_SMALLEST_HORIZON
    steps_of_smallest_horizon: float = STEPS_OF_SMALLEST_HORIZON

    def __post_init__(self) -> None:
        super().__post_init__()
        check_relative_to_smallest(self.warmup_of_smallest_horizon, self.steps_of_smallest_horizon)

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that is not a multiple of the context."""
        n = shape.count().n_params(Convention.SIX_N_TOTAL)
        low, high = FITTED_PARAMS
        # Constant outside the paper's range.
        share = min(1.0, max(0.0, math.log(n / low) / math.log(high / low)))
        rule_lr = LR_OF_SMALLEST * (LR_OF_LARGEST / LR_OF_SMALLEST) ** share
        batch, rule_batch = self.resolve_batch(
            sweep.smallest_budget_tokens / self.steps_of_smallest_horizon, shape.context
        )
        warmup_tokens = self.warmup_of_smallest_horizon * sweep.smallest_budget_tokens
        lr, warmup, notes = self.resolve_warmup(rule_lr, warmup_tokens, train_tokens)
        # Betas 0.9 and 0.95 and clipping at 1 are Gopher's (section 3.2). The paper does not give AdamW's decay: we use 0.1
        # as in GPT-3 (arXiv 2005.14165).
        return Hyperparameters(
            batch,
            OptimizerSpec(peak_lr=lr),
            warmup,
            (*extrapolation_note(self.kind, "parameters", n, low, high), *notes),
            rule_batch,
            Cosine(final_fraction=0.1),
            warmup_in_tokens=self.warmup_fraction is None,
        )
