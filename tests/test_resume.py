"""Checkpoints and exact resuming: a run that is killed at any moment ends with the same losses bit for bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.runs import interrupted_at, losses, train
from helpers.specs import tiny
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.run.checkpoint import (
    Checkpoint,
    load_latest,
    read_checkpoint,
    save_checkpoint,
    steps_saved,
)


@pytest.mark.parametrize("stop_after", [1, 64, 130, 192])
def test_resume_is_bit_identical(tmp_path, stop_after):
    spec = tiny(250)
    whole = train(RunStore(tmp_path / "whole"), spec)
    store = RunStore(tmp_path / "resumed")
    interrupted_at(store, spec, stop_after)
    assert store.state(spec.run_id()).state == "interrupted"
    resumed = train(store, spec)
    assert losses(resumed) == losses(whole)
    assert store.read_record(spec.run_id()) == resumed


def test_compiled_resume_is_bit_identical(tmp_path):
    spec, execution = tiny(150), Execution(compile=True)
    whole = train(RunStore(tmp_path / "whole"), spec, execution)
    store = RunStore(tmp_path / "resumed")
    interrupted_at(store, spec, 64, execution)
    assert losses(train(store, spec, execution)) == losses(whole)


def test_block_means_survive_a_stop_in_the_middle_of_a_block(tmp_path, monkeypatch):
    """Long runs record means over blocks of steps, here of three; a checkpoint falls inside a block."""
    monkeypatch.setattr("scaling_lab.core.record.MAX_CURVE_POINTS", 100)
    spec = tiny(250)
    whole = train(RunStore(tmp_path / "whole"), spec)
    assert len(whole.curve) < 100
    store = RunStore(tmp_path / "resumed")
    monkeypatch.setattr(
        "scaling_lab.training.run.session.BLOCK_STEPS", 1
    )  # so that it stops at exactly this step
    interrupted_at(store, spec, 64)
    assert steps_saved(store.run_folder(spec.run_id()) / "checkpoint")[-1] == 64
    assert losses(train(store, spec)) == losses(whole)


def checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint("run", step, step, (0.5,), 1.5, Execution(), "data", {"flat": torch.full((5,), value)})


def test_the_last_two_checkpoints_are_kept_and_read_back(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, checkpoint(step, float(step)))
    assert steps_saved(tmp_path) == [3, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-10.json",
        "step-10.pt",
        "step-3.json",
        "step-3.pt",
    ]
    latest = load_latest(tmp_path, "run", Execution(), "data")
    assert latest is not None
    assert (latest.step, latest.block_losses_nats, latest.wall_time_s) == (10, (0.5,), 1.5)
    assert latest.tensors["flat"].tolist() == [10.0] * 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone", "json"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, damage, caplog):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / "step-2.pt"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "json":
        path.with_suffix(".json").write_text('{"step": 2')
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"truncated": data[:-10], "flipped": flipped, "empty": b""}[damage])
    latest = load_latest(tmp_path, "run", Execution(), "data")
    assert latest is not None
    assert latest.step == 1
    assert "is skipped" in caplog.text


def test_a_checkpoint_of_another_run_or_execution_is_not_used(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    assert load_latest(tmp_path, "other", Execution(), "data") is None
    assert load_latest(tmp_path, "run", Execution(compile=True), "data") is None
    assert load_latest(tmp_path, "run", Execution(), "other data") is None
    assert load_latest(tmp_path, "run", Execution(), "data") is not None


def test_no_pickle_is_ever_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/exploded",))

    import hashlib

    save_checkpoint(tmp_path, checkpoint(1))
    path = tmp_path / "step-1.pt"
    torch.save({"flat": Bomb()}, path)
    meta = json.loads(path.with_suffix(".json").read_text())
    meta["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        read_checkpoint(path, "run")
    assert not (tmp_path / "exploded").exists()


def test_a_run_with_a_deleted_curve_starts_over(tmp_path, caplog):
    spec = tiny(150)
    whole = train(RunStore(tmp_path / "whole"), spec)
    store = RunStore(tmp_path / "resumed")
    interrupted_at(store, spec, 64)
    (store.run_folder(spec.run_id()) / "curve.jsonl").unlink()
    assert losses(train(store, spec)) == losses(whole)
    assert "starts over" in caplog.text


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    spec, store = tiny(100), RunStore(tmp_path)
    folder = store.run_folder(spec.run_id())
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_text("a file where the folder should be")
    assert train(store, spec, checkpoint_every_s=0.0).final_val_loss_nats is not None
    assert "no checkpoint at step" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing():
    """SIGKILL during steps, during writes of checkpoints and records, and while resuming; the script verifies where each one
    landed (scripts/kill_resume.py runs a hundred of them)."""
    script = Path(__file__).parent.parent / "scripts" / "kill_resume.py"
    done = subprocess.run([sys.executable, script, "--kills", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 SIGKILLs" in done.stdout
    for stage in ("training step", "checkpoint write", "record write", "resume: the curve"):
        (hits,) = re.findall(rf"^  {stage} +(\d+)$", done.stdout, re.MULTILINE)
        assert int(hits) > 0
    same, runs = re.findall(r"bit for bit, nothing left over: (\d+) of (\d+) runs", done.stdout)[0]
    assert same == runs


def test_a_process_that_lost_its_claim_while_loading_does_not_touch_the_curve(tmp_path, monkeypatch):
    """It was paused while it loaded its data, and another process took the run over: its curve must not be replaced."""
    import scaling_lab.training.run.loop as loop
    from scaling_lab.core.storage.claims import ClaimLost

    spec, store = tiny(100), RunStore(tmp_path)
    claim = store.claim(spec)
    assert claim is not None
    real = loop.open_program

    def slow(*args, **options):
        session = real(*args, **options)
        (store.run_folder(spec.run_id()) / "claim-2.json").write_text("{}")
        (store.run_folder(spec.run_id()) / "curve.jsonl").write_text("the new owner's")
        return session

    monkeypatch.setattr(loop, "open_program", slow)
    with pytest.raises(ClaimLost):
        loop.train_run(PlannedRun(spec, Execution()), store, claim)
    assert (store.run_folder(spec.run_id()) / "curve.jsonl").read_text() == "the new owner's"
    assert not (store.run_folder(spec.run_id()) / "record.json").exists()


def test_an_error_in_a_process_that_lost_its_claim_is_not_recorded(tmp_path, monkeypatch):
    import scaling_lab.training.run.loop as loop
    from scaling_lab.launching.worker import train_claimed

    spec, store = tiny(100), RunStore(tmp_path)
    claim = store.claim(spec)
    assert claim is not None

    def broken(*args, **options):
        (store.run_folder(spec.run_id()) / "claim-2.json").write_text("{}")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "open_program", broken)
    assert train_claimed(PlannedRun(spec, Execution()), store, claim, None) is None
    assert not (store.run_folder(spec.run_id()) / "record.json").exists()


def test_a_worker_checkpoints_and_stops_when_its_launcher_is_killed(tmp_path):
    """A launcher that gets SIGKILL cannot stop its workers: the worker notices that its parent is gone."""
    spec, store = tiny(500_000), RunStore(tmp_path)
    plan = Plan("t", (PlannedRun(spec, Execution()),), spec.convention, spec.data.fingerprint())
    store.write_plan(plan)
    launcher = subprocess.Popen(
        [
            sys.executable, "-c",
            "import os, subprocess, sys; subprocess.run([sys.executable, '-m', 'scaling_lab.worker', "
            f"{str(store.folder)!r}, '--stop-with', str(os.getpid())])",
        ]
    )  # fmt: skip
    curve = store.run_folder(spec.run_id()) / "curve.jsonl"
    deadline = time.monotonic() + 90
    while not (curve.exists() and curve.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.state(spec.run_id()).state in ("claimed", "running")
    launcher.kill()
    launcher.wait()
    while store.state(spec.run_id()).state in ("claimed", "running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert store.state(spec.run_id()).state == "interrupted"
    assert steps_saved(store.run_folder(spec.run_id()) / "checkpoint")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_deterministic_gpu_repeats_and_resumes_bit_for_bit(tmp_path, dtype, compiled):
    spec, execution = tiny(150, dtype=dtype), Execution(device="cuda", compile=compiled, deterministic=True)
    whole = train(RunStore(tmp_path / "whole"), spec, execution)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert losses(train(RunStore(tmp_path / "again"), spec, execution)) == losses(whole)
    store = RunStore(tmp_path / "resumed")
    interrupted_at(store, spec, 64, execution)
    assert losses(train(store, spec, execution)) == losses(whole)
