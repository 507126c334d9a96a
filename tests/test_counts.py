"""Parameters and FLOPs: hand-computed numbers, `numel`, torch's FLOP counter, and Chinchilla's table A4."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scaling_lab.core.counts import (
    FLOPS_PER_PETAFLOP_DAY,
    Convention,
    FlopCount,
    ModelCount,
    ParamCount,
    tokens_for_budget,
    train_flops,
    whole_steps,
)
from scaling_lab.core.errors import UserError
from scaling_lab.core.shapes.gpt import GPTShape, decoder_flops
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.training.engine.gradient import token_loss
from scaling_lab.training.models import build_model

SHAPES = [
    GPTShape(width=16, depth=1, heads=1),
    GPTShape(width=48, depth=3, heads=4, context=32, vocab_size=101, mlp="gelu"),
    GPTShape(width=32, depth=2, heads=2, mlp="swiglu", mlp_ratio=8 / 3),
    GPTShape(width=32, depth=2, heads=2, tied_head=True),
    GPT2Shape(width=32, depth=2, heads=2),
    GPT2Shape(width=24, depth=1, heads=3, context=16, vocab_size=50),
]


def ids(shape: object) -> str:
    return repr(shape).replace(" ", "")


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_parameters_equal_numel(shape):
    model = build_model(shape)
    params = shape.count().params
    assert params.total == sum(p.numel() for p in model.parameters())
    by_kind = {"embedding": 0, "unembedding": 0, "matmul": 0, "other": 0}
    for name, p in model.named_parameters():
        if name.startswith(("embedding.", "positions.")):
            by_kind["embedding"] += p.numel()
        elif name.startswith("head."):
            by_kind["unembedding"] += p.numel()
        else:
            by_kind["matmul" if p.ndim == 2 else "other"] += p.numel()
    assert by_kind == {name: getattr(params, name) for name in by_kind}


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_flops_equal_torchs_counter(shape):
    """Forward + backward of whole sequences, exactly; the counter sees matrix products and attention only.

    One stated difference: fused attention's backward recomputes the scores (5 products for the forward's 2, so 2.5
    times its FLOPs instead of 2), which the model does not need. With the unfused kernel the counts are equal.
    """
    model = build_model(shape)
    sequences = 3
    tokens = torch.randint(0, shape.vocab_size, (sequences, shape.context + 1))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    ours = shape.count().flops_per_token(Convention.MATMUL_PLUS_ATTENTION) * sequences * shape.context
    assert counter.get_total_flops() == ours


def test_hand_computed_gpt():
    """Width 16, depth 1, vocabulary 256, context 64: every term by hand."""
    count = GPTShape(width=16, depth=1, heads=1, context=64, vocab_size=256).count()
    assert count.params == ParamCount(embedding=4096, unembedding=4096, matmul=12 * 256, other=48)
    n = count.n_params
    assert n(Convention.SIX_N_TOTAL) == 4096 + 4096 + 3072 + 48
    assert n(Convention.SIX_N_NON_EMBEDDING) == 3072 + 48
    assert n(Convention.SIX_N_WITH_HEAD) == 3072 + 48 + 4096
    per_token = count.flops_per_token
    assert per_token(Convention.SIX_N_WITH_HEAD) == 6 * 7216
    # Attention: 12 L s d = 12 * 1 * 64 * 16.
    assert per_token(Convention.MATMUL_PLUS_ATTENTION) == 6 * 3072 + 6 * 4096 + 12288
    # DeepSeek: M = 72 L d^2 + 12 L d s.
    assert per_token(Convention.DEEPSEEK_M) == 72 * 256 + 12 * 16 * 64
    # Appendix F adds the softmax, 3 * 3 h s L, and the embedding as a product, 3 * 2 V d.
    assert per_token(Convention.CHINCHILLA_APPENDIX_F) == 6 * 7168 + 12288 + 9 * 64 + 6 * 4096


def test_tied_head_costs_flops_but_no_parameters():
    tied = GPTShape(width=32, depth=2, heads=2, tied_head=True).count()
    untied = GPTShape(width=32, depth=2, heads=2).count()
    assert untied.params.total - tied.params.total == 256 * 32
    for convention in (Convention.SIX_N_WITH_HEAD, Convention.MATMUL_PLUS_ATTENTION):
        assert tied.n_params(convention) == untied.n_params(convention)
        assert tied.flops_per_token(convention) == untied.flops_per_token(convention)


# Shapes of Hoffmann et al. 2022, table A9 (d_model, ffw, kv, heads, layers), and table A4's ratio to 6 N D. As in the
# paper's own arithmetic: sequences of 2048, a vocabulary of 32,000, the blocks' FLOPs alone, and N with one embedding
# and the relative positions' matrix.
TABLE_A4 = [
    ("73M", 640, 2560, 64, 10, 10, 1.03),
    ("305M", 1024, 4096, 64, 16, 20, 1.10),
    ("552M", 1280, 5120, 128, 10, 24, 1.08),
    ("1.1B", 1792, 7168, 128, 14, 26, 1.04),
    ("1.6B", 2048, 8192, 128, 16, 28, 1.03),
    ("6.8B", 3584, 14336, 128, 28, 40, 0.99),
]


@pytest.mark.parametrize(
    ("name", "d", "ffw", "kv", "heads", "layers", "ratio"), TABLE_A4, ids=[r[0] for r in TABLE_A4]
)
def test_chinchilla_table_a4(name, d, ffw, kv, heads, layers, ratio):
    block = 4 * d * kv * heads + 2 * d * ffw
    flops = decoder_flops(layers * block, kv * heads, heads, layers, 2048, 32_000)
    blocks_alone = flops.matmul_per_token + flops.attention_per_token + flops.softmax_per_token
    n = layers * (block + d * d) + 32_000 * d
    assert blocks_alone / (6 * n) == pytest.approx(ratio, abs=0.012)


def test_units_and_rounding():
    assert FLOPS_PER_PETAFLOP_DAY == 1e15 * 24 * 3600
    # Chinchilla: 70e9 parameters on 1.4e12 tokens, 5.88e23 FLOPs; in int64 with N * D * 6 this would overflow.
    assert train_flops(6 * 70_000_000_000, 1_400_000_000_000) == pytest.approx(5.88e23)
    assert tokens_for_budget(6e6, 6e3) == 1000
    assert [whole_steps(t, 100) for t in (49, 50, 149, 151, 1000)] == [0, 1, 1, 2, 10]


def test_six_n_conventions_are_six_n():
    count = ModelCount(ParamCount(10, 20, 300, 4), FlopCount(6.0 * 300, 120.0, 50.0))
    for convention in Convention:
        if convention.is_six_n:
            assert count.flops_per_token(convention) == 6 * count.n_params(convention)
        else:
            assert count.flops_per_token(convention) > 6 * count.n_params(Convention.SIX_N_NON_EMBEDDING)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 0}, "model.width=0"),
        ({"width": 20, "heads": 3}, "model.heads=3"),
        ({"width": 18, "heads": 6}, "must be even"),
        ({"mlp": "relu3"}, "model.mlp='relu3'"),
        ({"depth": 2.5}, "model.depth=2.5"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio"),
    ],
)
def test_impossible_shapes_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        GPTShape(**options)
