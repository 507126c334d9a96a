"""Tests of `hydra/launcher=submitit_slurm` against a real Slurm of one node with two CPUs (tests/slurm/): sweeps that
complete, jobs that are killed, canceled, timed out, requeued and preempted, heads that die. Marked slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scaling_lab.core.record import RunStatus
from scaling_lab.core.storage.claims import last_claim
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.cluster import SubmittedArray

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]

HERE = Path(__file__).parent / "slurm"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
# Four sizes of 1,000 to 7,000 parameters that train for some seconds each.
TINY_LINE = (
    "sweep=s data.max_mb=1 eval.tokens=1024 device=cpu compile=false design.budgets_flops=[1.5e10] "
    "design.sizes_per_budget=4 design.noise_seeds=1 design.sizes.min_width=4 design.sizes.max_width=16 "
    "design.sizes.width_ratio=1.3 design.sizes.width_multiple=4 design.sizes.min_depth=1 design.n_opt_at_1e12=200K "
    "data.max_epochs=99"
)
TINY = TINY_LINE.split()
SLURM = "hydra/launcher=submitit_slurm"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """A running Slurm; arrays of at most three tasks."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {
        **os.environ,
        "MAX_ARRAY_SIZE": "3",
        "CPUS": "2",
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    subprocess.run([HERE / "start_cluster.sh", folder], env=environment, check=True, timeout=60)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield
    finally:
        subprocess.run([HERE / "stop_cluster.sh", folder], check=False, timeout=60)
        del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """The results of the same sweep on this machine without disturbance."""
    folder = tmp_path_factory.mktemp("local")
    subprocess.run([*scaling_lab("sweep"), *TINY], cwd=folder, check=True, timeout=200)
    return folder / "results"


