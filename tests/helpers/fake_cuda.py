"""CUDA graphs without a GPU: `torch.cuda` records the operations of a capture and repeats them on the CPU at each replay."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out


class FakeGraph:
    """In place of `torch.cuda.CUDAGraph`: its replays write into the tensors of the capture."""

    captured: list[FakeGraph]

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.replays = 0
        self.captured.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.recorder.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # A view or a tensor changed in place is already up to date.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def names(self) -> set[str]:
        return {function.overloadpacket.__name__ for function, *_ in self.recorder.calls}


class FakeStreams:
    """The current stream, by name; a capture that fails leaves its own current, as torch does."""

    def __init__(self) -> None:
        self.current = "default"
        self.capture_error: RuntimeError | None = None

    @contextmanager
    def stream(self, name: Any):
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, capture_error_mode: str):
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, "capture"
        with graph.recorder:
            yield
        if self.capture_error is not None:
            raise self.capture_error
        self.current = before


class FakeStream:
    def wait_stream(self, other: Any) -> None:
        pass


def fake_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    """Replace what `training/engine/cuda_graph.py` uses of torch.cuda, and let steps on the CPU use graphs."""
    streams = FakeStreams()
    FakeGraph.captured = []
    current = FakeStream()
    streams.current = current
    for name, fake in {
        "Stream": FakeStream, "CUDAGraph": FakeGraph, "graph": streams.graph, "stream": streams.stream,
        "current_stream": lambda: streams.current, "set_stream": lambda s: setattr(streams, "current", s),
        "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    return streams
