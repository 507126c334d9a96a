"""The models compared with a forward pass in NumPy float64, and their initial values with the documented ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.reference_models import model_parameters, reference_logits
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.training.models import build_model

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
    """All parameters are random, gains and biases too: with their initial 1 and 0 a missing one would not be noticed."""
    generator = torch.Generator().manual_seed(1)
    model = build_model(shape).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            center = 1.0 if name.endswith((".gain", "norm.weight")) else 0.0
            p.copy_(center + 0.4 * noise)
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
def test_initial_values_are_as_documented(case):
    """Matrices have at least 16,384 elements: the sample's std is within 3% (five standard errors), its mean near 0."""
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
