"""Owns the `default` recipe: ours, tuned on the tiny models that a laptop trains.

The evidence: results/published/recipe_default.txt (`scripts/recipe_evidence.py`), at the ends of the quickstart's grid the
best LR within a factor of 2 of this rule's and the loss within 0.5% of the best; results/LOG.md for batch and the rest.
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
    outside,
    round_batch,
)

# Where the rules below were measured (results/published/recipe_default.txt; results/LOG.md, 2026-11-22: width 92, depth 3, and
# 145k tokens at width 64): parameters (six_n_with_head) and horizons.
CALIBRATED_PARAMS = (6.6e3, 3.3e5)
CALIBRATED_TOKENS = (1.4e5, 6.6e6)


@dataclass(frozen=True)
class DefaultRecipe:
    """LR ~ width^-0.67, batch ~ D^0.4, warm-up a fixed share of the horizon. A field that is set replaces its rule."""

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
    A batch that is the same for all sizes of a budget is too large for the large ones, and shifts the valley."""
    batch_at_1m_tokens: float = 512.0
    batch_exponent: float = 0.4
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters:
        """Raises `UserError` for a batch that the context does not divide."""
        n = shape.count().n_params(Convention.SIX_N_WITH_HEAD)
        batch, wanted = self.batch_tokens, None
        if batch is None:
            wanted = self.batch_at_1m_tokens * (train_tokens / 1e6) ** self.batch_exponent
            batch = round_batch(wanted, shape.context)
        else:
            check_batch(batch, shape.context)
        lr = self.peak_lr
        if lr is None:
            lr = self.lr_at_width_64 * (64 / shape.width) ** self.lr_width_exponent
        notes = (
            *outside(self.kind, "parameters", n, *CALIBRATED_PARAMS),
            *outside(self.kind, "training tokens a run", train_tokens, *CALIBRATED_TOKENS),
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
        return Hyperparameters(batch, optimizer, self.warmup_fraction, notes, wanted)
