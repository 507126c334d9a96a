"""The host works while the device computes: nothing that is recorded, saved or stopped differs from working in turns."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import scaling_lab.training.run.loop as loop
from helpers.delayed import DelayedDevice
from helpers.runs import losses, train
from helpers.specs import tiny
from scaling_lab.core.errors import Interrupted
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import EvalSpec, Execution, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.run.checkpoint import read_checkpoint, steps_saved

# One evaluation, so that most blocks are recorded while the next one is computed.
SPEC = tiny(160, eval=EvalSpec(tokens=256, points=1))
DIVERGING = replace(SPEC, optimizer=replace(SPEC.optimizer, peak_lr=1e4))
LIMIT = 8


@pytest.fixture(autouse=True)
def _same_blocks(monkeypatch):
    """Of 1, 2, 4 and then 8 steps, however fast the machine is."""
    monkeypatch.setattr(loop, "BLOCK_S", 1e9)
    real = loop.blocks
    monkeypatch.setattr(loop, "blocks", lambda members, most: real(members, min(most, LIMIT)))


def stack_of(specs: list[RunSpec]) -> list[PlannedRun]:
    execution = Execution(stack="a", stack_size=len(specs))
    return [PlannedRun(spec, execution) for spec in specs]


def train_stack(folder: Path, specs: list[RunSpec]) -> list[RunRecord]:
    store, group = RunStore(folder), stack_of(specs)
    claims = {planned.run_id: loop.ClaimedRun(store.claim(planned.spec)) for planned in group}
    members = loop.train_together(group, claims, store)
    return [member.record for member in members]


def outcome(record: RunRecord) -> tuple:
    return record.status, record.reason, losses(record)


def test_records_and_inputs_are_made_while_the_device_computes(tmp_path, monkeypatch):
    alone = train(RunStore(tmp_path / "turns"), SPEC)
    device = DelayedDevice(monkeypatch)
    record = train(RunStore(tmp_path / "overlap"), SPEC)
    assert outcome(record) == outcome(alone)
    assert record.status is RunStatus.COMPLETED
    blocks = 3 + (160 - 7) // LIMIT + 1
    # The first block has no inputs ready; the last one is recorded before the run ends.
    assert (device.idle["inputs"], device.idle["records"]) == (1, 1)
    assert device.busy["records"] == blocks - 1
    assert device.busy["inputs"] >= blocks - 1


def test_a_diverged_run_ends_at_the_same_step(tmp_path, monkeypatch):
    alone = train(RunStore(tmp_path / "turns"), DIVERGING)
    assert alone.status is RunStatus.DIVERGED
    device = DelayedDevice(monkeypatch)
    record = train(RunStore(tmp_path / "overlap"), DIVERGING)
    assert outcome(record) == outcome(alone)
    assert record.curve[-1].step < SPEC.steps - LIMIT  # found in a later block than the last
    assert device.busy["records"] >= 3


def test_a_member_that_diverges_does_not_change_the_others(tmp_path, monkeypatch):
    specs = [SPEC, DIVERGING, replace(SPEC, seed_init=1, train_tokens=256 * 130)]
    alone = train_stack(tmp_path / "turns", specs)
    DelayedDevice(monkeypatch)
    together = train_stack(tmp_path / "overlap", specs)
    assert [record.status.value for record in together] == ["completed", "diverged", "completed"]
    assert [outcome(record) for record in together] == [outcome(record) for record in alone]


def stopped(store: RunStore, monkeypatch: pytest.MonkeyPatch, at_block: int, **options) -> tuple[int, int]:
    """Train until SIGTERM arrives within a block; (step of the checkpoint, points of the curve on disk)."""
    computed, real = [], TrainStep.__call__

    def call(step: TrainStep, starts, controls):
        computed.append(1)
        if len(computed) == 7 + LIMIT * at_block + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, starts, controls)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "__call__", call)
        with pytest.raises(Interrupted):
            train(store, SPEC, **options)
    folder = store.run_folder(SPEC.run_id()) / "checkpoint"
    step = steps_saved(folder)[-1]
    checkpoint = read_checkpoint(folder / f"step-{step}.pt", SPEC.run_id())
    points = store.read_curve(SPEC.run_id())
    assert (checkpoint.curve_points, points[-1].step) == (len(points), step)
    return step, len(points)


def test_a_stopped_run_ends_at_the_same_step_and_its_checkpoint_has_its_curve(tmp_path, monkeypatch):
    whole = train(RunStore(tmp_path / "whole"), SPEC)
    in_turns = stopped(RunStore(tmp_path / "turns"), monkeypatch, 5)
    DelayedDevice(monkeypatch)
    store = RunStore(tmp_path / "overlap")
    assert stopped(store, monkeypatch, 5) == in_turns == (7 + LIMIT * 6, 7 + LIMIT * 6)
    assert losses(train(store, SPEC)) == losses(whole)


def test_checkpoints_between_blocks_hold_the_curve_up_to_their_step(tmp_path, monkeypatch):
    """With one due after every block, and then resumed from the last."""
    whole = train(RunStore(tmp_path / "whole"), SPEC)
    DelayedDevice(monkeypatch)
    store = RunStore(tmp_path / "overlap")
    step, _ = stopped(store, monkeypatch, 9, checkpoint_every_s=0.0)
    assert step == 7 + LIMIT * 10
    assert outcome(train(store, SPEC)) == outcome(whole)
