"""AdamW and clipping compared with torch's own, step by step."""

from __future__ import annotations

import pytest
import torch

from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.training.engine.optimizer import (
    FlatLayout,
    adamw_update,
    clip_scale,
    control_rows,
    group_vectors,
)
from scaling_lab.training.models import build_model

OPTIMIZER = OptimizerSpec(
    peak_lr=0.01,
    embedding_lr_ratio=3.0,
    head_lr_ratio=0.5,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    clip_norm=0.7,
)


@pytest.mark.parametrize(
    "shape", [GPTShape(width=16, depth=2, heads=2), GPT2Shape(width=16, depth=1, heads=2)]
)
def test_ten_steps_equal_torchs_adamw(shape):
    torch.manual_seed(0)
    model = build_model(shape).double()
    layout = FlatLayout.of(model)
    flat = layout.flatten({n: p.detach() for n, p in model.named_parameters()}).clone()
    first, second = torch.zeros_like(flat), torch.zeros_like(flat)
    groups_of_ours = group_vectors(layout, OPTIMIZER).to(torch.float64)
    groups = [
        {
            "params": [p],
            "ratio": 3.0
            if n.startswith(("embedding", "positions"))
            else 0.5
            if n.startswith("head")
            else 1.0,
            "weight_decay": 0.1 if p.ndim >= 2 else 0.0,
        }
        for n, p in model.named_parameters()
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    rates = [0.01 * (1 - i / 20) for i in range(10)]
    controls = control_rows(rates, 0, OPTIMIZER).double()
    for step in range(10):
        gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        for (n, p), group in zip(model.named_parameters(), theirs.param_groups, strict=True):
            p.grad = gradients[n].clone()
            group["lr"] = rates[step] * group["ratio"]
        their_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        theirs.step()
        gradient = layout.flatten(gradients)
        scale, norm = clip_scale(gradient, OPTIMIZER.clip_norm)
        assert norm.item() == pytest.approx(their_norm.item(), rel=1e-12)
        adamw_update(flat, gradient * scale, first, second, groups_of_ours, OPTIMIZER, controls[step])
    for name, p in model.named_parameters():
        # Controls are float32 (as on a device), so the rates agree to about 1e-7.
        torch.testing.assert_close(layout.views(flat)[name], p.detach(), rtol=1e-5, atol=1e-7)


def test_views_share_memory_and_small_gradients_are_not_scaled():
    layout = FlatLayout(("a", "b"), (torch.Size([2, 3]), torch.Size([4])))
    flat = torch.arange(10.0)
    layout.views(flat)["b"].zero_()
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]
    scale, norm = clip_scale(torch.tensor([0.3, 0.4]), 1.0)
    assert (scale.item(), norm.item()) == (1.0, pytest.approx(0.5))


def test_tied_matrix_is_one_parameter():
    layout = FlatLayout.of(build_model(GPTShape(width=16, depth=1, heads=1, tied_head=True)))
    assert "head.weight" not in layout.names
    assert "embedding.weight" in layout.names
