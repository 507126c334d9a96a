"""Errors of the device end their process, never the runs that follow; one retry in a fresh process, counted in the record."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import scaling_lab.launching.hydra_jobs as hydra_jobs
from helpers.runs import losses, train
from helpers.specs import tiny
from scaling_lab.core.errors import DeviceLost
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.progress import LineReporter
from scaling_lab.launching.worker import EXIT_REQUEUE, main, train_pending
from scaling_lab.launching.workers import run_workers
from scaling_lab.training.engine.process_errors import (
    is_device_error,
    note_process_error,
    process_errors,
)
from scaling_lab.training.parallel.team import TeamLost, collective_guard
from scaling_lab.training.run.session import Program

FIRST, SECOND = SPECS = tiny(60), tiny(30, seed_init=1)  # the longest comes first
ILLEGAL = "CUDA error: an illegal memory access was encountered"


class StandIn(RuntimeError):
    """An error of an accelerator, as versions of torch that know the type raise it."""


def plan_of(*specs, **execution) -> Plan:
    runs = tuple(PlannedRun(s, Execution(**execution)) for s in specs)
    return Plan("t", runs, specs[0].convention, specs[0].data.fingerprint())


@pytest.fixture
def broken_device(monkeypatch):
    """Blocks of steps of the first run raise an error of the device, as long as the list says True."""
    monkeypatch.setattr(torch, "AcceleratorError", StandIn, raising=False)
    broken = [True]
    real = Program.run_block

    def run_block(self, places, count):
        if broken[0] and self.sessions[0].spec == FIRST and min(places.values()) > 20:
            raise StandIn("a message that nobody knows")
        return real(self, places, count)

    monkeypatch.setattr(Program, "run_block", run_block)
    return broken


def test_which_errors_are_the_devices(monkeypatch):
    monkeypatch.setattr(torch, "AcceleratorError", StandIn, raising=False)
    assert is_device_error(StandIn("anything"))
    assert is_device_error(RuntimeError(ILLEGAL))
    assert is_device_error(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))
    assert not is_device_error(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_device_error(RuntimeError("CUDA error: out of memory"))
    assert not is_device_error(RuntimeError("shapes (3,) and (4,) do not match"))
    assert not is_device_error(ValueError(ILLEGAL))
    monkeypatch.delattr(torch, "AcceleratorError")  # an older torch
    assert not is_device_error(StandIn("anything"))


def test_one_retry_in_a_fresh_process_is_counted(tmp_path, broken_device):
    store = RunStore(tmp_path / "s")
    broken_device[0] = False
    whole = train(RunStore(tmp_path / "whole"), FIRST)
    broken_device[0] = True
    with pytest.raises(DeviceLost, match="a message that nobody knows"):
        train_pending(store, plan_of(*SPECS), checkpoint_every_s=0.0)
    # The claim is released, and the following run was not touched.
    assert [s.state for s in store.states(plan_of(*SPECS))] == ["interrupted", "planned"]
    broken_device[0] = False
    made = {r.run_id: r for r in train_pending(store, plan_of(*SPECS))}
    assert [made[s.run_id()].process_retries for s in SPECS] == [1, 0]
    assert losses(made[FIRST.run_id()]) == losses(whole)
    assert store.read_record(FIRST.run_id()).process_retries == 1


def test_a_run_that_always_breaks_the_device_fails_after_one_retry(tmp_path, broken_device):
    store, plan = RunStore(tmp_path), plan_of(*SPECS)
    for _ in range(2):
        with pytest.raises(DeviceLost):
            train_pending(store, plan)
    made = {r.run_id: r for r in train_pending(store, plan)}
    failed = made[FIRST.run_id()]
    assert (failed.status, failed.process_retries) == (RunStatus.FAILED, 1)
    assert "its process ended 2 times; most recently: StandIn: a message that nobody knows" in failed.reason
    assert made[SECOND.run_id()].status is RunStatus.COMPLETED
    # retry=failed gives it another chance.
    broken_device[0] = False
    assert store.reopen_failed(plan) == [FIRST.run_id()]
    (again,) = train_pending(store, plan)
    assert (again.status, again.process_retries) == (RunStatus.COMPLETED, 0)


def test_a_stack_that_lost_its_device_goes_on_together(tmp_path, monkeypatch):
    specs = [tiny(60, seed_init=seed) for seed in (0, 1)]
    plan, store = plan_of(*specs, stack="s", stack_size=2), RunStore(tmp_path)
    real = Program.run_block

    def run_block(self, places, count):
        if min(places.values()) > 20:
            raise RuntimeError(ILLEGAL)
        return real(self, places, count)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "run_block", run_block)
        with pytest.raises(DeviceLost):
            train_pending(store, plan, checkpoint_every_s=0.0)
    assert [r.process_retries for r in train_pending(store, plan)] == [1, 1]


@pytest.mark.usefixtures("broken_device")
def test_the_worker_process_ends_with_the_requeue_status(tmp_path):
    store = RunStore(tmp_path)
    store.write_plan(plan_of(*SPECS))
    assert main([str(tmp_path)]) == EXIT_REQUEUE


def test_on_cuda_a_launchers_job_trains_in_a_child(tmp_path, monkeypatch):
    """joblib's or Ray's process stays usable for its next job."""
    store = RunStore(tmp_path / "s")
    store.write_plan(plan_of(*SPECS, device="cuda"))
    seen = []
    monkeypatch.setattr(hydra_jobs, "run_workers", lambda *given, **options: seen.append((given, options)))
    monkeypatch.setattr(hydra_jobs, "plain", dict)
    config = {
        "results_dir": tmp_path,
        "sweep": "s",
        "run_ids": [SECOND.run_id()],
        "tracker": {"kind": "none"},
    }
    assert hydra_jobs.sweep_job(config) == 0
    ((_, plan, run_ids, _), options) = seen[0]
    assert run_ids == [SECOND.run_id()]
    assert [r.run_id for r in plan.runs] == run_ids
    assert options == {"workers": 1, "tracker": {"kind": "none"}, "leave_others": True}


COMMUNICATION = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3021",
    "Socket Timeout",
    "NCCL communicator was aborted on rank 1.",
)


@pytest.mark.parametrize("text", COMMUNICATION)
def test_an_error_of_communication_is_a_lost_process(text):
    with pytest.raises(TeamLost, match="another process of this run is gone"), collective_guard():
        raise RuntimeError(text)
    with pytest.raises(TeamLost), collective_guard():
        raise dist.DistBackendError("anything")
    with pytest.raises(TeamLost), collective_guard():
        raise ConnectionResetError


def test_another_runtime_error_in_a_collective_is_raised_as_it_is():
    """It would come back after each requeue."""
    with pytest.raises(RuntimeError, match="must match the size") as error, collective_guard():
        torch.zeros(3).copy_(torch.zeros(4))
    assert not isinstance(error.value, TeamLost)


def test_notes_survive_damage_and_are_those_of_the_worst_process(tmp_path):
    assert process_errors(tmp_path) == []
    (tmp_path / "process-errors-0.json").write_text('["trunc')
    note_process_error(tmp_path, ValueError("one\nline"), rank=1)
    note_process_error(tmp_path, ValueError("two"), rank=1)
    assert process_errors(tmp_path) == ["ValueError: one line", "ValueError: two"]
    note_process_error(tmp_path / "not there", ValueError())  # the process has to end


BREAK_ONCE = f"""
import os, sys
if "scaling_lab.worker" in sys.orig_argv:
    from scaling_lab.training.run.session import Program
    real, marker = Program.run_block, os.environ["BREAK_ONCE"]
    def run_block(self, places, count):
        if min(places.values()) > 5 and not os.path.exists(marker):
            open(marker, "w").close()
            raise RuntimeError({ILLEGAL!r})
        return real(self, places, count)
    Program.run_block = run_block
"""


@pytest.mark.slow
def test_the_pool_starts_a_fresh_worker(tmp_path, monkeypatch):
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject/sitecustomize.py").write_text(BREAK_ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "inject"))
    monkeypatch.setenv("BREAK_ONCE", str(tmp_path / "marker"))
    store, plan = RunStore(tmp_path / "s"), plan_of(*SPECS)
    store.write_plan(plan)
    run_workers(store, plan, [r.run_id for r in plan.runs], LineReporter(), workers=1, max_attempts=1)
    assert [store.read_record(s.run_id()).status for s in SPECS] == [RunStatus.COMPLETED] * 2
    assert [store.read_record(s.run_id()).process_retries for s in SPECS] == [1, 0]
