"""A device that computes blocks of steps in its own time, as a GPU does: in a thread, until the host waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor

import scaling_lab.training.run.session as session
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.run.member import Member


class Block:
    """In place of a block's metrics on the device: reading them waits for the block."""

    def __init__(self, pool: ThreadPoolExecutor, compute: Callable[[], Tensor]) -> None:
        self.awaited = threading.Event()
        self._future: Future[Tensor] = pool.submit(self._work, compute)

    def _work(self, compute: Callable[[], Tensor]) -> Tensor:
        assert self.awaited.wait(60)
        return compute()

    def cpu(self) -> Tensor:
        self.awaited.set()
        return self._future.result()


class DelayedDevice:
    """Counts what the host does while the device computes (`busy`) and while it waits for the host (`idle`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._block: Block | None = None
        self.busy = {"inputs": 0, "records": 0}
        self.idle = {"inputs": 0, "records": 0}
        real = TrainStep.run

        def run(step: TrainStep, starts: Tensor, controls: Tensor) -> Any:
            own = starts.clone(), controls.clone()
            self._block = Block(self._pool, lambda: real(step, *own))
            return self._block

        monkeypatch.setattr(TrainStep, "run", run)
        monkeypatch.setattr(session.Program, "overlaps", True)
        monkeypatch.setattr(session, "inputs", self._counted("inputs", session.inputs))
        monkeypatch.setattr(Member, "add_block", self._counted("records", Member.add_block))

    def _counted(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            computes = self._block is not None and not self._block.awaited.is_set()
            (self.busy if computes else self.idle)[name] += 1
            return work(*arguments)

        return counted
