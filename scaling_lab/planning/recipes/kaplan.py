"""Owns the `kaplan` recipe: how Kaplan et al. 2020 trained, with the causes of their exponent left in on purpose.

Porian et al. 2024 (arXiv 2406.19146) trace Kaplan's N ~ C^0.73 to a warm-up that is longer than the best small run and to
a batch and LR that are not tuned by size; Hoffmann et al. 2022 to a cosine whose horizon is not the run's. All of that is
here. Counting the head is the third cause: plan with `convention=six_n_non_embedding` to have it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.planning.recipes.base import FieldsThatReplaceRules, Hyperparameters, SweepHorizons, outside

# LR(N) = 0.003239 - 0.0001395 ln N, N without embeddings (Kaplan et al. 2020, arXiv 2001.08361, equation D.1). Above 1e10
# parameters it is no longer positive, as they say.
LR_INTERCEPT, LR_SLOPE = 0.003239, -0.0001395
# Warm-up of 3,000 steps (same paper, section 2.2). Their own fit of the compute-efficient run, S_min = 5.4e3 C^0.03 with C
# in PF-days (table 6), at S = 2 S_min gives 6,200 steps at their smallest budgets (1e-8 PF-days): the warm-up takes half.
WARMUP_OF_SMALLEST_HORIZON = 3000 / 6200
# One batch for every size and horizon (512 sequences of 1024 tokens in the paper). Ours: as many steps as this at the
# horizon of the smallest budget. The paper's 6,200 would leave a tiny sweep with two sequences a step.
STEPS_OF_SMALLEST_HORIZON = 1500.0
# Adam without weight decay (same paper, section 2.2); Kingma & Ba 2015 (arXiv 1412.6980) for the betas, which it does
# not give, as it gives no clipping: 1.
BETA2 = 0.999
# From 768 to 1.5e9 parameters (same paper, section 3).
FITTED_PARAMS = (768.0, 1.5e9)


@dataclass(frozen=True)
class KaplanRecipe(FieldsThatReplaceRules):
    """A fixed batch, a fixed warm-up in tokens, and one cosine to zero whose horizon is the sweep's longest run."""

    kind: ClassVar[str] = "kaplan"

    warmup_of_smallest_horizon: float = WARMUP_OF_SMALLEST_HORIZON
    steps_of_smallest_horizon: float = STEPS_OF_SMALLEST_HORIZON

    def __post_init__(self) -> None:
        super().__post_init__()
        check_relative_to_smallest(self.warmup_of_smallest_horizon, self.steps_of_smallest_horizon)

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` where LR(N) is not positive, and for a batch that the context does not divide."""
        n = shape.count().n_params(Convention.SIX_N_NON_EMBEDDING)
        rule_lr = LR_INTERCEPT + LR_SLOPE * math.log(n)
        if self.peak_lr is None and not rule_lr > 0:
            raise UserError(
                f"recipe=kaplan: LR(N) is not positive at {n:.2g} parameters; give recipe.peak_lr."
            )
        batch, rule_batch = self.batch(
            sweep.smallest_budget_tokens / self.steps_of_smallest_horizon, shape.context
        )
        warmup_tokens = self.warmup_of_smallest_horizon * sweep.smallest_budget_tokens
        lr, warmup, notes = self.warmed_up(rule_lr, warmup_tokens, train_tokens)
        longest = max(1.0, sweep.longest_tokens / train_tokens)
        return Hyperparameters(
            batch,
            OptimizerSpec(peak_lr=lr, beta2=BETA2, weight_decay=0.0),
            warmup,
            (*outside(self.kind, "parameters", n, *FITTED_PARAMS), *notes),
            rule_batch,
            Cosine(final_fraction=0.0, horizon_fraction=longest),
            warmup_in_tokens=self.warmup_fraction is None,
        )


def check_relative_to_smallest(warmup_share: float, steps: float) -> None:
    """Raises `UserError` unless both are positive."""
    if not warmup_share >= 0:
        raise UserError(f"recipe.warmup_of_smallest_horizon={warmup_share!r} must not be negative.")
    if not steps > 0:
        raise UserError(f"recipe.steps_of_smallest_horizon={steps!r} must be positive.")
