"""Steps as CUDA graphs, with a stand-in for CUDA: replays, captures that fail, and memory that is let go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from helpers.fake_cuda import FakeGraph, fake_cuda_graphs
from helpers.specs import tiny
from scaling_lab.core.spec import Execution
from scaling_lab.training.engine.memory import collect_garbage, garbage_frozen
from scaling_lab.training.run.session import TrainingSession, open_session, train_block

SPEC = tiny(80)


def open_graphed(execution: Execution | None = None) -> TrainingSession:
    session = open_session(SPEC, execution or Execution())
    session.step._use_graph = True
    return session


@pytest.mark.parametrize("micro", [None, 2])
def test_replays_give_the_eager_steps_bit_for_bit(monkeypatch, micro):
    execution = Execution(micro_batch_sequences=micro)
    eager = open_session(SPEC, execution)
    wanted = train_block(eager, 0, 75)
    fake_cuda_graphs(monkeypatch)
    graphed = open_graphed(execution)
    assert train_block(graphed, 0, 75) == wanted  # more than one buffer of 64 steps
    (graph,) = FakeGraph.captured
    assert graph.replays == 75
    assert all(torch.equal(t, eager.step.state()[name]) for name, t in graphed.step.state().items())
    # `index_copy_` sorts under deterministic algorithms.
    assert not graph.names() & {"index_copy_", "index_copy", "index_put_", "scatter_"}


def test_after_a_failed_capture_steps_run_on_the_stream_of_before(monkeypatch, caplog):
    wanted = train_block(open_session(SPEC, Execution()), 0, 20)
    streams = fake_cuda_graphs(monkeypatch)
    before = streams.current
    streams.capture_error = RuntimeError("operation not permitted when stream is capturing")
    session = open_graphed()
    assert train_block(session, 0, 12) + train_block(session, 12, 20) == wanted
    assert streams.current is before
    assert [r.message for r in caplog.records if "no CUDA graph" in r.message] == [
        "no CUDA graph (operation not permitted when stream is capturing): steps are launched one by one."
    ]
    assert FakeGraph.captured[0].replays == 0


def test_a_capture_that_runs_out_of_memory_is_an_error(monkeypatch):
    streams = fake_cuda_graphs(monkeypatch)
    before = streams.current
    streams.capture_error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        train_block(open_graphed(), 0, 1)
    assert streams.current is before


@pytest.mark.parametrize("graphed", [False, True])
def test_a_finished_step_is_freed_without_a_garbage_collection(monkeypatch, graphed):
    fake_cuda_graphs(monkeypatch)
    session = open_session(SPEC, Execution())
    session.step._use_graph = graphed
    train_block(session, 0, 2)
    FakeGraph.captured = []
    step, state = weakref.ref(session.step), weakref.ref(session.step.flat)
    gc.collect()
    gc.disable()
    try:
        del session
        assert step() is None
        assert state() is None
    finally:
        gc.enable()


class Node:
    """An object in a reference cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_collections_leave_out_what_existed_before_training():
    old = weakref.ref(Node())
    with garbage_frozen():
        assert gc.get_freeze_count() > 0
        gc.collect()
        assert old() is not None
    assert gc.get_freeze_count() == 0
    collect_garbage("cpu")
    assert old() is not None
    collect_garbage("cuda")
    assert old() is None
