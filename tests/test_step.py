"""Variants of the step compared with the plain one: micro-batches, chunked loss, stacks, and CUDA graphs on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from helpers.specs import SHAPE, tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import Execution
from scaling_lab.training.engine.chunked_loss import loss_and_gradient_of
from scaling_lab.training.engine.gradient import (
    ModelWithLoss,
    autocast,
    chunked_gradient,
    head_parameters,
    make_gradient,
    whole_gradient,
)
from scaling_lab.training.engine.optimizer import FlatLayout, control_rows
from scaling_lab.training.engine.step import (
    GRADIENT_SQUARE,
    LOSS,
    MICRO_GRADIENT_SQUARE,
    StackSlot,
    TrainStep,
)
from scaling_lab.training.models import build_model
from scaling_lab.training.run.session import open_session, train_block

SHAPES = [SHAPE, GPTShape(width=16, depth=1, heads=1, tied_head=True), GPT2Shape(width=16, depth=1, heads=1)]


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_give_the_same_losses(micro):
    spec = tiny(20)
    whole = train_block(open_session(spec, Execution()), 0, 20)
    parts = train_block(open_session(spec, Execution(micro_batch_sequences=micro)), 0, 20)
    assert parts == pytest.approx(whole, rel=2e-5)
    assert parts != whole  # rounded differently, so micro-batches were really used
    with pytest.raises(ValueError, match="do not divide"):
        open_session(spec, Execution(micro_batch_sequences=3))


def test_step_metrics_include_the_norms_of_micro_batches():
    """Compared with autograd on the ordinary module."""
    spec = tiny(1)
    session = open_session(spec, Execution(micro_batch_sequences=1))
    starts = torch.arange(spec.batch_sequences) * 640
    windows = torch.stack([session.step.tokens[s : s + 65] for s in starts.tolist()]).long()
    model = session.step.model
    per_sequence = []
    for window in windows:
        loss = torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        per_sequence.append(torch.cat([g.flatten() for g in gradients]))
    stacked = torch.stack(per_sequence)
    metrics = session.step.run(starts[None], control_rows([0.01], 0, spec.optimizer))[0]
    assert metrics[MICRO_GRADIENT_SQUARE].item() == pytest.approx(
        stacked.square().sum(1).mean().item(), rel=1e-4
    )
    assert metrics[GRADIENT_SQUARE].item() == pytest.approx(stacked.mean(0).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=["gpt", "tied", "gpt2"])
@pytest.mark.parametrize("chunks", [2, 5, 256])
def test_chunked_loss_is_the_same_loss_and_gradient(shape, chunks):
    spec = tiny(1, shape=shape)
    torch.manual_seed(3)
    model = build_model(shape)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 256, (4, 65))
    ours, loss = chunked_gradient(model, spec, 256, math.ceil(256 / chunks))(
        parameters, tokens[:, :-1], tokens[:, 1:]
    )
    plain, plain_loss = whole_gradient(model, spec)(parameters, tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    for name in parameters:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6)


def test_head_parameters_are_found():
    names = [head_parameters(build_model(shape), tiny(1, shape=shape)) for shape in SHAPES]
    assert names == [("head.weight",), ("embedding.weight",), ("embedding.weight",)]


def largest_tensor(work: Callable[[], object]) -> int:
    """Number of elements of the largest tensor that any of its operations creates."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            Watch.largest = max(Watch.largest, *sizes, 0)
            return out

    with Watch():
        work()
    return Watch.largest


def test_no_logits_of_a_whole_batch_over_a_large_vocabulary(monkeypatch):
    """In a single process, in a share of a team, and with sharded parameters."""
    spec = tiny(1, shape=replace(SHAPE, vocab_size=4000), batch_tokens=64 * 16, train_tokens=64 * 16)
    everything = 64 * 16 * 4000
    model, text = build_model(spec.shape), torch.zeros(1000, dtype=torch.uint8)
    layout = FlatLayout.of(model)
    flat = layout.flatten({n: p.detach() for n, p in model.named_parameters()})
    window = torch.zeros(16, 65, dtype=torch.int64)

    def alone() -> None:
        make_gradient(model, layout, spec, 16)(flat, torch.arange(16), text)

    def spread() -> None:
        ModelWithLoss(model, spec)(window[:, :-1], window[:, 1:]).backward()

    assert [largest_tensor(work) for work in (alone, spread)] == [everything] * 2
    # The operation's body, so that its own operations are seen.
    monkeypatch.setattr("scaling_lab.training.engine.gradient.loss_and_gradient", loss_and_gradient_of)
    monkeypatch.setattr("scaling_lab.planning.memory.LOGITS_AT_ONCE", everything // 8)
    assert max(largest_tensor(work) for work in (alone, spread)) <= everything // 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["gpt", "tied", "gpt2"])
def test_a_model_with_its_loss_has_the_same_gradient(shape, dtype, monkeypatch):
    spec = tiny(1, shape=shape, dtype=dtype)
    monkeypatch.setattr("scaling_lab.planning.memory.LOGITS_AT_ONCE", 64 * 256)  # 4 chunks of one sequence
    torch.manual_seed(3)
    model = build_model(shape)
    tokens = torch.randint(0, 256, (4, 65))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    plain, plain_loss = whole_gradient(model, spec)(parameters, tokens[:, :-1], tokens[:, 1:])
    with_loss = ModelWithLoss(model, spec)
    with autocast(tokens, spec):
        loss = with_loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    rounding = 1e-6 if dtype == "float32" else 1e-2
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss.item(), rel=rounding)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (
            float((parameter.grad - plain[name]).norm()) <= rounding * 10 * float(plain[name].norm()) + 1e-7
        )
    assert torch.equal(with_loss(tokens[:, :-1]), model(tokens[:, :-1]))


