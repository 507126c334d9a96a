"""Trains a tiny run with a checkpoint after every block of steps, until a test kills it."""

from __future__ import annotations

import sys

import scaling_lab.training.run.loop as loop
from helpers.specs import tiny
from scaling_lab.core.spec import Execution, PlannedRun
from scaling_lab.core.storage.store import RunStore


def main(folder: str, device: str, steps: str) -> None:
    spec, store = tiny(int(steps)), RunStore(folder)
    claim = store.claim(spec)
    assert claim is not None
    planned = PlannedRun(spec, Execution(device=device, deterministic=True))
    loop.train_run(planned, store, claim, checkpoint_every_s=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
