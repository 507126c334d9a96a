"""Real faults of disks and files: each is handled, no other run is lost, and the message says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.runs import losses
from helpers.specs import tiny
from scaling_lab.analysis.data.ledger import load_ledger
from scaling_lab.cli.main import main
from scaling_lab.core.errors import DiskError, UserError
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending

SPECS = [tiny(200, seed_init=seed) for seed in (0, 1)]
PLAN = Plan(
    "sweep", tuple(PlannedRun(s, Execution()) for s in SPECS), SPECS[0].convention, SPECS[0].data.fingerprint(),
    settings={"sweep": "sweep"},
)  # fmt: skip
FIRST, SECOND = (run.run_id for run in PLAN.runs)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A small filesystem mounted at `folder`; the test is skipped where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options) or "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs `mount`")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` mounted over itself read-only, so that root cannot write either."""
    for options in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        try:
            done = subprocess.run(["mount", *options], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("needs `mount`")
        if done.returncode:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)
            pytest.skip(f"a read-only bind mount is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Fill the filesystem up to `leave_bytes`; the file to delete to make room."""
    filler = folder / "filler"
    free = shutil.disk_usage(folder).free
    filler.write_bytes(b"\0" * (free - leave_bytes))
    return filler


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, trained: a folder to copy and damage."""
    store = RunStore(tmp_path_factory.mktemp("whole") / "sweep")
    store.write_plan(PLAN)
    assert len(train_pending(store, PLAN)) == 2
    return store.folder


@pytest.fixture
def store(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.chdir(tmp_path)
    return RunStore(shutil.copytree(undisturbed, tmp_path / "results/sweep"))


def assert_all_as(store: RunStore, undisturbed: Path) -> None:
    for run_id in (FIRST, SECOND):
        assert losses(store.read_record(run_id)) == losses(RunStore(undisturbed).read_record(run_id))


def status(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    capsys.readouterr()
    assert main(["status", "sweep=sweep", "--json"]) == 0
    return {run["run_id"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


@pytest.mark.parametrize("leave_bytes", [0, 12_000, 60_000])
def test_a_full_disk_stops_the_sweep_but_fails_no_run(tmp_path, undisturbed, leave_bytes):
    """The disk is full before anything is written, while the curve is written, or at the checkpoint or record."""
    with mounted(tmp_path / "disk") as disk:
        store = RunStore(disk / "sweep")
        store.write_plan(PLAN)
        filler = fill(disk, leave_bytes)
        with pytest.raises(
            DiskError, match="the disk is full.*No run is lost.*scaling-lab sweep sweep=sweep"
        ):
            train_pending(store, PLAN)
        assert {s.state for s in store.states(PLAN)} <= {"planned", "interrupted", "claimed", "completed"}
        assert not list(store.folder.rglob(".*.tmp"))
        filler.unlink()
        # A claim that could not be released belongs to this process, and lives as long.
        for path in store.folder.glob("runs/*/claim-*.json"):
            path.unlink()
        train_pending(store, PLAN)
        assert_all_as(store, undisturbed)


@pytest.mark.slow
def test_the_command_on_a_full_disk_ends_with_one_line(tmp_path, undisturbed):
    """Through real workers, whose logs are on the full disk too."""
    with mounted(tmp_path / "disk") as disk:
        store = RunStore(disk / "sweep")
        store.write_plan(PLAN)
        filler = fill(disk, 12_000)
        argv = [
            sys.executable,
            "-m",
            "scaling_lab.cli.main",
            "sweep",
            "sweep=sweep",
            f"results_dir={disk}",
            "workers=1",
        ]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 74, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "the disk is full" in errors[0]
        assert f"results_dir={disk}" in errors[0]
        assert not store.run_ids_with_record()
        filler.unlink()
        subprocess.run(argv, check=True, capture_output=True, timeout=120)
        assert_all_as(store, undisturbed)


def test_a_read_only_folder_is_read_but_not_written(store, undisturbed, capsys):
    (store.run_folder(SECOND) / "record.json").unlink()
    with read_only(store.folder):
        assert status(capsys)[FIRST]["state"] == "completed"
        assert main(["sweep", "sweep=sweep", "workers=1"]) == 74
        error = capsys.readouterr().err.splitlines()[-1]
        assert "it is read-only" in error
        assert "scaling-lab sweep sweep=sweep" in error
        with pytest.raises(DiskError, match="read-only"):
            train_pending(store, PLAN)
        assert main(["report", "sweep=sweep"]) == 74
        assert capsys.readouterr().err.splitlines()[-1].endswith("take out=DIR, a folder elsewhere.")
        assert main(["report", "sweep=sweep", f"out={store.folder.parent / 'elsewhere'}"]) == 0
    train_pending(store, PLAN)
    assert_all_as(store, undisturbed)


@pytest.mark.parametrize("damage", ["deleted", "torn", "shortened"])
def test_a_finished_run_without_its_curve_is_not_done(store, undisturbed, capsys, damage):
    path = store.run_folder(FIRST) / "curve.jsonl"
    text = path.read_text()
    {
        "deleted": path.unlink,
        "torn": lambda: path.write_text(text[:-30]),
        "shortened": lambda: path.write_text("".join(text.splitlines(keepends=True)[:10])),
    }[damage]()
    found = status(capsys)
    assert found[SECOND]["state"] == "completed"
    assert found[FIRST]["state"] == "failed"
    assert "curve.jsonl is " in found[FIRST]["reason"]
    assert "retry=failed" in found[FIRST]["reason"]
    assert [r.run_id for r in load_ledger(store)[0]] == [SECOND]
    assert store.reopen_failed(PLAN) == [FIRST]
    assert [r.run_id for r in train_pending(store, PLAN)] == [FIRST]
    assert_all_as(store, undisturbed)


@pytest.mark.parametrize("text", ['{"run_id": "gpt', "", "[]", "null"])
def test_a_half_written_record_fails_only_its_own_run(store, undisturbed, capsys, text):
    (store.run_folder(FIRST) / "record.json").write_text(text)
    found = status(capsys)
    assert found[SECOND]["state"] == "completed"
    assert found[FIRST]["state"] == "failed"
    assert "cannot be read" in found[FIRST]["reason"]
    assert store.reopen_failed(PLAN) == [FIRST]
    # Its last checkpoint is whole: nothing is trained again.
    train_pending(store, PLAN)
    assert_all_as(store, undisturbed)


def test_a_deleted_checkpoint_costs_steps_and_is_reported(store, undisturbed, caplog):
    folder = store.run_folder(FIRST)
    (folder / "record.json").unlink()
    shutil.rmtree(folder / "checkpoint")
    train_pending(store, PLAN)
    assert "starts over: no intact checkpoint is left; its 200 points are recomputed" in caplog.text
    assert_all_as(store, undisturbed)


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_folder_with_an_older_schema_is_read(store, capsys):
    """As the first version wrote it: plan, spec, record and claim lack the fields that were added later."""

    def older(spec: dict) -> None:
        del spec["parametrization"]
        del spec["parent"]

    def older_record(record: dict) -> None:
        older(record["spec"])
        del record["curve_bytes"]
        record["execution"] = {"device": "cpu", "compile": False, "threads": 1, "deterministic": True}

    folder = store.run_folder(FIRST)
    edit(store.plan_path, lambda plan: [older(run["spec"]) for run in plan["runs"]])
    edit(folder / "spec.json", older)
    edit(folder / "record.json", older_record)
    edit(folder / "claim-1.json", lambda claim: claim.pop("machine"))
    assert {run["state"] for run in status(capsys).values()} == {"completed"}
    assert [run.run_id for run in store.read_plan().runs] == [FIRST, SECOND]
    assert len(load_ledger(store)[0]) == 2
    assert train_pending(store, store.read_plan()) == []


def test_a_record_of_a_newer_version_is_left_alone(store, capsys):
    edit(store.run_folder(FIRST) / "record.json", lambda record: record.update(color="blue"))
    found = status(capsys)
    assert found[SECOND]["state"] == "completed"
    assert "update scaling-lab" in found[FIRST]["reason"]
    with pytest.raises(UserError, match="update scaling-lab"):
        store.read_record(FIRST)


def test_the_error_of_a_broken_plan_says_how_to_continue(store, capsys):
    store.plan_path.write_text(store.plan_path.read_text()[:300])
    assert main(["status", "sweep=sweep"]) == 2
    assert "plan again with the same options" in capsys.readouterr().err
    os.makedirs("results/other/runs")
    assert main(["status"]) == 0


def test_two_processes_reopen_a_failed_run_once(store):
    path = store.run_folder(FIRST) / "record.json"
    edit(path, lambda record: record.update(status=RunStatus.FAILED, reason="no memory"))
    assert store.reopen_failed(PLAN) == [FIRST]
    assert store.reopen_failed(PLAN) == []