def stack_of(specs, execution: Execution | None = None):
    sessions = [open_session(s, Execution()) for s in specs]
    step = TrainStep(
        [s.step.model for s in sessions], sessions[0].step.tokens, specs, execution or Execution()
    )
    return sessions, step


def run_stack(sessions, step, first: int, last: int, live=None) -> torch.Tensor:
    """Losses (steps, K) of a stack in which only the members in `live` are trained."""
    starts, controls = [], []
    for k, session in enumerate(sessions):
        spec, count = session.spec, last - first
        windows = session.order.windows(first * spec.batch_sequences, count * spec.batch_sequences)
        starts.append(torch.from_numpy(windows * spec.shape.context).view(count, -1))
        rates = [spec.learning_rate(min(step_, spec.steps - 1)) for step_ in range(first, last)]
        rows = control_rows(rates, first, spec.optimizer)
        controls.append(rows if live is None or k in live else torch.zeros_like(rows))
    return step.run(torch.stack(starts, 1), torch.stack(controls, 1))[..., LOSS]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_stack_equals_its_runs_alone(compiled):
    """With different seeds, learning rates, clipping norms and weight decays."""
    base = tiny(30)
    specs = [
        base,
        replace(base, seed_init=1, seed_data=1),
        replace(base, optimizer=replace(base.optimizer, peak_lr=0.005, clip_norm=0.1, weight_decay=0.3)),
    ]
    execution = Execution(compile=compiled)
    alone = [train_block(open_session(s, execution), 0, 20) for s in specs]
    together = run_stack(*stack_of(specs, execution), 0, 20)
    for k, losses in enumerate(alone):
        assert together[:, k].tolist() == pytest.approx(losses, rel=2e-5)


def test_a_diverged_or_idle_member_does_not_change_the_others_by_a_bit():
    base = tiny(30)
    others = [base, replace(base, seed_init=1, seed_data=1)]
    calm, wild = replace(base, seed_init=2), replace(base, optimizer=replace(base.optimizer, peak_lr=1e30))
    runs = {}
    for name, third in (("calm", calm), ("wild", wild)):
        sessions, step = stack_of([*others, third])
        runs[name] = (run_stack(sessions, step, 0, 20), step)
    assert not torch.isfinite(runs["wild"][0][-1, 2])
    assert torch.isfinite(runs["calm"][0]).all()
    assert torch.equal(runs["wild"][0][:, :2], runs["calm"][0][:, :2])
    assert torch.equal(runs["wild"][1].flat[:2], runs["calm"][1].flat[:2])
    # Idle: a row of zeros as controls.
    sessions, step = stack_of([*others, wild])
    before = {name: t.clone() for name, t in StackSlot(step, 2).state().items()}
    resting = run_stack(sessions, step, 0, 20, live=(0, 1))
    assert torch.equal(resting[:, :2], runs["calm"][0][:, :2])
    assert all(torch.equal(t, before[name]) for name, t in StackSlot(step, 2).state().items())


def test_a_process_compiles_every_run_however_many_came_before_it(monkeypatch):
    """Dynamo stops compiling a function after a number of programs, and would silently run later ones eagerly."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        "scaling_lab.training.engine.step.can_use_library", lambda *_: False
    )  # otherwise small steps do not use torch.compile
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, **options, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (8, 16, 24):
            spec = tiny(1, shape=GPTShape(width=width, depth=1, heads=1))
            before = len(compiled)
            train_block(open_session(spec, Execution(compile=True)), 0, 1)
            assert len(compiled) > before, f"width {width} was computed eagerly"
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_cuda_graph_gives_the_eager_losses(monkeypatch, micro, compiled):
    spec = tiny(150)
    execution = Execution(device="cuda", compile=compiled, micro_batch_sequences=micro)
    graphed, eager = open_session(spec, execution), open_session(spec, execution)
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    ours = train_block(graphed, 0, 150)
    assert len(replays) == 150  # the graph was captured; no fallback
    monkeypatch.setattr("scaling_lab.training.engine.step.BlockGraph", OneByOne)
    assert ours == pytest.approx(train_block(eager, 0, 150), rel=1e-6)
    assert len(replays) == 150
    torch.testing.assert_close(graphed.step.flat, eager.step.flat, rtol=1e-5, atol=1e-6)


class OneByOne:
    """In place of a `BlockGraph`: steps launched one by one."""

    def __init__(self, *_):
        pass

    def run(self, step, starts, controls):
        return torch.stack([step(starts[i], controls[i]) for i in range(len(starts))])
