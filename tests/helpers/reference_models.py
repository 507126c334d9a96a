"""A forward pass of both model families in plain NumPy float64, written from their description."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import erf, expit

from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import RunSpec
from scaling_lab.training.models import build_model

Array = np.ndarray
Parameters = dict[str, Array]


def model_parameters(model: torch.nn.Module) -> Parameters:
    """A copy in float64, by name; a tied head has no entry of its own."""
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def reference_logits(shape: GPTShape | GPT2Shape, p: Parameters, tokens: Array) -> Array:
    """Logits (T, V) of one sequence (T,)."""
    return (gpt_logits if isinstance(shape, GPTShape) else gpt2_logits)(shape, p, tokens)


def reference_loss(shape: GPTShape | GPT2Shape, p: Parameters, windows: Array) -> float:
    """Mean nats per token over windows (n, context + 1), the targets one token after the inputs."""
    losses = []
    for window in windows:
        for t, logits in enumerate(reference_logits(shape, p, window[:-1])):
            losses.append(np.log(np.exp(logits).sum()) - logits[window[t + 1]])
    return float(np.mean(losses))


def gpt_logits(shape: GPTShape, p: Parameters, tokens: Array) -> Array:
    x = p["embedding.weight"][tokens]
    for layer in range(shape.depth):
        name = f"blocks.{layer}."
        h = rms_norm(x) * p[name + "attention_norm.gain"]
        q, k, v = np.split(h @ p[name + "qkv.weight"].T, 3, axis=1)
        mixed = np.empty_like(v)
        for head in np.split(np.arange(shape.width), shape.heads):
            turned = [rope(rms_norm(part[:, head]), shape.rope_base) for part in (q, k)]
            mixed[:, head] = causal_attention(*turned, v[:, head])
        x = x + mixed @ p[name + "attention_out.weight"].T
        h = (rms_norm(x) * p[name + "mlp_norm.gain"]) @ p[name + "mlp_in.weight"].T
        x = x + MLPS[shape.mlp](h) @ p[name + "mlp_out.weight"].T
    head_weight = p["embedding.weight"] if shape.tied_head else p["head.weight"]
    return (rms_norm(x) * p["final_norm.gain"]) @ head_weight.T


def gpt2_logits(shape: GPT2Shape, p: Parameters, tokens: Array) -> Array:
    def linear(h: Array, name: str) -> Array:
        return h @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(h: Array, name: str) -> Array:
        return layer_norm(h) * p[name + ".weight"] + p[name + ".bias"]

    x = np.array([p["embedding.weight"][token] + p["positions.weight"][t] for t, token in enumerate(tokens)])
    for layer in range(shape.depth):
        name = f"blocks.{layer}."
        q, k, v = np.split(linear(norm(x, name + "attention_norm"), name + "qkv"), 3, axis=1)
        mixed = np.empty_like(v)
        for head in np.split(np.arange(shape.width), shape.heads):
            mixed[:, head] = causal_attention(q[:, head], k[:, head], v[:, head])
        x = x + linear(mixed, name + "attention_out")
        x = x + linear(gelu_tanh(linear(norm(x, name + "mlp_norm"), name + "mlp_in")), name + "mlp_out")
    return norm(x, "final_norm") @ p["embedding.weight"].T


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """One head, (T, head_dim): each position averages the values up to its own."""
    out = np.empty_like(v)
    for t in range(len(q)):
        weights = np.array([math.exp(q[t] @ k[s] / math.sqrt(q.shape[1])) for s in range(t + 1)])
        out[t] = (weights / weights.sum()) @ v[: t + 1]
    return out


def rope(x: Array, base: float) -> Array:
    """Pairs (i, i + half) as complex numbers, turned by t * base^(-i / half)."""
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for t in range(len(x)):
        for i in range(half):
            angle = t * base ** (-i / half)
            # The module keeps its table in float32.
            turned = complex(x[t, i], x[t, i + half]) * complex(
                np.float32(math.cos(angle)), np.float32(math.sin(angle))
            )
            out[t, i], out[t, i + half] = turned.real, turned.imag
    return out


def rms_norm(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)


def layer_norm(x: Array) -> Array:
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swiglu(x: Array) -> Array:
    gate, value = np.split(x, 2, axis=1)
    return gate * expit(gate) * value


MLPS: dict[str, Callable[[Array], Array]] = {
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "swiglu": swiglu,
}


def split_flat(spec: RunSpec, flat: torch.Tensor) -> Parameters:
    """The flat vector's parts by name, one parameter after the other in the module's order."""
    out, start = {}, 0
    for name, p in build_model(spec.shape).named_parameters():
        out[name] = flat[start : start + p.numel()].view(p.shape).double().numpy()
        start += p.numel()
    assert start == flat.numel()
    return out
