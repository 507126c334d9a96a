"""The `kaplan` recipe: how Kaplan et al. 2020 trained, deliberately including the causes of their exponent.

Porian et al. 2024 (arXiv 2406.19146) trace Kaplan's N ~ C^0.73 to a warmup that is longer than the best small run and to a
batch and LR that are not tuned by size; Hoffmann et al. 2022 trace it to a cosine whose horizon is not the run's. This recipe
reproduces all of these. Leaving the head out of the count is another cause: plan with `convention=six_n_non_embedding` to
include it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.planning.recipes.base import (
    Hyperparameters,
    RuleOverrides,
    SweepHorizons,
    extrapolation_note,
)

# LR(N) = 0.003239 - 0.0001395 ln N, N without embeddings (Kaplan et al. 2020, arXiv 2001.08361, equation D.1). As they note,
# it is not positive above 1e10 parameters.
LR_INTERCEPT, LR_SLOPE = 0.003239, -0.0001395
# Warmup of 3,000 steps (same paper, section 2.2). Their fit for compute-efficient runs, S_min = 5.4e3 C^0.03 with C in
# PF-days (table 6), at S = 2 S_min gives 6,200 steps at their smallest budgets (1e-8 PF-days): the warmup takes half.
WARMUP_OF_SMALLEST_HORIZON = 3000 / 6200
# The same batch for every size and horizon (512 sequences of 1024 tokens in the paper). Our choice: the batch that gives
# this many steps at the smallest budget's horizon. The paper's 6,200 would leave a tiny sweep with two sequences per step.
STEPS_OF_SMALLEST_HORIZON = 1500.0
# Adam without weight decay (same paper, section 2.2). The paper gives neither betas nor clipping: we use the betas of
# Kingma & Ba 2015 (arXiv 1412.6980) and clip at 1.
BETA2 = 0.999
# From 768 to 1.5e9 parameters (same paper, section 3).
FITTED_PARAMS = (768.0, 1.5e9)


@dataclass(frozen=True)
class KaplanRecipe(RuleOverrides):
    """A fixed batch, a fixed warmup in tokens, and a cosine to zero whose horizon is the sweep's longest run."""

    kind: ClassVar[str] = "kaplan"

    warmup_of_smallest_horizon: float = WARMUP_OF_SMALLEST_HORIZON
    steps_of_smallest_horizon: float = STEPS_OF_SMALLEST_HORIZON

    def __post_init__(self) -> None:
        super().__post_init__()
        check_relative_to_smallest(self.warmup_of_smallest_horizon, self.steps_of_smallest_horizon)

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` if LR(N) is not positive, or for a batch that is not a multiple of the context."""
        n = shape.count().n_params(Convention.SIX_N_NON_EMBEDDING)
        rule_lr = LR_INTERCEPT + LR_SLOPE * math.log(n)
        if self.peak_lr is None and not rule_lr > 0:
            raise UserError(
                f"recipe=kaplan: LR(N) is not positive at {n:.2g} parameters; give recipe.peak_lr."
            )
        batch, rule_batch = self.resolve_batch(
            sweep.smallest_budget_tokens / self.steps_of_smallest_horizon, shape.context
        )
        warmup_tokens = self.warmup_of_smallest_horizon * sweep.smallest_budget_tokens
        lr, warmup, notes = self.resolve_warmup(rule_lr, warmup_tokens, train_tokens)
        longest = max(1.0, sweep.longest_tokens / train_tokens)
        return Hyperparameters(
            batch,
            OptimizerSpec(peak_lr=lr, beta2=BETA2, weight_decay=0.0),
            warmup,
            (*extrapolation_note(self.kind, "parameters", n, *FITTED_PARAMS), *notes),
            rule_batch,
            Cosine(final_fraction=0.0, horizon_fraction=longest),
            warmup_in_tokens=self.warmup_fraction is None,
        )


def check_relative_to_smallest(warmup_share: float, steps: float) -> None:
    """Raise `UserError` unless the warmup is non-negative and the number of steps is positive."""
    if not warmup_share >= 0:
        raise UserError(f"recipe.warmup_of_smallest_horizon={warmup_share!r} must not be negative.")
    if not steps > 0:
        raise UserError(f"recipe.steps_of_smallest_horizon={steps!r} must be positive.")
