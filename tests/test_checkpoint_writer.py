"""Checkpoints written by a thread: how often, from which state, and when their errors and files are waited for."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import scaling_lab.training.run.checkpoint as checkpoint
import scaling_lab.training.run.checkpoint_writer as checkpoint_writer
import scaling_lab.training.run.member as member
from helpers.runs import losses, train
from helpers.specs import tiny
from scaling_lab.core.spec import Execution, PlannedRun
from scaling_lab.core.storage.claims import ClaimLost
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.cost import CHECKPOINT_BYTES_PER_PARAM, job_needs
from scaling_lab.training.run.checkpoint import read_checkpoint, save_checkpoint, steps_saved
from scaling_lab.training.run.checkpoint_writer import MAX_TIME_SHARE, CheckpointWriter


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(checkpoint_writer, "time", clock)
    return clock


@pytest.mark.parametrize(("cost_s", "every_s"), [(0.01, 30.0), (30.0, 30.0)])
def test_saving_takes_at_most_a_twentieth_of_the_time(clock, cost_s, every_s):
    """A model whose checkpoint takes 30 s used to write one after each half second of work."""
    began, saves = clock.now, 0

    def pass_time(_: object = None) -> None:
        clock.now += cost_s / 2

    with CheckpointWriter(every_s) as writer:
        while saves < 8:
            clock.now += 0.5  # a block of steps
            if writer.is_due():
                writer.begin()
                writer.submit(pass_time, pass_time)  # half of the cost is the copy, half the writing
                writer.wait()
                saves += 1
                if saves == 2:  # the first one comes before the cost is known
                    began = clock.now
        writing = (saves - 2) * cost_s
        assert writing / (clock.now - began) <= MAX_TIME_SHARE
        # And no less often than the rule says, to within a block.
        interval_s = (clock.now - began) / (saves - 2)
        assert interval_s == pytest.approx(max(every_s + cost_s, cost_s / MAX_TIME_SHARE), abs=1.0)


def test_the_first_interval_follows_from_the_size(clock):
    with CheckpointWriter(30.0, state_bytes=30 * checkpoint_writer.ASSUMED_BYTES_PER_S) as writer:
        clock.now += 31
        assert not writer.is_due()
        clock.now += 30 * 19
        assert writer.is_due()


def test_none_is_due_while_one_is_being_written():
    free = threading.Event()
    with CheckpointWriter(1e-9) as writer:
        assert writer.is_due()
        writer.begin()
        writer.submit(lambda: None, lambda _: free.wait(30))
        assert not writer.is_due()
        free.set()
        writer.wait()
        assert writer._cost_s > 0


def slowly(monkeypatch: pytest.MonkeyPatch, before) -> list[int]:
    """Call `before(checkpoint)` before each checkpoint is written; the steps that were written."""
    real, written = save_checkpoint, []

    def save(folder, saved, **options):
        before(saved)
        real(folder, saved, **options)
        written.append(saved.step)

    monkeypatch.setattr(member, "save_checkpoint", save)
    return written


def test_a_checkpoint_is_of_the_block_at_which_it_was_taken(tmp_path, monkeypatch):
    """Training goes on while it is written, and the record waits for it."""
    spec, store = tiny(200), RunStore(tmp_path / "slow")
    whole = train(RunStore(tmp_path / "whole"), spec)
    copies, points = {}, {}

    def before(saved):
        copies[saved.step] = {name: tensor.clone() for name, tensor in saved.tensors.items()}
        points[saved.step] = saved.curve_points
        assert not (store.run_folder(spec.run_id()) / "record.json").exists()
        threading.Event().wait(0.05)
        for name, tensor in saved.tensors.items():
            assert torch.equal(copies[saved.step][name], tensor)  # steps do not change it

    written = slowly(monkeypatch, before)
    assert losses(train(store, spec, checkpoint_every_s=0.0)) == losses(whole)
    assert written[-1] == spec.steps
    assert written == sorted(points) == [points[step] for step in written]
    folder = store.run_folder(spec.run_id()) / "checkpoint"
    last = read_checkpoint(folder / f"step-{spec.steps}.pt", spec.run_id())
    assert torch.equal(last.tensors["flat"], copies[spec.steps]["flat"])


def test_an_error_in_the_thread_ends_the_run_at_the_next_block(tmp_path, monkeypatch):
    def broken(saved):
        raise ZeroDivisionError("in the thread")

    slowly(monkeypatch, broken)
    spec, store = tiny(100_000), RunStore(tmp_path)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        train(store, spec, checkpoint_every_s=0.0)
    assert store.state(spec.run_id()).state == "interrupted"  # the claim is released
    assert len(store.read_curve(spec.run_id())) < spec.steps


def test_a_process_that_lost_its_claim_while_writing_leaves_no_checkpoint(tmp_path, monkeypatch):
    spec, store = tiny(100_000), RunStore(tmp_path)
    folder = store.run_folder(spec.run_id())
    slowly(monkeypatch, lambda saved: (folder / "claim-2.json").write_text("{}"))
    with pytest.raises(ClaimLost):
        train(store, spec, checkpoint_every_s=0.0)
    assert steps_saved(folder / "checkpoint") == []
    assert not list((folder / "checkpoint").iterdir())


def test_files_are_hashed_as_they_are_written(tmp_path):
    """Not from a second copy of the state in memory."""
    saved = checkpoint.Checkpoint("r", 1, 1, (), 0.0, Execution(), "data", {"flat": torch.arange(1e5)})
    save_checkpoint(tmp_path, saved)
    assert torch.equal(read_checkpoint(tmp_path / "step-1.pt", "r").tensors["flat"], saved.tensors["flat"])


@pytest.mark.parametrize("stack_size", [1, 4])
def test_the_host_memory_of_a_job_includes_the_copy(stack_size):
    spec = tiny()
    run = PlannedRun(
        spec, Execution(device="cuda", stack="s" * (stack_size > 1) or None, stack_size=stack_size)
    )
    deeper = replace(run, spec=replace(spec, shape=replace(spec.shape, depth=40)))
    extra = deeper.spec.count().params.total - spec.count().params.total
    more = job_needs([deeper]).host_bytes - job_needs([run]).host_bytes
    assert more == pytest.approx(CHECKPOINT_BYTES_PER_PARAM * extra * stack_size, rel=0.01)
