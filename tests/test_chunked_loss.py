"""The chunked loss as one operation: whatever the number of chunks, members and compilers, the same loss and gradient."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.specs import SHAPE, tiny
from scaling_lab.core.spec import Execution
from scaling_lab.planning.memory import loss_chunks
from scaling_lab.training.engine.chunked_loss import ChunkedHead, chunked_head, loss_and_gradient
from scaling_lab.training.engine.gradient import chunked_gradient, make_gradient, whole_gradient
from scaling_lab.training.engine.optimizer import FlatLayout
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.models import build_model

SPEC = tiny(1, shape=replace(SHAPE, vocab_size=1000))
TOKENS = SPEC.batch_tokens


def in_chunks(monkeypatch, chunks: int) -> None:
    monkeypatch.setattr("scaling_lab.planning.memory.LOGITS_AT_ONCE", TOKENS * 1000 // chunks)
    assert loss_chunks(TOKENS, 1000) == chunks


def counting_compiler(monkeypatch) -> list[int]:
    """Replaces the compiler by one that only traces; returns the numbers of operations of its graphs."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[int] = []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph

    compile_with = torch.compile
    backend = aot_autograd(fw_compiler=count)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, **options, backend=backend))
    monkeypatch.setattr("scaling_lab.training.engine.step.can_use_library", lambda *_: False)
    return graphs


def steps_in_chunks(monkeypatch, members: int | None):
    """For 4 and 64 chunks: a function that makes the step of one run, or of a stack, and its inputs."""
    corpus, lead = torch.randint(0, 256, (1000,), dtype=torch.uint8), (members,) if members else ()
    inputs = torch.zeros(*lead, 4, dtype=torch.int64), torch.full((*lead, 3), 1e-3)

    def make(**execution) -> TrainStep:
        torch.manual_seed(0)
        models = [
            build_model(SPEC.shape) for _ in range(members or 1)
        ]  # a step takes the first model's parameters
        first, specs = (models, [SPEC] * members) if members else (models[0], SPEC)
        return TrainStep(first, corpus, specs, Execution(**execution))

    for chunks in (4, 64):
        in_chunks(monkeypatch, chunks)
        yield make, inputs


@pytest.mark.parametrize("members", [None, 2], ids=["alone", "stack"])
def test_the_traced_program_does_not_grow_with_the_chunks(monkeypatch, members):
    traced = []
    for make, inputs in steps_in_chunks(monkeypatch, members):
        step = make()
        arguments = (*inputs, *step.state().values(), step.tokens)
        program = make_fx(step._whole, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
        traced.append(Counter(str(node.target) for node in program.graph.nodes))
    assert traced[0] == traced[1]
    assert traced[0]["scaling_lab.loss_and_gradient.default"] == 1


def test_what_is_compiled_does_not_grow_with_the_chunks(monkeypatch):
    monkeypatch.setattr("scaling_lab.training.engine.chunked_loss.HEADS", {})
    graphs, compiled = counting_compiler(monkeypatch), []
    for make, inputs in steps_in_chunks(monkeypatch, 2):
        graphs.clear()
        torch.compiler.reset()
        expected = make()(*inputs)
        torch.testing.assert_close(make(compile=True)(*inputs), expected, rtol=1e-6, atol=0)
        compiled.append(list(graphs))
    torch.compiler.reset()
    assert compiled[0] == compiled[1]
    assert len(compiled[0]) == 2  # the step, and one chunk


def gradient_and_parameters():
    torch.manual_seed(1)
    model = build_model(SPEC.shape)
    layout = FlatLayout.of(model)
    flat = layout.flatten({name: p.detach() for name, p in model.named_parameters()})
    return make_gradient(model, layout, SPEC, 4), flat


def test_a_stack_in_chunks_has_the_bits_of_its_members_alone(monkeypatch):
    in_chunks(monkeypatch, 5)
    gradient, flat = gradient_and_parameters()
    corpus, starts = torch.randint(0, 256, (5000,), dtype=torch.uint8), torch.arange(12).view(3, 4) * 400
    flats = torch.stack([flat, flat * 0.9, flat * 1.1])
    gradients, losses = torch.func.vmap(gradient, in_dims=(0, 0, None))(flats, starts, corpus)
    for k in range(3):
        alone, loss = gradient(flats[k], starts[k], corpus)
        assert torch.equal(gradients[k], alone)
        assert torch.equal(losses[k], loss)
    # One model, and a gradient for each sequence (the noise scale).
    each, _ = torch.func.vmap(gradient, in_dims=(None, 0, None))(flat, starts, corpus)
    assert torch.equal(each[0], gradients[0])


def test_large_chunks_on_cuda_give_the_same_loss():
    """4,096 tokens at a time instead of 668 at a vocabulary of 50k; here 128 instead of 20."""
    assert loss_chunks(65_536, 50_257) == 99
    assert loss_chunks(65_536, 50_257, "cuda") == 16
    assert loss_chunks(65_536, 256, "cuda") == loss_chunks(65_536, 256) == 1
    torch.manual_seed(3)
    model = build_model(SPEC.shape)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 256, (4, 65))
    small, loss = chunked_gradient(model, SPEC, 256, 20)(parameters, tokens[:, :-1], tokens[:, 1:])
    for other in (chunked_gradient(model, SPEC, 256, 128), whole_gradient(model, SPEC)):
        gradients, other_loss = other(parameters, tokens[:, :-1], tokens[:, 1:])
        assert other_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        for name, gradient in gradients.items():
            assert float((gradient - small[name]).norm()) <= 1e-6 * float(gradient.norm())


def test_chunks_are_of_nearly_equal_size():
    for tokens in (1, 7, 256, 4097, 65_536):
        for chunks in (1, 2, 5, 64):
            size = math.ceil(tokens / min(tokens, chunks))
            # A size that comes from a number of chunks stays.
            assert ChunkedHead(size, compiled=False).chunk_size(tokens) == size
    assert ChunkedHead(4096, compiled=False).chunk_size(4097) == 2049


def test_the_operation_keeps_the_rules_of_operations():
    """Schema, fake tensors and tracing, by torch's own check."""

    def sum_loss(rows, head, targets):
        return torch.nn.functional.cross_entropy(rows @ head[0].T, targets, reduction="sum")

    hidden, weight = torch.randn(2, 7, 4), torch.randn(2, 9, 4)
    targets = torch.randint(0, 9, (2, 7))
    name, head = chunked_head(("test",), 3, compiled=False)
    head.prepare(sum_loss, hidden, [weight[0]], 7)
    torch.library.opcheck(loss_and_gradient, (hidden, targets, [weight], name))
    losses, *_ = loss_and_gradient(hidden, targets, [weight], name)
    expected = torch.stack([sum_loss(hidden[k], [weight[k]], targets[k]) / 7 for k in range(2)])
    torch.testing.assert_close(losses, expected)
