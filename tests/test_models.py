"""The modules against a forward pass written out in plain numpy float64, and their initial values against the documented."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import erf, expit

from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
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

GPT_SMALL = GPTShape(width=24, depth=2, heads=3, context=11, vocab_size=13, rope_base=500.0)
SHAPES = [
    *(
        replace(GPT_SMALL, mlp=mlp, mlp_ratio=ratio, tied_head=tied)
        for mlp, ratio in (("relu2", 4.0), ("gelu", 3.0), ("swiglu", 8 / 3))
        for tied in (False, True)
    ),
    GPT2Shape(width=24, depth=2, heads=3, context=11, vocab_size=13),
]


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s.kind}-{getattr(s, 'mlp', '')}-{getattr(s, 'tied_head', '')}"
)
def test_logits_equal_plain_numpy(shape):
    """Every parameter is drawn at random, gains and biases too: at their initial 1 and 0 a missing one would not show."""
    generator = torch.Generator().manual_seed(1)
    model = build_model(shape).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            centre = 1.0 if name.endswith((".gain", "norm.weight")) else 0.0
            p.copy_(centre + 0.4 * noise)
    parameters = model_parameters(model)
    for length in (shape.context, 4):
        tokens = torch.randint(0, shape.vocab_size, (2, length), generator=generator)
        with torch.no_grad():
            ours = model(tokens).numpy()
        theirs = np.array([reference_logits(shape, parameters, row) for row in tokens.numpy()])
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())


WIDE, DEEP = 128, 3
RESIDUAL = (2 * DEEP) ** -0.5
# Width 128, depth 3: mlp_out's fan-in is the hidden size. Matrices not named here do not exist in the family.
GPT_STD = {
    "embedding": 1.0,
    "qkv": WIDE**-0.5,
    "attention_out": WIDE**-0.5 * RESIDUAL,
    "mlp_in": WIDE**-0.5,
    "mlp_out": (4 * WIDE) ** -0.5 * RESIDUAL,
    "head": WIDE**-0.5,
}
INITIAL_STD = {
    "gpt": (GPTShape(width=WIDE, depth=DEEP, heads=4), GPT_STD),
    "swiglu": (
        GPTShape(width=WIDE, depth=DEEP, heads=4, mlp="swiglu", mlp_ratio=8 / 3),
        {**GPT_STD, "mlp_out": 341**-0.5 * RESIDUAL},
    ),
    "tied": (
        GPTShape(width=WIDE, depth=DEEP, heads=4, tied_head=True),
        {name: std for name, std in GPT_STD.items() if name != "head"} | {"embedding": WIDE**-0.5},
    ),
    "gpt2": (
        GPT2Shape(width=WIDE, depth=DEEP, heads=4, context=256),
        {
            "embedding": 0.02,
            "positions": 0.02,
            "qkv": 0.02,
            "mlp_in": 0.02,
            "attention_out": 0.02 * RESIDUAL,
            "mlp_out": 0.02 * RESIDUAL,
        },
    ),
}


@pytest.mark.parametrize("case", INITIAL_STD)
def test_initial_values_are_the_documented(case):
    """At least 16,384 elements a matrix: the sample's std is within 3% (five standard errors), its mean near 0."""
    shape, expected = INITIAL_STD[case]
    torch.manual_seed(0)
    seen = set()
    for name, p in build_model(shape).named_parameters():
        if p.ndim == 2:
            matrix = name.split(".")[-2]
            seen.add(matrix)
            assert p.std().item() == pytest.approx(expected[matrix], rel=0.03), name
            assert abs(p.mean().item()) < 5 * expected[matrix] / math.sqrt(p.numel()), name
        else:
            one = name.endswith((".gain", "norm.weight"))
            assert torch.equal(p, torch.full_like(p, float(one))), name
    assert seen == set(expected)
