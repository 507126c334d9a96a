"""Shape of the `gpt2` family, used in the original papers: LayerNorm, learned positions, GELU, tied head, biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scaling_lab.core.counts import ModelCount, ParamCount
from scaling_lab.core.shapes.gpt import check_shape, decoder_flops


@dataclass(frozen=True)
class GPT2Shape:
    """GPT-2 (Radford et al. 2019), as trained by Kaplan et al. 2020. Raises `UserError` like `GPTShape`."""

    kind: ClassVar[str] = "gpt2"

    width: int = 64
    depth: int = 2
    heads: int = 4
    context: int = 64
    vocab_size: int = 256
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_shape(self)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        return max(1, round(self.width * self.mlp_ratio))

    def count(self) -> ModelCount:
        """Parameters and training FLOPs per token; the tied matrix is counted once, with the embeddings."""
        w, hidden = self.width, self.mlp_hidden
        matmul = self.depth * (4 * w * w + 2 * w * hidden)
        biases = self.depth * (4 * w + hidden + w)
        layer_norms = (2 * self.depth + 1) * 2 * w
        params = ParamCount(
            embedding=(self.vocab_size + self.context) * w,
            unembedding=0,
            matmul=matmul,
            other=biases + layer_norms,
        )
        return ModelCount(
            params, decoder_flops(matmul, w, self.heads, self.depth, self.context, self.vocab_size)
        )
