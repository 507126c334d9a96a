"""One compiled program for all runs of a shape, as on CUDA; here with a compiler that only counts, on a CPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from helpers.specs import SHAPE, tiny
from scaling_lab.core.parametrization import MuP
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import Execution
from scaling_lab.training.engine import shared_programs
from scaling_lab.training.engine.devices import set_deterministic
from scaling_lab.training.engine.shared_programs import (
    PROGRAMS,
    SharedProgram,
    determinism_switches,
    with_own_code,
    without_weights,
)
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.models import build_model
from scaling_lab.training.run.session import open_session, train_block


@pytest.fixture
def graphs(monkeypatch):
    """Programs are shared, as on CUDA, by a compiler that only traces; the list of its graphs."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[torch.fx.GraphModule] = []

    def count(graph, inputs):
        found.append(graph)
        return graph

    compile_with, backend = torch.compile, aot_autograd(fw_compiler=count)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, **options, backend=backend))
    monkeypatch.setattr("scaling_lab.training.engine.step.shares_programs", lambda _: True)
    monkeypatch.setattr("scaling_lab.training.run.session.shares_programs", lambda _: True)
    monkeypatch.setattr(shared_programs, "PROGRAMS", {})
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def runs_of_a_shape(shape, **changes) -> list:
    """Two batches, seeds, horizons, learning rates, clipping norms and weight decays."""
    base = tiny(30, shape=shape, **changes)
    other = replace(
        base, batch_tokens=512, train_tokens=512 * 40, seed_init=1, seed_data=2,
        optimizer=replace(base.optimizer, peak_lr=0.005, weight_decay=0.3, clip_norm=0.1),
    )  # fmt: skip
    return [base, other, replace(base, batch_tokens=448, train_tokens=448 * 20)]


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("scaling_lab")]


def assert_as_eager(spec) -> None:
    ours = train_block(open_session(spec, Execution(compile=True)), 0, 4)
    assert ours == pytest.approx(train_block(open_session(spec, Execution()), 0, 4), rel=1e-5)


def test_one_graph_for_all_runs_of_a_shape(graphs, caplog):
    for spec in runs_of_a_shape(SHAPE):
        assert_as_eager(spec)
        assert len(graphs) == 1
    assert_as_eager(tiny(4, shape=replace(SHAPE, width=8)))
    assert len(graphs) == 2
    assert not warnings(caplog)


def test_a_family_whose_batch_the_tracer_fixes_has_a_graph_for_each_batch(graphs, caplog):
    """torch 2.13 cannot trace layers with biases for a dynamic batch size; a later version may."""
    for spec in runs_of_a_shape(GPT2Shape(width=16, depth=1, heads=1)):
        assert_as_eager(spec)
    # The first graph of four is thrown away.
    assert (len(graphs), len(warnings(caplog))) in ((4, 1), (1, 0))


def test_one_graph_for_stacks_of_a_batch_and_two_for_micro_batches(graphs):
    first, other, _ = runs_of_a_shape(SHAPE)
    same_batch = replace(other, batch_tokens=first.batch_tokens, train_tokens=first.train_tokens * 2)
    for spec, seed, tokens in ((first, 0, 5000), (same_batch, 1, 6000)):
        corpus, steps = torch.randint(0, 256, (tokens,), dtype=torch.uint8), []
        for compiled in (True, False):
            torch.manual_seed(seed)
            models = [build_model(SHAPE) for _ in range(2)]
            steps.append(TrainStep(models, corpus, [spec] * 2, Execution(compile=compiled)))
        starts, controls = torch.randint(0, 4000, (2, steps[0].batch)), torch.full((2, 3), 1e-3)
        for _ in range(2):
            torch.testing.assert_close(*(step(starts, controls) for step in steps), rtol=1e-5, atol=0)
        torch.testing.assert_close(steps[0].flat, steps[1].flat, rtol=1e-4, atol=1e-6)
        assert len(graphs) == 1
    for spec in (first, other):
        parts = Execution(compile=True, micro_batch_sequences=2)
        ours = train_block(open_session(spec, parts), 0, 4)
        assert ours == pytest.approx(train_block(open_session(spec, Execution()), 0, 4), rel=1e-5)
        assert len(graphs) == 3  # the gradient of a micro-batch, and the update


def test_a_program_holds_no_tensor_of_a_run(graphs):
    """Else the first run's parameters would stay in memory until the process ends."""
    import gc
    import weakref

    spec = tiny(4, shape=SHAPE, parametrization=MuP())
    session = open_session(spec, Execution(compile=True))
    train_block(session, 0, 1)
    held = [weakref.ref(t) for t in (session.step.flat, session.step.first_moment, session.step.tokens)]
    held.append(weakref.ref(session.step.model))
    del session
    gc.collect()
    assert [ref() is None for ref in held] == [True] * 4
    assert len(graphs) == 1


def test_a_compiler_without_dynamic_sizes_compiles_each_batch(monkeypatch, caplog):
    calls = []

    def compile_only_fixed(function, **options):
        calls.append(options)

        def run(*inputs):
            if options.get("dynamic") is not False:
                raise RuntimeError("sizes must be constants\nand more")
            return function(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile_only_fixed)
    program = SharedProgram(lambda x, factor: x * factor, (0,))
    for size in (2, 3, 2):
        assert torch.equal(program((2.0,), torch.ones(size)), torch.full((size,), 2.0))
    assert [options.get("dynamic") for options in calls] == [None, False, False]
    (line,) = caplog.messages
    assert line.endswith("sizes must be constants")


def test_a_copy_without_weights_computes_with_given_parameters():
    torch.manual_seed(0)
    model = build_model(replace(SHAPE, tied_head=True))
    structure, tokens = without_weights(model), torch.randint(0, 256, (2, 8))
    assert sum(p.untyped_storage().nbytes() for p in structure.parameters()) == 4 * len(
        list(model.parameters())
    )
    assert structure.head.weight is structure.embedding.weight
    assert copy.deepcopy(structure) is not structure
    given = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(structure, given, (tokens,)), model(tokens))


def test_functions_get_code_of_their_own():
    def twice(x, *, factor=2):
        return factor * x

    other = with_own_code(twice)
    assert other.__code__ is not twice.__code__
    assert other(3) == 6
    assert PROGRAMS == {}


def test_determinism_switches_are_those_of_this_torch():
    from torch._inductor import config

    assert determinism_switches() == {}
    try:
        set_deterministic(True)
        switches = determinism_switches()
        with config.patch(switches):
            assert all(getattr(config, name) == value for name, value in switches.items())
    finally:
        set_deterministic(False)
    assert switches["shape_padding"] is False
    assert "deterministic" in switches or not hasattr(config, "deterministic")
