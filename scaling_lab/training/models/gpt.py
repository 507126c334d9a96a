"""The `gpt` family: pre-norm RMSNorm, RoPE, QK-norm, no biases, untied head."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling_lab.core.parametrization import STANDARD, Multipliers, Parametrization
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.training.models import scaled

RMS_NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Under parallel=fsdp with bfloat16 the gain is gathered in bfloat16 with its block; elsewhere `to` does nothing.
        return F.rms_norm(x, (x.shape[-1],), self.gain.to(x.dtype), RMS_NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al. 2021, arXiv 2104.09864) on (..., T, head_dim), halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: GPTShape, multipliers: Multipliers) -> None:
        super().__init__()
        w, hidden = shape.width, shape.mlp_hidden
        self.residual_scale, self.attention_scale = multipliers.residual, multipliers.attention
        self.heads, self.kind_of_mlp = shape.heads, shape.mlp
        self.attention_norm = RMSNorm(w)
        self.qkv = nn.Linear(w, 3 * w, bias=False)
        self.attention_out = nn.Linear(w, w, bias=False)
        self.mlp_norm = RMSNorm(w)
        self.mlp_in = nn.Linear(w, 2 * hidden if shape.mlp == "swiglu" else hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, w, bias=False)

    def reset_parameters(self, base: GPTShape, factor: float) -> None:
        """Initialize with `factor` times the standard deviations of a block of the shape `base`."""
        residual = (2 * base.depth) ** -0.5
        for linear in (self.qkv, self.mlp_in):
            nn.init.normal_(linear.weight, std=base.width**-0.5 * factor)
        nn.init.normal_(self.attention_out.weight, std=base.width**-0.5 * residual * factor)
        nn.init.normal_(self.mlp_out.weight, std=base.mlp_hidden**-0.5 * residual * factor)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + scaled(self.attention(self.attention_norm(x), cos, sin), self.residual_scale)
        return x + scaled(self.mlp(self.mlp_norm(x)), self.residual_scale)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, context, width = x.shape
        head_dim = width // self.heads
        q, k, v = self.qkv(x).view(batch, context, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        # QK-norm (Henry et al. 2020, arXiv 2010.04245), without a gain: bounded logits, stable at large LR.
        q = rotate(F.rms_norm(q, (head_dim,), eps=RMS_NORM_EPS), cos, sin)
        k = rotate(F.rms_norm(k, (head_dim,), eps=RMS_NORM_EPS), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.attention_scale)
        out: Tensor = self.attention_out(y.transpose(1, 2).reshape(batch, context, width))
        return out

    def mlp(self, x: Tensor) -> Tensor:
        h = self.mlp_in(x)
        if self.kind_of_mlp == "relu2":
            h = F.relu(h).square()
        elif self.kind_of_mlp == "gelu":
            h = F.gelu(h)
        else:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        out: Tensor = self.mlp_out(h)
        return out


class GPT(nn.Module):
    """Logits (B, T, V) of tokens (B, T); T is at most the shape's context."""

    kind: ClassVar[str] = "gpt"

    def __init__(self, shape: GPTShape, parametrization: Parametrization = STANDARD) -> None:
        super().__init__()
        multipliers = parametrization.multipliers(shape)
        self.head_scale = multipliers.head
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, multipliers) for _ in range(shape.depth))
        self.final_norm = RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        if shape.tied_head:
            self.head.weight = self.embedding.weight
        half = shape.head_dim // 2
        frequencies = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(shape.context, dtype=torch.float64)[:, None] * frequencies
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.reset_parameters(parametrization.base_shape(shape), multipliers.hidden_init)

    def reset_parameters(self, base: GPTShape, hidden_factor: float) -> None:
        """Matrices with standard deviation 1/sqrt(fan_in); those that write to the residual stream are scaled down by
        sqrt(2 depth) (GPT-2). Both refer to the parametrization's base shape; hidden matrices are multiplied by its factor."""
        # A unit embedding under pre-norm: with 0.1 the loss of tiny models is 0.05 nats higher, as it is with a smaller
        # head (results/LOG.md). A tied matrix also serves as the head.
        nn.init.normal_(self.embedding.weight, std=base.width**-0.5 if base.tied_head else 1.0)
        if not base.tied_head:
            nn.init.normal_(self.head.weight, std=base.width**-0.5)
        for module in self.modules():
            if isinstance(module, Block):
                module.reset_parameters(base, hidden_factor)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The head's input, (B, T, width)."""
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        out: Tensor = self.final_norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., width); a method of its own so that the loss can be chunked."""
        out: Tensor = self.head(scaled(hidden, self.head_scale))
        return out
