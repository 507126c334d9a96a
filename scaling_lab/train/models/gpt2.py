"""Owns the module of the `gpt2` family: LayerNorm, learned positions, GELU, biases, tied head (Radford et al. 2019)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from scaling_lab.core.shapes.gpt2 import GPT2Shape

# GPT-2's own initialisation, for every size (Radford et al. 2019; nanoGPT).
INIT_STD = 0.02


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.mlp_in = nn.Linear(shape.width, shape.mlp_hidden)
        self.mlp_out = nn.Linear(shape.mlp_hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return out

    def attention(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.attention_out(y.transpose(1, 2).reshape(batch, context, width))
        return out


class GPT2(nn.Module):
    """Logits (B, T, V) of tokens (B, T), T at most the shape's context."""

    kind: ClassVar[str] = "gpt2"

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.final_norm = nn.LayerNorm(shape.width)
        self.reset_parameters(shape)

    def reset_parameters(self, shape: GPT2Shape) -> None:
        """Normal with std 0.02, zero biases; residual outputs scaled down by sqrt(2 depth)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                for linear in (module.attention_out, module.mlp_out):
                    nn.init.normal_(linear.weight, std=INIT_STD * (2 * shape.depth) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.embedding.weight)
