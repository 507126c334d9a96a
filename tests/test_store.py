"""The run store: atomic writes, claims held and lost by real processes, torn files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.processes import start_helper
from helpers.specs import spec
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import EvalPoint
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.claims import ClaimLost, last_claim
from scaling_lab.core.storage.files import create_exclusive, write_atomic
from scaling_lab.core.storage.store import RunStore, curve_line


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "sweep")


def start_holder(store: RunStore) -> subprocess.Popen[str]:
    process = start_helper("claim_holder", str(store.folder))
    assert process.stdout
    assert process.stdout.readline().strip() == "claimed"
    return process


def test_a_live_claim_is_respected_and_a_killed_owners_is_taken_over(store):
    holder = start_holder(store)
    assert store.claim(spec()) is None
    assert store.state(spec().run_id()).state in ("claimed", "running")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store.state(spec().run_id()).state == "interrupted"
    claim = store.claim(spec())
    assert claim is not None
    assert claim.generation == 2


def test_a_zombie_owner_counts_as_dead(store):
    """Killed but not yet reaped by its parent: it will never write again."""
    holder = start_holder(store)
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while store.state(spec().run_id()).state in ("claimed", "running") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.claim(spec()) is not None
    holder.wait()


def test_one_of_many_claimants_wins(store):
    """64 threads claim one run: exclusive creation leaves one winner."""
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda _: store.claim(spec()), range(64)))
    assert sum(claim is not None for claim in claims) == 1


def test_a_former_owner_is_fenced_off(store, monkeypatch):
    """A paused owner that wakes after a takeover sees the newer claim and stops; its record is not written."""
    old = store.claim(spec())
    assert old is not None
    monkeypatch.setattr("scaling_lab.core.storage.claims.process_start", lambda pid: None)
    new = store.claim(spec())
    assert new is not None
    assert new.generation == old.generation + 1
    with pytest.raises(ClaimLost):
        old.heartbeat(step=3)
    new.heartbeat(step=5, steps=10, tokens_per_s=2.0, train_loss_nats=1.5)
    info = last_claim(store.run_folder(spec().run_id()))
    assert info is not None
    assert (info.step, info.generation) == (5, 2)


def test_a_claim_of_another_host_expires_only_without_a_heartbeat(store):
    claim = store.claim(spec())
    assert claim is not None
    path = store.run_folder(spec().run_id()) / "claim-1.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "host": "elsewhere", "pid": 1}))
    assert store.claim(spec()) is None
    # The heartbeat is the file's modification time by its filesystem's clock, so clocks of machines do not matter.
    path.write_text(json.dumps({**data, "host": "elsewhere", "pid": 1, "heartbeat_unix_s": 0.0}))
    assert store.claim(spec()) is None
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert store.claim(spec()) is not None


def test_a_pid_in_another_container_with_this_host_name_proves_nothing(store):
    claim = store.claim(spec())
    assert claim is not None
    path = store.run_folder(spec().run_id()) / "claim-1.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "machine": "another boot", "pid": 2**22 - 1, "pid_started": "1"}))
    assert store.claim(spec()) is None
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert store.claim(spec()) is not None


def test_without_start_times_the_heartbeat_decides(store, monkeypatch):
    """On macOS, a reused pid must not hold a run forever."""
    monkeypatch.setattr("scaling_lab.core.storage.claims.process_start", lambda pid: "unknown")
    assert store.claim(spec()) is not None
    assert store.claim(spec()) is None
    path = store.run_folder(spec().run_id()) / "claim-1.json"
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert store.claim(spec()) is not None


def test_an_unreadable_claim_does_not_mean_a_dead_owner(store, monkeypatch):
    """On a shared filesystem between two renames (ESTALE) the run is left alone."""
    from pathlib import Path

    assert store.claim(spec()) is not None
    real = Path.read_text

    def stale(self, *args, **options):
        if self.name.startswith("claim-"):
            raise OSError(116, "Stale file handle")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", stale)
    assert store.claim(spec()) is None


def test_claims_without_hard_links(store, monkeypatch):
    """exFAT and many network mounts have none: exclusive creation still has one winner."""

    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda _: store.claim(spec()), range(32)))
    assert sum(claim is not None for claim in claims) == 1


def test_a_record_that_is_not_an_object_is_a_failed_run(store):
    folder = store.run_folder(spec().run_id())
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("[]")
    assert store.state(spec().run_id()).state == "failed"
    with pytest.raises(UserError, match="cannot be read"):
        store.read_record(spec().run_id())


def test_released_and_unreadable_claims_are_free(store):
    claim = store.claim(spec())
    assert claim is not None
    claim.release()
    assert store.state(spec().run_id()).state == "interrupted"
    second = store.claim(spec())
    assert second is not None
    (store.run_folder(spec().run_id()) / "claim-2.json").write_text('{"host": "tor')
    assert store.claim(spec()) is not None


def test_a_former_owner_cannot_write_to_the_new_curve(store):
    """A new attempt's curve is a new file, so a former owner's lines do not reach it."""
    store.claim(spec())
    old = store.start_curve(spec().run_id())
    point = EvalPoint(1, 512, 1.0, 0.1, 5.0)
    new = store.start_curve(spec().run_id(), [point])
    old.write(curve_line(EvalPoint(99, 1, 1.0, 0.1, 9.0)))
    old.close()
    new.write(curve_line(EvalPoint(2, 1024, 2.0, 0.1, 4.0, 4.5, 0.1, wall_time_s=3.0)))
    new.close()
    assert [p.step for p in store.read_curve(spec().run_id())] == [1, 2]
    assert store.read_curve(spec().run_id())[0] == point


def test_a_torn_last_line_is_left_out(store):
    store.claim(spec())
    with store.start_curve(spec().run_id()) as file:
        file.write(curve_line(EvalPoint(1, 512, 1.0, 0.1, 5.0)))
        file.write('{"step": 2, "tok')
    assert [p.step for p in store.read_curve(spec().run_id())] == [1]


def test_exclusive_creation_never_overwrites(tmp_path):
    assert create_exclusive(tmp_path / "a", "one")
    assert not create_exclusive(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    write_atomic(tmp_path / "a", "three")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_plan_on_disk(store):
    plan = Plan("sweep", (PlannedRun(spec(), Execution()),), spec().convention, "abc")
    with pytest.raises(UserError, match="there is no plan"):
        store.read_plan()
    store.write_plan(plan)
    assert store.read_plan() == plan
    assert [s.state for s in store.states(plan)] == ["planned"]
    store.plan_path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        store.read_plan()


def test_a_job_reads_its_runs_and_the_runs_they_are_trained_with(store):
    trunk = spec(seed_init=1)
    branch = spec(seed_init=2, parent=trunk.run_id(), parent_step=1)
    stacked = Execution(stack="pair", stack_size=2)
    runs = [
        PlannedRun(trunk, Execution()),
        PlannedRun(branch, Execution()),
        *(PlannedRun(spec(seed_init=seed), stacked) for seed in (3, 4)),
        PlannedRun(spec(seed_init=5), Execution()),
    ]
    plan = Plan("sweep", tuple(runs), spec().convention, "abc", settings={"seed": 0})
    store.write_plan(plan)
    for asked, kept in (([1], [0, 1]), ([0], [0]), ([3], [2, 3]), ([4, 2], [2, 3, 4]), ([], [])):
        part = store.read_plan([runs[k].run_id for k in asked])
        assert part.runs == tuple(runs[k] for k in kept)
        assert (part.data_fingerprint, part.settings) == ("abc", {"seed": 0})


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_sweep_names_are_folder_names(tmp_path, name):
    with pytest.raises(UserError, match="sweep="):
        RunStore.for_sweep(tmp_path, name)


def test_failed_runs_can_be_tried_again(store):
    planned = PlannedRun(spec(), Execution())
    plan = Plan("sweep", (planned,), spec().convention, "abc")
    folder = store.run_folder(spec().run_id())
    folder.mkdir(parents=True)
    for attempt in (1, 2):
        (folder / "record.json").write_text('{"status": "failed", "reason": "no memory"}')
        assert store.claim(spec()) is None
        assert store.reopen_failed(plan) == [spec().run_id()]
        assert (folder / f"record-failed-{attempt}.json").exists()
        claim = store.claim(spec())
        assert claim is not None
        claim.release()
    # tests/test_faults.py checks that completed runs are left alone.
