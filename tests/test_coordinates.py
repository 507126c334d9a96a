"""The coordinate check of every family: a few real steps at several widths and depths."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from scaling_lab.core.parametrization import STANDARD, CompleteP, MuP
from scaling_lab.core.registry import members
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.training.measure.coordinates import (
    LOGITS,
    STREAM,
    Coordinates,
    activations,
    growth,
    measure,
    shapes_along,
)
from scaling_lab.training.models import build_model

SMALL = {"width": 32, "depth": 2, "heads": 2, "context": 32}
# All families; a new one is included automatically.
SHAPES = [
    *(cls(**SMALL) for cls in members("scaling_lab.core.shapes").values()),
    GPTShape(**SMALL, tied_head=True),
]
BASE = {"base_width": 32, "base_head_dim": 16}
WIDTHS, DEPTHS = (32, 64, 128), (2, 4, 8, 16)
# An exponent of 0.2 is a factor of 1.3 over a four-fold size; those of the standard parametrization are 0.8 to 2.
FLAT, GROWING = 0.2, 0.5


@cache
def text() -> np.ndarray:
    return PySource(max_mb=1.0).tokens("train")


def points(shape: Any, parametrization: Any, by: str) -> list[Coordinates]:
    shapes = shapes_along(shape, widths=WIDTHS) if by == "width" else shapes_along(shape, depths=DEPTHS)
    return [measure(s, parametrization, text(), peak_lr=0.01, seeds=(0, 1)) for s in shapes]


def name_of(shape: Any) -> str:
    return f"{shape.kind}{'-tied' if getattr(shape, 'tied_head', False) else ''}"


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_activations_are_flat_in_width_under_mup_and_completep_only(shape):
    for parametrization in (MuP(**BASE), CompleteP(**BASE)):
        flat = points(shape, parametrization, "width")
        for quantity in (STREAM, LOGITS):
            assert abs(growth(flat, "width", lambda p, q=quantity: p.size[q])) < FLAT, quantity
            assert abs(growth(flat, "width", lambda p, q=quantity: p.change[q])) < FLAT, quantity
    standard = points(shape, STANDARD, "width")
    assert growth(standard, "width", lambda p: p.size[STREAM]) > GROWING
    assert growth(standard, "width", lambda p: p.change[STREAM]) > GROWING


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_activations_are_flat_in_depth_under_completep_only(shape):
    flat = points(shape, CompleteP(**BASE), "depth")
    for quantity in (STREAM, LOGITS):
        assert abs(growth(flat, "depth", lambda p, q=quantity: p.size[q])) < FLAT, quantity
        assert abs(growth(flat, "depth", lambda p, q=quantity: p.change[q])) < FLAT, quantity
    for parametrization in (STANDARD, MuP(**BASE)):
        deeper = points(shape, parametrization, "depth")
        assert growth(deeper, "depth", lambda p: p.size[STREAM]) > GROWING
        assert growth(deeper, "depth", lambda p: p.change[STREAM]) > GROWING


def test_activations_are_those_of_the_modules():
    """Compared with running the parts one after the other; the hooks are removed afterwards."""
    model = build_model(GPTShape(**SMALL))
    tokens = torch.randint(0, 256, (2, 32))
    seen = activations(model, dict(model.named_parameters()), tokens)
    x = begin = model.embedding(tokens)
    for block in model.blocks:
        x = block(x, model.cos[:32], model.sin[:32])
    torch.testing.assert_close(seen[STREAM], x.detach())
    torch.testing.assert_close(seen["residual branches"], (x - begin).detach())
    torch.testing.assert_close(seen[LOGITS], model(tokens).detach())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_growth_of_a_power_law():
    made = [Coordinates(STANDARD, w, 2, {STREAM: 3.0 * w**0.5}, {STREAM: 2.0}) for w in WIDTHS]
    assert growth(made, "width", lambda p: p.size[STREAM]) == pytest.approx(0.5)
    assert growth(made, "width", lambda p: p.change[STREAM]) == pytest.approx(0.0, abs=1e-12)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="too few"):
        measure(SHAPES[0], STANDARD, text()[:100], peak_lr=0.01)
