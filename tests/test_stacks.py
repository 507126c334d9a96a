"""Stacks of runs: each member has its own folder, claim, curve, checkpoints and record, and ends independently."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import pytest

from helpers.processes import run_helper
from helpers.runs import losses, train
from helpers.specs import tiny
from scaling_lab.core.errors import Interrupted
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.run.checkpoint import steps_saved
from scaling_lab.training.run.member import Member

STACKED = Execution(stack="a", stack_size=4)


def members(wild_lr: float = 0.005) -> list[PlannedRun]:
    """Runs that differ in seed, learning rate or horizon."""
    base = tiny(60)
    specs = [
        base,
        replace(base, seed_init=1, seed_data=1),
        replace(base, optimizer=replace(base.optimizer, peak_lr=wild_lr)),
        replace(base, train_tokens=256 * 35),
    ]
    return [PlannedRun(s, STACKED) for s in specs]


def plan_of(runs: list[PlannedRun]) -> Plan:
    spec = runs[0].spec
    return Plan("t", tuple(runs), spec.convention, spec.data.fingerprint())


def train_all(folder, runs: list[PlannedRun], **options) -> dict:
    store = RunStore(folder)
    train_pending(store, plan_of(runs), **options)
    return {r.run_id: store.read_record(r.run_id) for r in runs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The records of the stack, trained without interruption."""
    return train_all(tmp_path_factory.mktemp("whole"), members())


def test_each_member_ends_as_if_trained_alone(tmp_path, whole):
    for planned in members():
        alone = train(RunStore(tmp_path), planned.spec)
        record = whole[planned.run_id]
        assert record.status is RunStatus.COMPLETED
        assert record.execution == STACKED
        assert [p.step for p in record.curve] == list(range(1, planned.spec.steps + 1))
        assert [p.lr for p in record.curve] == [p.lr for p in alone.curve]
        ours = [p.train_loss_nats for p in record.curve]
        assert ours == pytest.approx([p.train_loss_nats for p in alone.curve], rel=5e-5)
        assert record.final_val_loss_nats == pytest.approx(alone.final_val_loss_nats, rel=5e-5)
        visits = [p.step for p in record.curve if p.val_loss_nats is not None]
        assert visits == [p.step for p in alone.curve if p.val_loss_nats is not None]


def test_a_diverged_member_does_not_change_the_others_by_a_bit(tmp_path, whole):
    runs = members(wild_lr=1e30)
    records = train_all(tmp_path, runs)
    assert records[runs[2].run_id].status is RunStatus.DIVERGED
    for planned in (runs[0], runs[1], runs[3]):
        assert losses(records[planned.run_id]) == losses(whole[planned.run_id])


@pytest.mark.parametrize("there", [(0, 1, 2, 3), (1, 3), (2,)], ids=["all", "two", "one"])
def test_a_stopped_stack_resumes_bit_for_bit_with_any_of_its_members(tmp_path, monkeypatch, whole, there):
    """A stack is stopped midway; then some members are claimed elsewhere, and the others continue as if they were present."""
    runs, store = members(), RunStore(tmp_path)
    real = Member.checkpoint

    def checkpoint_and_stop(self):
        written = real(self)
        if self.done >= 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return written

    with monkeypatch.context() as patched:
        patched.setattr(Member, "checkpoint", checkpoint_and_stop)
        with pytest.raises(Interrupted):
            train_pending(store, plan_of(runs), checkpoint_every_s=0.0)
    at = {steps_saved(store.run_folder(r.run_id) / "checkpoint")[-1] for r in runs}
    assert len(at) == 1
    assert 20 <= at.pop() < 35
    elsewhere = [store.claim(r.spec) for k, r in enumerate(runs) if k not in there]
    made = train_pending(store, plan_of(runs))
    assert {r.run_id for r in made} == {runs[k].run_id for k in there}
    for k in there:
        assert losses(store.read_record(runs[k].run_id)) == losses(whole[runs[k].run_id])
    for claim in elsewhere:
        assert claim is not None
        claim.release()
    train_pending(store, plan_of(runs))
    for planned in runs:
        assert losses(store.read_record(planned.run_id)) == losses(whole[planned.run_id])


def test_a_missing_record_is_written_from_the_last_checkpoint(tmp_path, whole):
    """Of a whole stack, and of its first member alone when the others are finished; a kill may have prevented the record."""
    runs, store = members(), RunStore(tmp_path)
    train_all(tmp_path, runs)
    for gone in (runs, runs[:1]):
        for planned in gone:
            (store.run_folder(planned.run_id) / "record.json").unlink()
        made = {r.run_id: r for r in train_pending(store, plan_of(runs))}
        assert set(made) == {r.run_id for r in gone}
        for run_id, record in made.items():
            assert losses(record) == losses(whole[run_id])


