"""Parameter and FLOP counts under named conventions, and conversions between them.

No other module multiplies 6 by N. The disagreement between Kaplan et al. and Hoffmann et al. came largely from mixing
conventions (Porian et al. 2024, arXiv 2406.19146), so each figure and each fit names one `Convention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

# One PF-day, the unit of compute of Kaplan et al. 2020 (arXiv 2001.08361, section 1.3): 1e15 FLOP/s for a day.
FLOPS_PER_PETAFLOP_DAY = 8.64e19

# Forward plus backward costs three times the forward pass: the backward pass computes gradients with respect to inputs
# and to weights (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022, appendix F).
FORWARD_AND_BACKWARD = 3

# Training FLOPs per parameter per token: 2 (multiply and add) * 3 (forward + backward).
FLOPS_PER_PARAM_TOKEN = 6


class Convention(StrEnum):
    """What N counts and how FLOPs per token follow from it. A figure or a fit uses exactly one."""

    SIX_N_TOTAL = "six_n_total"
    """N = all parameters, embeddings included; C = 6 N D."""

    SIX_N_NON_EMBEDDING = "six_n_non_embedding"
    """N = all parameters except token and position embeddings and the head; C = 6 N D (Kaplan et al. 2020)."""

    SIX_N_WITH_HEAD = "six_n_with_head"
    """N = non-embedding parameters plus the head (vocabulary x width, tied or not); C = 6 N D (Porian et al. 2024)."""

    MATMUL_PLUS_ATTENTION = "matmul_plus_attention"
    """N as in SIX_N_WITH_HEAD; C = every matrix product that is computed, including attention over the full context.

    Equals `torch.utils.flop_counter` for forward + backward.
    """

    CHINCHILLA_APPENDIX_F = "chinchilla_appendix_f"
    """N = all parameters; C as in Hoffmann et al. 2022 (arXiv 2203.15556), appendix F: includes embedding, softmax, head."""

    DEEPSEEK_M = "deepseek_m"
    """C = M D, M = non-embedding FLOPs per token including attention (DeepSeek LLM, arXiv 2401.02954); N = M / 6."""

    @property
    def is_six_n(self) -> bool:
        """Whether C = 6 N D holds exactly under this convention, as the closed-form frontier requires."""
        return self in (
            Convention.SIX_N_TOTAL,
            Convention.SIX_N_NON_EMBEDDING,
            Convention.SIX_N_WITH_HEAD,
            Convention.DEEPSEEK_M,
        )


@dataclass(frozen=True)
class ParamCount:
    """Parameters by kind; `total` equals the sum of `numel` over the module's distinct parameters."""

    embedding: int
    """Token and (learned) position embeddings. With a tied head the shared matrix is counted here, once."""
    unembedding: int
    """The head's own matrix; 0 if the head is tied to the embedding."""
    matmul: int
    """Matrices of the blocks: attention projections and the MLP."""
    other: int
    """Normalization gains and biases."""

    @property
    def total(self) -> int:
        return self.embedding + self.unembedding + self.matmul + self.other

    @property
    def non_embedding(self) -> int:
        """Kaplan's N: without token and position embeddings and without the head."""
        return self.matmul + self.other


@dataclass(frozen=True)
class FlopCount:
    """Training FLOPs (forward + backward) per token, by kind. A multiply-add is 2 FLOPs."""

    matmul_per_token: float
    """Matrices of the blocks: 6 per parameter."""
    unembedding_per_token: float
    """The head: 6 * vocabulary * width, tied or not."""
    attention_per_token: float
    """Scores and weighted sums over the full context, no discount for the causal mask: 12 * layers * width * context."""
    softmax_per_token: float = 0.0
    """Attention softmax, 3 * heads * context per layer forward: counted only by Chinchilla's appendix F."""
    embedding_per_token: float = 0.0
    """The input embedding as a one-hot product, 2 * vocabulary * width forward: counted only by appendix F."""


@dataclass(frozen=True)
class ModelCount:
    """A model's parameters and FLOPs: N and FLOPs per token under any convention."""

    params: ParamCount
    flops: FlopCount

    def n_params(self, convention: Convention) -> float:
        """N under `convention`, in parameters."""
        with_head = self.params.non_embedding + self.flops.unembedding_per_token / FLOPS_PER_PARAM_TOKEN
        return {
            Convention.SIX_N_TOTAL: float(self.params.total),
            Convention.SIX_N_NON_EMBEDDING: float(self.params.non_embedding),
            Convention.SIX_N_WITH_HEAD: with_head,
            Convention.MATMUL_PLUS_ATTENTION: with_head,
            Convention.CHINCHILLA_APPENDIX_F: float(self.params.total),
            Convention.DEEPSEEK_M: self._deepseek_m() / FLOPS_PER_PARAM_TOKEN,
        }[convention]

    def flops_per_token(self, convention: Convention) -> float:
        """Training FLOPs (forward + backward) per token under `convention`."""
        if convention.is_six_n:
            return FLOPS_PER_PARAM_TOKEN * self.n_params(convention)
        f = self.flops
        exact = f.matmul_per_token + f.unembedding_per_token + f.attention_per_token
        if convention is Convention.MATMUL_PLUS_ATTENTION:
            return exact
        return exact + f.softmax_per_token + f.embedding_per_token

    def _deepseek_m(self) -> float:
        return self.flops.matmul_per_token + self.flops.attention_per_token


def train_flops(flops_per_token: float, tokens: float) -> float:
    """FLOPs of training on `tokens` tokens, in float64 (6 N D overflows int64 at the papers' sizes)."""
    return float(flops_per_token) * float(tokens)


def tokens_for_budget(budget_flops: float, flops_per_token: float) -> float:
    """Tokens that `budget_flops` pays for, not yet rounded to whole steps."""
    return float(budget_flops) / float(flops_per_token)


def whole_steps(tokens: float, batch_tokens: int) -> int:
    """`tokens` as a number of optimizer steps, rounded to nearest; may be 0, which planning rejects."""
    return math.floor(tokens / batch_tokens + 0.5)
