"""Training one run to its end or to a stop, and the losses it recorded."""

from __future__ import annotations

import os
import signal

import pytest

import scaling_lab.training.run.loop as loop
from scaling_lab.core.errors import Interrupted
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import Execution, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.run.member import Member


def train(store: RunStore, spec: RunSpec, execution: Execution | None = None, **options) -> RunRecord:
    planned = PlannedRun(spec, execution or Execution())
    claim = store.claim(spec)
    assert claim is not None
    return loop.train_run(planned, store, claim, **options)


def losses(record: RunRecord) -> list[object]:
    return [(p.step, p.train_loss_nats, p.val_loss_nats) for p in record.curve] + [record.final_val_loss_nats]


def interrupted_at(
    store: RunStore, spec: RunSpec, stop_after: int, execution: Execution | None = None
) -> None:
    """Train until a checkpoint at or after `stop_after` steps is written, then stop as SIGTERM would."""
    real = Member.checkpoint

    def checkpoint_and_stop(self: Member, *, permanent: bool = False) -> bool:
        if self.done >= stop_after and not permanent:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, permanent=permanent)

    Member.checkpoint = checkpoint_and_stop
    try:
        with pytest.raises(Interrupted):
            train(store, spec, execution, checkpoint_every_s=0.0)
    finally:
        Member.checkpoint = real