def test_a_member_that_fails_or_is_taken_over_does_not_affect_the_others(tmp_path, monkeypatch, whole):
    """Its slot is idle; the others end with the same results bit for bit."""
    runs, store = members(), RunStore(tmp_path)
    real = Member.add_block

    def add_block(self, metrics, micro):
        if self.done >= 10 and self.slot == 0:
            (self.folder / "claim-2.json").write_text("{}")
            self.heartbeat.check()
        if self.done >= 10 and self.slot == 1:
            raise OSError("no space left")
        return real(self, metrics, micro)

    monkeypatch.setattr(Member, "add_block", add_block)
    made = {r.run_id: r for r in train_pending(store, plan_of(runs))}
    assert runs[0].run_id not in made
    assert not (store.run_folder(runs[0].run_id) / "record.json").exists()
    assert made[runs[1].run_id].status is RunStatus.FAILED
    assert made[runs[1].run_id].reason == "OSError: no space left"
    for planned in runs[2:]:
        assert losses(made[planned.run_id]) == losses(whole[planned.run_id])


def test_an_old_plan_without_stacks_loads():
    runs = plan_of([PlannedRun(tiny(5), Execution())])
    data = runs.to_dict()
    for run in data["runs"]:
        for name in ("micro_batch_sequences", "stack", "stack_size"):
            del run["execution"][name]
    assert Plan.from_dict(data) == runs


def test_out_of_memory_halves_the_micro_batch_and_the_run_continues(tmp_path, monkeypatch, caplog):
    """From its last checkpoint, with the losses of an undisturbed run; the record has the new micro-batch."""
    import torch

    from scaling_lab.training.run.session import Program

    spec, store = tiny(60), RunStore(tmp_path)
    real, refused = Program.run_block, []

    def run_block(self, places, count):
        if places[0] >= 20 and self.step.micro > 1:
            refused.append(self.step.micro)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, places, count)

    monkeypatch.setattr(Program, "run_block", run_block)
    record = train(store, spec, checkpoint_every_s=0.0)
    assert refused == [4, 2]
    assert "continuing with micro-batches of 1 of its 4 sequences" in caplog.text
    assert record.status is RunStatus.COMPLETED
    assert record.execution.micro_batch_sequences == 1
    assert [p.step for p in record.curve] == list(range(1, 61))
    whole = train(RunStore(tmp_path / "whole"), spec)
    assert losses(record)[:10] == losses(whole)[:10]
    assert record.final_val_loss_nats == pytest.approx(whole.final_val_loss_nats, rel=1e-4)


def test_out_of_memory_with_single_sequences_is_a_failed_record(tmp_path, monkeypatch):
    from scaling_lab.training.run.session import Program

    def run_block(self, places, count):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(Program, "run_block", run_block)
    runs = [PlannedRun(tiny(10), Execution())]
    (record,) = train_all(tmp_path, runs).values()
    assert record.status is RunStatus.FAILED
    assert "not enough memory" in record.reason


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and /proc are Linux's")
def test_really_running_out_of_memory(tmp_path):
    """The kernel refuses torch's allocations; the run still completes, with smaller micro-batches."""
    done = run_helper("limited_memory", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    status, micro = done.stdout.split()
    assert status == "completed"
    assert int(micro) < 256
    assert "out of memory" in done.stderr


def test_a_stack_that_does_not_fit_is_split_before_anything_fails(tmp_path, monkeypatch, caplog, whole):
    """From its last checkpoints, first with smaller micro-batches, then with fewer runs."""
    import torch

    from scaling_lab.training.run.session import Program

    real, refused = Program.run_block, []

    def run_block(self, places, count):
        if max(places.values()) >= 20 and len(self.sessions) > 1:
            refused.append((len(self.sessions), self.step.micro))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, places, count)

    monkeypatch.setattr(Program, "run_block", run_block)
    made = train_all(tmp_path, members(), checkpoint_every_s=0.0)
    assert refused == [(4, 4), (4, 2), (4, 1), (2, 1), (2, 1)]
    assert caplog.text.count("out of memory; continuing with a stack of") == 3
    for planned in members():
        record, undisturbed = made[planned.run_id], whole[planned.run_id]
        assert record.status is RunStatus.COMPLETED
        assert record.execution.micro_batch_sequences == 1
        assert [p.step for p in record.curve] == [p.step for p in undisturbed.curve]
        assert record.final_val_loss_nats == pytest.approx(undisturbed.final_val_loss_nats, rel=1e-3)


def test_a_stack_of_large_models_is_split_first():
    """Smaller micro-batches would not make its parameters and moments smaller."""
    from scaling_lab.core.shapes.gpt import GPTShape
    from scaling_lab.training.run.loop import Part, smaller_parts

    class Run:
        over = False

        def __init__(self, planned: PlannedRun) -> None:
            self.planned, self.spec, self.micro, self.released = planned, planned.spec, None, False

        def set_micro_batch(self, micro: int) -> None:
            self.micro = micro

        def release(self) -> None:
            self.released = True

    def parts_of(shape: GPTShape) -> list[tuple[list, int | None]]:
        group = [PlannedRun(tiny(4, shape=shape, seed_init=k), STACKED) for k in range(3)]
        runs = [Run(planned) for planned in group]
        found = smaller_parts(Part(tuple(group), runs))
        assert all(run.released for run in runs)
        return [([run.spec.seed_init for run in part.members], part.members[0].micro) for part in found]

    assert parts_of(GPTShape(width=512, depth=4, heads=4)) == [([0, 1], None), ([2], None)]
    assert parts_of(GPTShape(width=16, depth=1, heads=1)) == [([0, 1, 2], 2)]
