"""Tests of the local launcher with real worker processes: side by side, killed, dying again and again, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.specs import spec
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching import workers
from scaling_lab.launching.gpu_sharing import GpuSharing, find_gpu_sharing
from scaling_lab.launching.workers import worker_environments

TINY_LINE = (
    "sweep=s data.max_mb=1 eval.tokens=1024 device=cpu compile=false design.sizes_per_budget=4 design.noise_seeds=1 "
    "design.sizes.min_width=4 design.sizes.max_width=16 design.sizes.width_ratio=1.3 design.sizes.width_multiple=4 "
    "design.sizes.min_depth=1 design.n_opt_at_1e12=200K data.max_epochs=99 workers=2"
)
TINY = TINY_LINE.split()


def start(folder: Path, *argv: str, **environment: str) -> subprocess.Popen[str]:
    def hear_interrupts() -> None:
        # Tests that run in the background of a shell inherit an ignored SIGINT, unlike a user's terminal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "scaling_lab.cli.main", "sweep", *argv],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        preexec_fn=hear_interrupts,
    )  # fmt: skip


def claims(store: RunStore) -> dict[str, dict]:
    """The newest claim of each run that has one."""
    found = {}
    for path in sorted(store.folder.glob("runs/*/claim-*.json")):
        try:
            found[path.parent.name] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
    return found


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        not Path(f"/proc/{pid}/stat").exists()
        or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    )


def test_a_killed_worker_is_replaced_and_every_run_completes(tmp_path):
    store = RunStore(tmp_path / "results/s")
    sweep = start(tmp_path, *TINY, "design.budgets_flops=[2e8]")
    pid = wait_for(
        lambda: next(
            (c["pid"] for c in claims(store).values() if c["step"] > 0 or c["heartbeat_unix_s"]), None
        )
    )
    os.kill(pid, signal.SIGKILL)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, err
    assert "4 of 4 runs completed" in out
    records, problems = store.load_records()
    assert not problems
    assert len(records) == 4
    workers = {c["pid"] for c in claims(store).values()}
    assert pid not in workers or len(workers) > 1
    assert any(p.stem.startswith("claim-2") for p in store.folder.glob("runs/*/claim-2.json"))
    assert "2 workers" in out


def test_a_run_whose_worker_always_dies_fails_with_a_reason(tmp_path):
    # Every worker that claims the widest model is killed with SIGKILL, as by the kernel when memory runs out.
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject/sitecustomize.py").write_text(
        "import glob, json, os, signal, sys, threading, time\n"
        "def watch():\n"
        "    while True:\n"
        "        for path in glob.glob('results/s/runs/gpt-w16-*/claim-*.json'):\n"
        "            try:\n"
        "                mine = json.load(open(path))['pid'] == os.getpid()\n"
        "            except (OSError, ValueError):\n"
        "                continue\n"
        "            if mine: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        time.sleep(0.01)\n"
        "if 'scaling_lab.worker' in ' '.join(sys.orig_argv): threading.Thread(target=watch, daemon=True).start()\n"
    )
    sweep = start(
        tmp_path,
        *TINY,
        "design.budgets_flops=[2e8]",
        "hydra.launcher.max_attempts=2",
        PYTHONPATH=str(tmp_path / "inject"),
    )
    out, err = sweep.communicate(timeout=150)
    assert sweep.returncode == 1, err
    store = RunStore(tmp_path / "results/s")
    records, _ = store.load_records()
    by_status = {r.status.value: r for r in records}
    assert len(records) == 4
    failed = by_status["failed"]
    assert failed.spec.shape.width == 16
    assert "died 2 times" in failed.reason
    assert "SIGKILL" in failed.reason
    assert f"{failed.run_id} failed" in err
    assert "3 of 4 runs completed, 1 failed" in out


def test_an_interrupt_stops_the_workers_and_the_sweep_can_resume(tmp_path):
    store = RunStore(tmp_path / "results/s")
    sweep = start(tmp_path, *TINY, "design.budgets_flops=[6e9]")
    running = wait_for(lambda: claims(store))
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted: ")
    assert "`scaling-lab sweep sweep=s` resumes the sweep" in last
    assert "Traceback" not in err
    for claim in (running | claims(store)).values():
        assert not alive(claim["pid"])
    assert not [s for s in store.states(store.read_plan()) if s.state in ("claimed", "running")]


def test_a_worker_that_cannot_start_is_an_error_that_quotes_it(tmp_path):
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject/sitecustomize.py").write_text(
        "import sys\nif 'scaling_lab.worker' in ' '.join(sys.orig_argv): sys.exit('libfoo.so is missing')\n"
    )
    sweep = start(tmp_path, *TINY, "design.budgets_flops=[1e8]", PYTHONPATH=str(tmp_path / "inject"))
    _, err = sweep.communicate(timeout=100)
    assert sweep.returncode == 2
    assert err.startswith("error: ")
    assert "libfoo.so is missing" in err


def planned_runs(n: int, *executions: Execution, **changes) -> list[PlannedRun]:
    return [PlannedRun(spec(seed_init=k, **changes), executions[k % len(executions)]) for k in range(n)]


def test_workers_share_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    one_thread, three = planned_runs(100, Execution("cpu")), planned_runs(9, Execution("cpu", threads=3))
    assert len(worker_environments(one_thread, None)) == 8
    assert len(worker_environments(three, None)) == 2
    assert len(worker_environments(one_thread[:3], None)) == 3
    assert len(worker_environments(one_thread, 5)) == 5
    assert {s["OMP_NUM_THREADS"] for s in worker_environments(three, None)} == {"3"}
    # All compilers together have as many processes as there are cores.
    assert {s["TORCHINDUCTOR_COMPILE_THREADS"] for s in worker_environments(three, None)} == {"4"}
    assert {s["TORCHINDUCTOR_COMPILE_THREADS"] for s in worker_environments(one_thread, 20)} == {"1"}
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in worker_environments(one_thread, None)[0]


@pytest.mark.parametrize("command", ["sweep", "train"])
def test_a_device_that_is_missing_here_is_one_line(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = {
        "sweep": TINY_LINE.replace("device=cpu", "device=cuda design.sizes.tolerance=1").split(),
        "train": ["sweep=s", "model.width=64", "model.depth=2", "train_tokens=20K", "device=cuda"],
    }[command]
    assert main([command, *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    assert "device=cuda" in line
    assert "not available on this machine" in line


def test_workers_share_gpus(monkeypatch):
    """Four small runs on a GPU with MPS, two that take turns without, one in exclusive mode or where runs fill the GPU."""
    mps, turns, exclusive = (GpuSharing(*how) for how in ((True, True), (False, False), (False, True)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(workers, "gpu_bytes", lambda: 80e9)
    monkeypatch.setattr(workers, "device_bytes", lambda run: 1e9)
    small = planned_runs(100, Execution("cuda"))
    devices = [s["CUDA_VISIBLE_DEVICES"] for s in worker_environments(small, None, mps)]
    assert devices == ["4", "6"] * 4
    assert [len(worker_environments(small, None, how)) for how in (turns, exclusive)] == [4, 2]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in worker_environments(small, 3, turns)] == ["4", "6", "4"]
    assert {s["TORCHINDUCTOR_COMPILE_THREADS"] for s in worker_environments(small, 4, turns)} == {"4"}
    with pytest.raises(UserError, match=r"workers=3.*exclusive mode.*Choices: workers=2, or MPS"):
        worker_environments(small, 3, exclusive)
    # Stacks that fill a GPU get it to themselves, and there is no worker without a stack.
    stacks = planned_runs(96, *(Execution("cuda", stack=f"s{k}", stack_size=32) for k in range(3)))
    assert len(worker_environments(stacks, None, mps)) == 3
    large = planned_runs(9, Execution("cuda"), shape=GPTShape(width=512, depth=8, heads=8))
    assert len(worker_environments(large, None, mps)) == 2
    # Of runs of 30 GB two fit on a GPU of 80 GB; of 100 GB none does, and each GPU gets one, which will say so.
    for size, count in ((30e9, 4), (100e9, 2)):
        monkeypatch.setattr(workers, "device_bytes", lambda run, size=size: size)
        assert len(worker_environments(small, None, mps)) == count


def test_mps_and_exclusive_mode_are_detected(tmp_path, monkeypatch):
    """By stand-ins for NVIDIA's commands. A socket that no daemon answers is not MPS."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "pipes"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert find_gpu_sharing() == GpuSharing(mps=False, exclusive=False)
    (tmp_path / "pipes").mkdir()
    (tmp_path / "pipes" / "control").touch()
    assert find_gpu_sharing() == GpuSharing(mps=True, exclusive=False)  # a container without the command
    for name, script in (
        ("nvidia-cuda-mps-control", 'read line; [ "$line" = get_server_list ] && exit $MPS_STATUS'),
        ("nvidia-smi", "echo Default; echo Exclusive_Process"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for status, mps in (("0", True), ("1", False)):
        monkeypatch.setenv("MPS_STATUS", status)
        assert find_gpu_sharing() == GpuSharing(mps=mps, exclusive=True)
    assert "MPS is running" in GpuSharing(True, True).describe()
    assert "one worker per GPU" in GpuSharing(False, True).describe()
    assert "take turns" in GpuSharing(False, False).describe()


def test_a_worker_always_gets_its_run_ids(tmp_path, monkeypatch):
    """A cluster job reads only its part of the plan: a worker without ids would train every run of the plan."""
    planned = [PlannedRun(spec(seed_init=seed), Execution()) for seed in (1, 2)]
    store = RunStore(tmp_path / "s")
    store.write_plan(Plan("s", tuple(planned), spec().convention, "abc"))
    mine = planned[0].run_id
    part = store.read_plan([mine])
    commands: list[list[str]] = []
    monkeypatch.setattr(workers.subprocess, "Popen", lambda command, **_: commands.append(command))
    stop = threading.Event()
    stop.set()  # after the first look
    pool = workers.WorkerPool(store, part, part.runs, [{}], 3, None, stop)
    with pytest.raises(KeyboardInterrupt):
        pool.run(SimpleNamespace(show=lambda progress: None))
    pool.workers[0].file.close()
    assert commands[0][commands[0].index("--run-ids") + 1] == mine


def test_impossible_options_are_refused(tmp_path):
    sweep = start(tmp_path, *TINY, "design.budgets_flops=[1e8]", "hydra.launcher.max_attempts=0")
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 2
    assert err.startswith("error: hydra.launcher.max_attempts=0")


@pytest.mark.parametrize("launcher", ["local", "submitit_local"])
def test_a_clone_in_the_working_folder_does_not_shadow_the_package(tmp_path, launcher):
    """Python looks into the working folder first, and would take a folder of this name for the package."""
    (tmp_path / "scaling_lab/scaling_lab").mkdir(parents=True)
    command = [str(Path(sys.executable).parent / "scaling-lab"), "sweep", *TINY, "design.budgets_flops=[1e8]"]
    command.append(f"hydra/launcher={launcher}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 runs completed" in done.stdout


def test_the_worker_command_trains_a_plan_in_its_own_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [option for option in TINY if not option.startswith("workers=")]
    assert main(["plan", *options, "design.budgets_flops=[1e8]", "--quiet"]) == 0
    store = RunStore(tmp_path / "results/s")
    first, *others = [run.run_id for run in store.read_plan().runs]
    command = [sys.executable, "-m", "scaling_lab.cli.main", "worker", "results/s"]
    subprocess.run([*command, f"run_ids=[{first}]"], check=True, timeout=120)
    assert store.run_ids_with_record() == [first]
    subprocess.run(command, check=True, timeout=120)
    assert sorted(store.run_ids_with_record()) == sorted([first, *others])
    capsys.readouterr()
    for argv, words in (
        (["worker"], "folder is missing"),
        (["worker", "nowhere"], "there is no plan at nowhere/plan.json"),
        (["worker", "results/s", "parallel=dpd"], "parallel='dpd' is not known"),
        (["worker", "results/s", "tracker=wandb"], "tracker='wandb' is not a JSON object"),
        (["worker", "results/s", "results/t"], "folder is given twice"),
    ):
        assert main(argv) == 2
        assert words in capsys.readouterr().err
