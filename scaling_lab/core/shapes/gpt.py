"""Shape of the `gpt` family: pre-norm RMSNorm, RoPE, QK-norm, no biases, untied head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scaling_lab.core.counts import FORWARD_AND_BACKWARD, FlopCount, ModelCount, ParamCount
from scaling_lab.core.errors import UserError, unknown

MLP_KINDS = ("relu2", "gelu", "swiglu")


@dataclass(frozen=True)
class GPTShape:
    """Decoder-only transformer; every field is part of the run's identity.

    Raises `UserError` for inconsistent sizes (heads that do not divide the width, an odd head dimension, ...).
    """

    kind: ClassVar[str] = "gpt"

    width: int = 64
    depth: int = 2
    heads: int = 4
    context: int = 64
    vocab_size: int = 256
    mlp: str = "relu2"
    mlp_ratio: float = 4.0
    """Hidden units of the MLP over width. SwiGLU has three matrices: at 8/3 it has the size of the others at 4."""
    tied_head: bool = False
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        check_shape(self)
        if (self.width // self.heads) % 2:
            raise UserError(
                f"model.width={self.width} with model.heads={self.heads} gives a head dimension of "
                f"{self.width // self.heads}; RoPE rotates pairs, so it must be even."
            )
        if self.mlp not in MLP_KINDS:
            raise unknown("model.mlp", self.mlp, MLP_KINDS)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        return max(1, round(self.width * self.mlp_ratio))

    def count(self) -> ModelCount:
        """Parameters and training FLOPs per token at this shape's context."""
        w, v = self.width, self.vocab_size
        mlp_matrices = 3 if self.mlp == "swiglu" else 2
        matmul = self.depth * (4 * w * w + mlp_matrices * w * self.mlp_hidden)
        params = ParamCount(
            embedding=v * w,
            unembedding=0 if self.tied_head else v * w,
            matmul=matmul,
            # Each layer has a gain before attention and one before the MLP; the head has one; QK-norm has none.
            other=(2 * self.depth + 1) * w,
        )
        return ModelCount(params, decoder_flops(matmul, w, self.heads, self.depth, self.context, v))


def check_shape(shape: object) -> None:
    """Validate the sizes of a decoder-only family. Raises `UserError`."""
    for name in ("width", "depth", "heads", "context", "vocab_size"):
        value = getattr(shape, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"model.{name}={value!r} must be an integer of at least 1.")
    width, heads = shape.width, shape.heads  # type: ignore[attr-defined]
    if width % heads:
        divisors = [h for h in range(1, width + 1) if width % h == 0 and h <= 64]
        raise UserError(
            f"model.heads={heads} does not divide model.width={width}. Choices: {', '.join(map(str, divisors))}."
        )
    if getattr(shape, "mlp_ratio", 1.0) <= 0:
        raise UserError(f"model.mlp_ratio={shape.mlp_ratio!r} must be positive.")  # type: ignore[attr-defined]


def decoder_flops(
    matmul_params: int, width: int, heads: int, depth: int, context: int, vocab_size: int
) -> FlopCount:
    """FLOPs per token of a decoder whose blocks have `matmul_params` matrix parameters.

    Attention forward, per layer and token: scores 2 s d and weighted sum 2 s d over the full context s, without a discount
    for the causal mask (as in `torch.utils.flop_counter` and Hoffmann et al. 2022, appendix F).
    """
    fb = FORWARD_AND_BACKWARD
    return FlopCount(
        matmul_per_token=fb * 2.0 * matmul_params,
        unembedding_per_token=fb * 2.0 * vocab_size * width,
        attention_per_token=fb * 4.0 * depth * context * width,
        softmax_per_token=fb * 3.0 * depth * heads * context,
        embedding_per_token=fb * 2.0 * vocab_size * width,
    )
