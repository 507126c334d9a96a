"""Requests to checkpoint or stop: from signals, a launcher's own handlers, and other threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import scaling_lab.training.run.loop as loop
from helpers.runs import losses, train
from helpers.specs import tiny
from scaling_lab.core.errors import Interrupted
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.run.checkpoint import steps_saved
from scaling_lab.training.run.member import Member
from scaling_lab.training.run.session import Program
from scaling_lab.training.run.stopping import listen, request_checkpoint, request_stop


def checkpoints(store: RunStore, spec) -> list[int]:
    return steps_saved(store.run_folder(spec.run_id()) / "checkpoint")


def at_block(monkeypatch, number: int, action) -> None:
    """Call `action` during the `number`-th block of steps."""
    real, seen = Program.run_block, []

    def run_block(self, places, count):
        seen.append(count)
        if len(seen) == number:
            action()
        return real(self, places, count)

    monkeypatch.setattr(Program, "run_block", run_block)


@pytest.fixture
def owner():
    """Existing signal handlers such as submitit's: SIGTERM is ignored, SIGUSR2 requeues and exits."""
    seen: list[str] = []

    def bypass(number, frame):
        seen.append("SIGTERM")

    def requeue_and_exit(number, frame):
        seen.append("SIGUSR2")
        sys.exit(-1)

    before = [signal.signal(signal.SIGTERM, bypass), signal.signal(signal.SIGUSR2, requeue_and_exit)]
    yield seen, (bypass, requeue_and_exit)
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGUSR2, before[1])


def test_a_launchers_handler_is_called_once_the_checkpoint_is_written(tmp_path, monkeypatch, owner):
    """As under submitit, whose SIGUSR2 handler calls the launcher's checkpoint hook, requeues and exits."""
    seen, (_, requeue) = owner
    spec, store = tiny(250), RunStore(tmp_path / "requeued")
    whole = train(RunStore(tmp_path / "whole"), spec)

    def preempt():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not seen  # not during a step

    with monkeypatch.context() as patch:
        at_block(patch, 4, preempt)
        with pytest.raises(SystemExit):
            train(store, spec)
    assert seen == ["SIGUSR2"]
    assert signal.getsignal(signal.SIGUSR2) is requeue
    curve = store.read_curve(spec.run_id())
    assert checkpoints(store, spec) == [curve[-1].step]  # everything computed so far is saved
    assert store.state(spec.run_id()).state == "interrupted"
    assert losses(train(store, spec)) == losses(whole)


def test_after_a_launchers_handler_returns_the_run_continues(tmp_path, monkeypatch, owner):
    seen, _ = owner
    spec, store = tiny(250), RunStore(tmp_path)
    saved_at: list[int] = []
    at_block(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    real = Member.checkpoint
    monkeypatch.setattr(Member, "checkpoint", lambda member: saved_at.append(member.done) or real(member))
    assert train(store, spec).final_val_loss_nats is not None
    assert seen == ["SIGTERM"]
    assert len(saved_at) == 2
    assert saved_at[0] < spec.steps


def test_requests_are_handled_at_once_while_there_is_nothing_to_save(tmp_path, monkeypatch, owner):
    """Reading data and compiling may take longer than a scheduler's grace period."""
    seen, _ = owner
    spec, store = tiny(100), RunStore(tmp_path)
    real = loop.open_program

    def slow(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR2)
        pytest.fail("it was not answered at once")
        return real(*args, **options)

    monkeypatch.setattr(loop, "open_program", slow)
    with pytest.raises(SystemExit):
        train(store, spec)
    assert seen == ["SIGUSR2"]
    assert store.state(spec.run_id()).state == "interrupted"  # the claim is released


def test_a_worker_asked_to_stop_at_the_end_of_a_run_starts_no_other(tmp_path, monkeypatch):
    specs = tiny(20), tiny(20, seed_init=1)
    store = RunStore(tmp_path)
    plan = Plan(
        "t",
        tuple(PlannedRun(s, Execution()) for s in specs),
        specs[0].convention,
        specs[0].data.fingerprint(),
    )
    real = RunStore.write_record

    def write_record(self, record):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, record)

    monkeypatch.setattr(RunStore, "write_record", write_record)
    with pytest.raises(Interrupted) as stop:
        train_pending(store, plan)
    assert not stop.value.by_person
    assert sorted(s.state for s in store.states(plan)) == ["completed", "planned"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_another_thread_can_request_a_checkpoint_and_wait_for_it(tmp_path, monkeypatch):
    assert not request_checkpoint()
    assert not request_stop()
    spec, store = tiny(100_000), RunStore(tmp_path)
    answers: list[object] = []

    def hook():
        answers.append(request_checkpoint(timeout_s=60))
        answers.append(checkpoints(store, spec))
        answers.append(request_stop())

    thread = threading.Thread(target=hook)
    at_block(monkeypatch, 3, thread.start)
    with pytest.raises(Interrupted):
        train(store, spec)
    thread.join()
    assert answers[0] is True
    assert answers[1]
    assert answers[2] is True
    assert len(checkpoints(store, spec)) == 2


def test_outside_the_main_thread_signal_handlers_are_left_alone(tmp_path, owner):
    _, (bypass, _) = owner
    found: list[object] = []

    def work():
        with listen() as requests:
            found.extend([signal.getsignal(signal.SIGTERM), requests.checkpoint])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [bypass, False]


def test_a_preempted_command_exits_with_the_requeue_status(tmp_path):
    """SIGUSR1 to `scaling-lab train`: a checkpoint, one line, status 75; the same command resumes from it."""
    command = [
        sys.executable, "-m", "scaling_lab.cli.main", "train", "sweep=p", f"results_dir={tmp_path}",
        "model.width=16", "model.depth=1", "device=cpu", "train_tokens=30M", "compile=false",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 90
    while (
        not any(p.stat().st_size for p in tmp_path.glob("p/runs/*/curve.jsonl"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.strip().splitlines()[-1] == (
        "interrupted: the run has not finished; the same command resumes it."
    )
    assert list(tmp_path.glob("p/runs/*/checkpoint/step-*.pt"))
