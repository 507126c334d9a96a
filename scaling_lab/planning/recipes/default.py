"""The `default` recipe: our own, tuned on tiny models that train on a laptop.

Evidence: results/published/recipe_default.txt (`scripts/recipe_evidence.py`). At both ends of the quickstart's grid the best
LR is within a factor of 2 of this rule's and the loss within 0.5% of the best. See results/LOG.md for batch and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.planning.recipes.base import (
    Hyperparameters,
    SweepHorizons,
    check_batch,
    extrapolation_note,
    round_batch,
)

# Ranges in which the rules below were measured: parameters (six_n_with_head) and horizons (results/published/
# recipe_default.txt; results/LOG.md, 2026-11-22: width 92, depth 3, and 145k tokens at width 64).
CALIBRATED_PARAMS = (6.6e3, 3.3e5)
CALIBRATED_TOKENS = (1.4e5, 6.6e6)


@dataclass(frozen=True)
class DefaultRecipe:
    """LR ~ width^-0.67, batch ~ D^0.4, warmup a fixed fraction of the horizon. Setting a field overrides its rule."""

    kind: ClassVar[str] = "default"

    peak_lr: float | None = None
    """None: `lr_at_width_64` * (64 / width)^`lr_width_exponent`. muP's rule for hidden matrices (exponent 1, arXiv 2203.03466)
    was too steep from width 12 to 80: fitted to the best LR of six sizes (results/LOG.md, 2026-11-27)."""
    lr_at_width_64: float = 0.0075
    lr_width_exponent: float = 0.67
    embedding_lr_ratio: float = 1.0
    head_lr_ratio: float = 1.0
    batch_tokens: int | None = None
    """None: `batch_at_1m_tokens` * (D / 1e6)^`batch_exponent` (Bergsma et al. 2025, arXiv 2505.13738, find D^0.383).
    The same batch for all sizes of a budget would be too large for the large ones and shift the valley."""
    batch_at_1m_tokens: float = 512.0
    batch_exponent: float = 0.4
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that is not a multiple of the context."""
        n = shape.count().n_params(Convention.SIX_N_WITH_HEAD)
        batch, rule_batch = self.batch_tokens, None
        if batch is None:
            rule_batch = self.batch_at_1m_tokens * (train_tokens / 1e6) ** self.batch_exponent
            batch = round_batch(rule_batch, shape.context)
        else:
            check_batch(batch, shape.context)
        lr = self.peak_lr
        if lr is None:
            lr = self.lr_at_width_64 * (64 / shape.width) ** self.lr_width_exponent
        notes = (
            *extrapolation_note(self.kind, "parameters", n, *CALIBRATED_PARAMS),
            *extrapolation_note(self.kind, "training tokens per run", train_tokens, *CALIBRATED_TOKENS),
        )
        optimizer = OptimizerSpec(
            peak_lr=lr,
            embedding_lr_ratio=self.embedding_lr_ratio,
            head_lr_ratio=self.head_lr_ratio,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )
        return Hyperparameters(batch, optimizer, self.warmup_fraction, notes, rule_batch)
