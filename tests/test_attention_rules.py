"""Attention in a stack: one operation for all members, with the values of a loop over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.specs import SHAPE, tiny
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import Execution
from scaling_lab.training.engine import attention_rules
from scaling_lab.training.engine.attention_rules import (
    OPERATIONS,
    apply_rule,
    lacks_rule,
    register_attention_rules,
)
from scaling_lab.training.engine.gradient import make_gradient
from scaling_lab.training.engine.optimizer import FlatLayout
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.models import build_model

SHAPES = [SHAPE, GPT2Shape(width=16, depth=1, heads=2)]
aten = torch.ops.aten


def gradient_of(shape) -> tuple[Callable, Tensor]:
    """The gradient of one member, and its parameters."""
    torch.manual_seed(1)
    model = build_model(shape)
    layout = FlatLayout.of(model)
    flat = layout.flatten({name: p.detach() for name, p in model.named_parameters()})
    return make_gradient(model, layout, tiny(1, shape=shape), 4), flat


@pytest.mark.parametrize("shape", SHAPES, ids=["gpt", "gpt2"])
def test_the_program_does_not_grow_with_the_members(shape):
    counts = []
    for members in (2, 8, 64):
        spec, corpus = tiny(1, shape=shape), torch.zeros(1000, dtype=torch.uint8)
        step = TrainStep([build_model(shape)] * members, corpus, [spec] * members, Execution())
        starts = torch.zeros(members, step.batch, dtype=torch.int64)
        inputs = (starts, torch.ones(members, 3), *step.state().values(), corpus)
        program = make_fx(step._whole, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        counts.append(Counter(str(node.target) for node in program.graph.nodes))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["aten._scaled_dot_product_flash_attention_for_cpu_backward.default"] == shape.depth


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=["gpt", "gpt2"])
def test_gradients_equal_a_loop_over_members_and_ignore_the_neighbors(shape, compiled):
    register_attention_rules()
    gradient, flat = gradient_of(shape)
    stack = torch.func.vmap(gradient, in_dims=(0, 0, None))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    if compiled:
        from torch._dynamo.backends.common import aot_autograd

        stack = torch.compile(stack, backend=aot_autograd(fw_compiler=backend), dynamic=False)
    corpus = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    starts = torch.arange(12).view(3, 4) * 400
    flats = torch.stack([flat, flat * 0.9, flat * 1.1])
    gradients, losses = stack(flats, starts, corpus)
    for k in range(3):
        alone, loss = gradient(flats[k], starts[k], corpus)
        torch.testing.assert_close(gradients[k], alone, rtol=1e-5, atol=1e-7)
        assert losses[k].item() == pytest.approx(loss.item(), rel=1e-6)
    for other in (flat * 3, flat * float("nan")):
        again = stack(torch.stack([other, flats[1], other]), starts.flip(1), corpus)
        same = stack(flats, starts.flip(1), corpus)
        assert torch.equal(again[0][1], same[0][1])
        assert torch.equal(again[1][1], same[1][1])
    calls = Counter(str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert (
        calls["aten._scaled_dot_product_flash_attention_for_cpu_backward.default"] == shape.depth
    ) == compiled
    torch.compiler.reset()


def test_only_missing_rules_are_registered():
    registered = register_attention_rules()
    # torch 2.13 has none of these, and rules for the forward passes on CUDA.
    assert set(registered) <= set(OPERATIONS)
    assert not any(lacks_rule(name) for name in OPERATIONS)
    assert not lacks_rule("_scaled_dot_product_flash_attention")
    assert not lacks_rule("not_an_operation")


@pytest.mark.parametrize("own", [True, False], ids=["a-mask-each", "one-mask"])
@pytest.mark.parametrize("size", [(8, 8), (2, 1, 8, 8)], ids=["square", "by-sequence"])
def test_attention_with_a_mask(own, size):
    register_attention_rules()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 2, 8, 4).unbind(0)
    mask = torch.randn((3, *size) if own else size)

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, 0, 0 if own else None))(q, k, v, mask)
    for i in range(3):
        alone = torch.func.grad(loss, (0, 1, 2))(q[i], k[i], v[i], mask[i] if own else mask)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i], expected)


def cpu_kernels(library: torch.library.Library) -> None:
    """Kernels on the CPU for the operations of CUDA, with their arguments and results."""
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    none = torch.zeros(0)

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        out, logsumexp = forward(q, k, v, 0.0, is_causal, scale=scale)
        return out, logsumexp, none.clone(), none.clone(), 8, 8, none.clone(), none.clone(), none.clone()

    def flash_backward(
        grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, p, is_causal, seed, offset, *, scale=None
    ):
        assert max_q == max_k == 8
        return backward(grad, q, k, v, out, lse, 0.0, is_causal, scale=scale)

    def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        assert compute_log_sumexp
        return *forward(q, k, v, 0.0, is_causal, scale=scale), none.clone(), none.clone()

    def efficient_backward(
        grad, q, k, v, bias, out, lse, seed, offset, p, mask, is_causal=False, *, scale=None
    ):
        return *backward(grad, q, k, v, out, lse, 0.0, is_causal, scale=scale), None

    def cudnn(
        q, k, v, bias, compute_log_sumexp, p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        return flash(q, k, v, p, is_causal, scale=scale)

    def cudnn_backward(grad, q, k, v, out, lse, seed, offset, bias, *rest, scale=None):
        return backward(grad, q, k, v, out, lse, 0.0, rest[-1], scale=scale)

    kernels = {
        "flash": flash, "flash_attention_backward": flash_backward, "efficient": efficient,
        "efficient_attention_backward": efficient_backward, "cudnn": cudnn, "cudnn_attention_backward": cudnn_backward,
    }  # fmt: skip
    for name, kernel in kernels.items():
        full = name if "attention" in name else f"{name}_attention"
        library.impl(f"_scaled_dot_product_{full}", kernel, "CPU")


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_rules_of_attention_on_cuda_by_stand_ins_on_the_cpu(name):
    register_attention_rules()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 2, 8, 4).unbind(0)
    operation = getattr(aten, f"_scaled_dot_product_{name}_attention")
    before = (0.0, True) if name == "flash" else (None, True, 0.0, True)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return operation(q, k, v, *before, scale=0.3)[0].square().sum()

    gradients = torch.func.grad(loss, (0, 1, 2))
    with torch.library._scoped_library("aten", "IMPL") as library:
        cpu_kernels(library)
        program = make_fx(torch.func.vmap(gradients))(q, k, v)
        calls = Counter(str(node.target) for node in program.graph.nodes)
        assert calls[f"aten._scaled_dot_product_{name}_attention_backward.default"] == 1
        together = torch.func.vmap(gradients)(q, k, v)
        for i in range(3):
            for ours, expected in zip(together, gradients(q[i], k[i], v[i]), strict=True):
                torch.testing.assert_close(ours[i], expected)


def test_where_the_folded_call_fails_members_are_computed_one_by_one(caplog):
    class Info:
        batch_size = 3

    def only_small(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, None]:
        if query.shape[0] > 2:
            raise RuntimeError("too many sequences\nand more")
        return query * key * scale, None

    attention_rules.warn_once.cache_clear()
    query, key = torch.randn(2, 3, 4), torch.randn(2, 4)
    for _ in range(2):
        (out, none), dims = apply_rule(
            only_small, ["query", "key", "scale"], Info(), (1, None, None), query, key, 2.0
        )
        assert (none, dims) == (None, (0, None))
        torch.testing.assert_close(out, query.movedim(1, 0) * key * 2)
    (line,) = caplog.messages
    assert line.endswith("too many sequences")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_attention_of_a_stack_on_a_gpu(backend):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    register_attention_rules()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, 4, 2, 64, 16, device="cuda", dtype=torch.bfloat16).unbind(0)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.float().square().sum()

    gradients = torch.func.grad(loss, (0, 1, 2))
    attention_rules.warn_once.cache_clear()
    with sdpa_kernel(getattr(SDPBackend, backend)):
        together = torch.func.vmap(gradients)(q, k, v)
        alone = [gradients(q[i], k[i], v[i]) for i in range(8)]
    assert attention_rules.warn_once.cache_info().currsize == 0  # the folded call worked
    for position, ours in enumerate(together):
        expected = torch.stack([each[position] for each in alone])
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
