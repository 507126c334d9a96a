"""The `gpt2` family: LayerNorm, learned positions, GELU, biases, tied head (Radford et al. 2019)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from scaling_lab.core.parametrization import STANDARD, Multipliers, Parametrization
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.training.models import scaled

# GPT-2's own initialization, the same for every size (Radford et al. 2019; nanoGPT).
INIT_STD = 0.02


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the input's dtype, also where parallel=fsdp gathers its parameters in bfloat16 with their block."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: GPT2Shape, multipliers: Multipliers) -> None:
        super().__init__()
        self.residual_scale, self.attention_scale = multipliers.residual, multipliers.attention
        self.heads = shape.heads
        self.attention_norm = LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.mlp_norm = LayerNorm(shape.width)
        self.mlp_in = nn.Linear(shape.width, shape.mlp_hidden)
        self.mlp_out = nn.Linear(shape.mlp_hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + scaled(self.attention(self.attention_norm(x)), self.residual_scale)
        h = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + scaled(self.mlp_out(h), self.residual_scale)

    def attention(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.attention_scale)
        out: Tensor = self.attention_out(y.transpose(1, 2).reshape(batch, context, width))
        return out


class GPT2(nn.Module):
    """Logits (B, T, V) of tokens (B, T); T is at most the shape's context."""

    kind: ClassVar[str] = "gpt2"

    def __init__(self, shape: GPT2Shape, parametrization: Parametrization = STANDARD) -> None:
        super().__init__()
        multipliers = parametrization.multipliers(shape)
        self.head_scale = multipliers.head
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape, multipliers) for _ in range(shape.depth))
        self.final_norm = LayerNorm(shape.width)
        self.reset_parameters(parametrization.base_shape(shape), multipliers.hidden_init)

    def reset_parameters(self, base: GPT2Shape, hidden_factor: float) -> None:
        """Normal with std 0.02, zero biases; outputs to the residual stream are scaled down by sqrt(2 depth). All refer to
        the parametrization's base shape; hidden matrices are multiplied by its factor."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                factor = hidden_factor if isinstance(module, nn.Linear) else 1.0
                nn.init.normal_(module.weight, std=INIT_STD * factor)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                for linear in (module.attention_out, module.mlp_out):
                    nn.init.normal_(linear.weight, std=INIT_STD * (2 * base.depth) ** -0.5 * hidden_factor)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """The head's input, (B, T, width)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.final_norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., width); a method of its own so that the loss can be chunked."""
        return F.linear(scaled(hidden, self.head_scale), self.embedding.weight)