def scaling_lab(*argv: str) -> list[str]:
    return [sys.executable, "-m", "scaling_lab.cli.main", *argv]


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """Starts the head of a sweep."""
    return subprocess.Popen(
        [*scaling_lab("sweep"), *argv], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that run in the background of a shell inherit an ignored SIGINT, unlike a user's terminal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def end(head: subprocess.Popen[str], status: int) -> str:
    out, err = head.communicate(timeout=300)
    assert head.returncode == status, out + err
    assert "Traceback" not in out + err
    return out + err


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError("it did not come to pass")


def training(store: RunStore, *but: str) -> str | None:
    """A running run that has done some steps."""
    for folder in sorted(store.folder.glob("runs/*")):
        claim = last_claim(folder)
        if folder.name not in but and claim and claim.step and claim.is_live(time.time()):
            return folder.name
    return None


def job_of(store: RunStore, run_id: str) -> str:
    """The Slurm job that was given a run last."""
    name, task = next(
        (b.name, k)
        for b in reversed(SubmittedArray.all_of(store))
        for k, ids in enumerate(b.jobs)
        if run_id in ids
    )
    lines = slurm("squeue", "-h", "-r", "-t", "all", f"--name={name}", "-o", "%F %K").split("\n")
    array = next(line.split()[0] for line in lines if line)
    return f"{array}_{task}" if any(line.split()[1:] == [str(task)] for line in lines) else array


def kill_job(store: RunStore, run_id: str) -> None:
    """SIGKILL to the job's process and to its worker, before the worker can notice that the job is gone."""
    claim = last_claim(store.run_folder(run_id))
    assert claim is not None
    parent = int(Path(f"/proc/{claim.pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"submitit" in Path(f"/proc/{parent}/cmdline").read_bytes()
    os.kill(parent, signal.SIGKILL)
    os.kill(claim.pid, signal.SIGKILL)


@contextlib.contextmanager
def paused(store: RunStore, run_id: str) -> Iterator[None]:
    """A run under way makes no step until the signal that stops it has come: it does not finish before, however long
    Slurm takes to deliver what was done to its job meanwhile."""
    claim = last_claim(store.run_folder(run_id))
    assert claim is not None
    os.kill(claim.pid, signal.SIGSTOP)
    try:
        yield
        wait_for(lambda: has_pending(claim.pid, signal.SIGTERM), 30)
    finally:
        os.kill(claim.pid, signal.SIGCONT)


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process (proc(5), status: ShdPnd, a mask in hexadecimal)."""
    mask = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert mask is not None
    return bool(int(mask[1], 16) >> (number - 1) & 1)


def generations(store: RunStore) -> dict[str, int]:
    """How often each run was claimed."""
    return {p.name: c.generation for p in store.folder.glob("runs/*") if (c := last_claim(p)) is not None}


def check_same_as(local: Path, store: RunStore) -> None:
    """Every run exists once, with exactly the curve and losses of the undisturbed sweep."""
    here, problems = store.load_records()
    there, _ = RunStore(local / "s").load_records()
    assert not problems
    assert [r.run_id for r in here] == [r.run_id for r in there]
    for a, b in zip(here, there):
        assert a.status is RunStatus.COMPLETED
        assert a.final_val_loss_nats == b.final_val_loss_nats
        assert [(p.step, p.train_loss_nats, p.val_loss_nats) for p in a.curve] == [
            (p.step, p.train_loss_nats, p.val_loss_nats) for p in b.curve
        ]


def analysis(results: Path) -> dict[str, Any]:
    """analysis.json without paths and dates."""
    subprocess.run(
        [*scaling_lab("analyze"), "sweep=s", "--quiet", "bootstrap.resamples=50"],
        cwd=results.parent, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found = json.loads((results / "s/report/analysis.json").read_text())
    return {key: value for key, value in found.items() if key not in ("command", "versions", "source")}


def test_a_sweep_gives_the_results_of_one_machine(cluster, local, tmp_path):
    out = end(start(tmp_path, *TINY, SLURM), 0)
    store = RunStore(tmp_path / "results/s")
    check_same_as(local, store)
    assert set(generations(store).values()) == {1}
    # MaxArraySize is 3.
    assert sorted(len(array.jobs) for array in SubmittedArray.all_of(store)) == [1, 3]
    assert out.count("limits 10 min") == 2
    assert "4 of 4 runs completed" in out
    assert analysis(tmp_path / "results") == analysis(local)


def test_killed_canceled_and_timed_out_jobs_complete_after_a_rerun(cluster, local, tmp_path):
    store = RunStore(tmp_path / "results/s")
    head = start(tmp_path, *TINY, SLURM, "hydra.launcher.max_num_timeout=0")
    late = wait_for(lambda: training(store))
    claim = last_claim(store.run_folder(late))
    assert claim is not None
    # Its worker hangs until the job's minute is over.
    os.kill(claim.pid, signal.SIGSTOP)
    late_job = job_of(store, late)
    slurm("scontrol", "update", f"JobId={late_job}", "TimeLimit=1")
    killed = wait_for(lambda: training(store, late))
    kill_job(store, killed)
    canceled = wait_for(lambda: training(store, late, killed))
    with paused(store, canceled):
        slurm("scancel", job_of(store, canceled))
    wait_for(lambda: late_job not in slurm("squeue", "-h", "-r", "-o", "%F_%K").split(), 200)
    with contextlib.suppress(ProcessLookupError):
        os.kill(claim.pid, signal.SIGKILL)  # as a cluster with cgroups does
    said = end(head, 1)
    late_line = next(line for line in said.splitlines() if f"{late} has not finished" in line)
    assert "TIMEOUT" in late_line or "FAILED" in late_line
    assert "CANCELLED" in said
    assert "1 of 4 runs completed" in said
    assert f"scaling-lab sweep sweep=s {SLURM}" in said
    # A job that is told to stop keeps its progress; a killed one loses what came after its last checkpoint.
    assert list(store.run_folder(canceled).glob("checkpoint/step-*.json"))
    end(start(tmp_path, "sweep=s", SLURM), 0)
    check_same_as(local, store)
    assert {k: v for k, v in generations(store).items() if v > 1} == dict.fromkeys(
        (late, killed, canceled), 2
    )


def test_a_job_is_requeued_before_its_time_limit_and_when_preempted(cluster, local, tmp_path):
    store = RunStore(tmp_path / "results/s")
    head = start(tmp_path, *TINY, SLURM)
    told = wait_for(lambda: training(store))
    # The signal that Slurm sends before the limit (--signal).
    with paused(store, told):
        slurm("scancel", "--signal=USR2", job_of(store, told))
    preempted = wait_for(lambda: training(store, told))
    with paused(store, preempted):
        job = job_of(store, preempted)
        line = "sbatch --parsable -p urgent --exclusive --mem=100M -o /dev/null --wrap=true"
        urgent = slurm(*line.split())
        wait_for(lambda: "JobState=RUNNING" not in slurm("scontrol", "show", "job", job), 30)
    end(head, 0)
    check_same_as(local, store)
    assert "COMPLETED" in slurm("scontrol", "show", "job", urgent.strip())
    times = generations(store)
    assert times[told] == 2
    assert times[preempted] == 2
    logs = "".join(p.read_text() for p in store.folder.glob("logs/job-*.log"))
    assert f"run {told} resumes from step" in logs
    assert f"run {preempted} resumes from step" in logs


def test_a_second_head_takes_over_the_jobs_of_one_that_died(cluster, local, tmp_path):
    store = RunStore(tmp_path / "results/s")
    head = start(tmp_path, *TINY, SLURM)
    wait_for(lambda: training(store))
    head.send_signal(signal.SIGKILL)
    head.wait()
    entries = len(SubmittedArray.all_of(store))
    out = end(start(tmp_path, *TINY, SLURM), 0)
    assert "runs are in jobs that an earlier start of this sweep submitted" in out
    assert len(SubmittedArray.all_of(store)) == entries
    check_same_as(local, store)
    assert set(generations(store).values()) == {1}


def test_ctrl_c_leaves_the_jobs_and_prints_how_to_cancel_them(cluster, tmp_path):
    store = RunStore(tmp_path / "results/s")
    head = start(tmp_path, *TINY, SLURM)
    wait_for(lambda: training(store))
    head.send_signal(signal.SIGINT)
    said = end(head, 130)
    command = said.split("`")[1]
    assert command.startswith("scancel --name=s-")
    assert "running" in said
    slurm(*command.split())
    wait_for(lambda: not slurm("squeue", "-h"))
    assert not training(store)


def test_an_error_of_sbatch_is_one_line(cluster, tmp_path):
    said = end(start(tmp_path, *TINY, SLURM, "hydra.launcher.partition=nowhere"), 2)
    assert said.splitlines()[-1].startswith("error: sbatch rejected the job: ")
    assert "partition=nowhere" in said
    assert not SubmittedArray.all_of(RunStore(tmp_path / "results/s"))


def test_jobs_of_the_old_version_fail_in_one_line_and_are_submitted_again(
    cluster, local, tmp_path, monkeypatch
):
    """Before the modules moved, jobs were pickled as `scaling_lab.cli.cluster_job.ClusterJob`."""
    from submitit.slurm.slurm import SlurmExecutor

    @dataclass
    class ClusterJob:
        folder: str
        run_ids: tuple[str, ...]
        workers: int = 1
        max_attempts: int = 3
        tracker: dict[str, Any] | None = None

        def __call__(self) -> None:
            raise AssertionError("the old code is gone")

    old = ModuleType("scaling_lab.cli.cluster_job")
    ClusterJob.__module__, ClusterJob.__qualname__ = old.__name__, "ClusterJob"
    old.ClusterJob = ClusterJob  # type: ignore[attr-defined]
    subprocess.run([*scaling_lab("plan"), *TINY, "--quiet"], cwd=tmp_path, check=True, timeout=120)
    store = RunStore(tmp_path / "results/s")
    ids = [run.run_id for run in store.read_plan().runs][:2]
    array = SubmittedArray.create(store, "s", [[run_id] for run_id in ids])
    executor = SlurmExecutor(array.folder)
    executor.update_parameters(job_name=array.name, time=10, mem="500MB")
    with monkeypatch.context() as at_import:
        at_import.setitem(sys.modules, old.__name__, old)
        executor.submit_array([ClusterJob(str(store.folder), (run_id,)) for run_id in ids])
    said = end(start(tmp_path, "sweep=s", SLURM), 1)
    for run_id in ids:
        line = next(line for line in said.splitlines() if f"{run_id} has not finished" in line)
        assert "scaling_lab.cli.cluster_job is now scaling_lab.launching.cluster_job" in line
        assert "the same `scaling-lab sweep` command submits it again" in line
    end(start(tmp_path, "sweep=s", SLURM), 0)
    check_same_as(local, store)
