"""Tests of a sweep's other launchers with real training: joblib, ray, submitit_local; and of what is asked of Slurm,
without a Slurm. Those that are optional extras are skipped where they are not installed."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.specs import spec
from scaling_lab.cli.main import main
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching import cluster, hydra_jobs, slurm
from scaling_lab.launching.cluster import JobRequest, make_arrays
from scaling_lab.launching.progress import LineReporter
from scaling_lab.launching.sweeping import SweepJobs, group_into_jobs
from scaling_lab.planning.cost import JobNeeds, job_needs

TINY_LINE = (
    "sweep=s data.max_mb=1 eval.tokens=1024 device=cpu compile=false design.budgets_flops=[1e8] design.sizes_per_budget=4 "
    "design.noise_seeds=1 design.sizes.min_width=4 design.sizes.max_width=16 design.sizes.width_ratio=1.3 "
    "design.sizes.width_multiple=4 design.sizes.min_depth=1 design.n_opt_at_1e12=200K data.max_epochs=99"
)
TINY = TINY_LINE.split()


def sweep(folder: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "scaling_lab.cli.main", "sweep", *TINY, *argv],
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_complete(folder: Path) -> None:
    records, problems = RunStore(folder / "results/s").load_records()
    assert not problems
    assert [r.status for r in records] == [RunStatus.COMPLETED] * 4


@pytest.mark.slow
def test_joblib(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'scaling-lab[joblib]'")
    sweep(tmp_path, "hydra/launcher=joblib", "hydra.sweeper.runs_per_job=2")
    check_complete(tmp_path)


@pytest.mark.slow
def test_ray_on_loopback(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install 'scaling-lab[ray]'")
    # A separate cluster: Ray would join one named in its temporary folder, even if that one was killed.
    sweep(tmp_path, "hydra/launcher=ray", "+hydra.launcher.ray.init._node_ip_address=127.0.0.1",
          "hydra.launcher.ray.init.address=local", "hydra.sweeper.runs_per_job=2")  # fmt: skip
    check_complete(tmp_path)


@pytest.mark.slow
def test_ray_on_a_cluster_that_is_running(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install 'scaling-lab[ray]'")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise the key in the user's home folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
         "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=2", "--disable-usage-stats"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        said = []
        while "Ray runtime started" not in (line := head.stdout.readline()):
            said.append(line)
            assert line, "".join(said)
        sweep(tmp_path, "hydra/launcher=ray", f"hydra.launcher.ray.init.address=127.0.0.1:{port}",
              "hydra.sweeper.runs_per_job=2")  # fmt: skip
    finally:
        head.terminate()
        head.communicate(timeout=60)
    check_complete(tmp_path)


def test_submitit_on_this_machine(tmp_path):
    pytest.importorskip("submitit", reason="pip install 'scaling-lab[slurm]'")
    out = sweep(tmp_path, "hydra/launcher=submitit_local", "hydra.sweeper.runs_per_job=4")
    check_complete(tmp_path)
    assert "1 job, 4 runs" in out
    assert len(list(tmp_path.glob("results/s/logs/job-*-worker-0.log"))) == 1


def test_slurm_without_slurm_is_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit", reason="pip install 'scaling-lab[slurm]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    # The README's options that hold lists and mappings pass Hydra's grammar and checks.
    options = [
        'hydra.launcher.setup=["module load cuda"]',
        "hydra.launcher.additional_parameters={mail-type: FAIL}",
    ]
    assert main(["sweep", *TINY, "hydra/launcher=submitit_slurm", *options]) == 2
    assert "needs Slurm's sbatch and squeue" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_launcher_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hydra_jobs, "extras", lambda: ("skein",))
    assert main(["sweep", *TINY, "hydra/launcher=skein"]) == 2
    error = capsys.readouterr().err
    assert "hydra/launcher=skein is not installed: pip install " in error
    assert "[skein]" in error
    assert main(["sweep", *TINY, "hydra/launcher=skeen"]) == 2
    assert "hydra/launcher='skeen' is not known" in capsys.readouterr().err


class Queue:
    """A cluster that takes arrays of three, 100 min and 2 GB."""

    title = "a queue"

    def array_size(self) -> int:
        return 3

    def limit(self, time_min, mem_gb):
        return min(time_min, 100), min(mem_gb, 2.0), None if time_min <= 100 and mem_gb <= 2 else "less"


def arrays(*seconds: float, request: JobRequest | None = None):
    jobs = [((f"r{k}",), JobNeeds(s, 1e9, True)) for k, s in enumerate(seconds)]
    return make_arrays(Queue(), jobs, request or JobRequest(), LineReporter(), "measured speeds")


def test_arrays_hold_jobs_of_similar_time_longest_first():
    made = arrays(100, 4000, 1000, 1100, 90, 80, 70)
    assert [[ids[0] for ids in a.jobs] for a in made] == [["r1", "r3", "r2"], ["r0", "r4", "r5"], ["r6"]]
    # Three times the longest estimate in whole minutes, at least ten and at most the partition's limit.
    assert [a.time_min for a in made] == [100, 10, 10]
    assert [a.mem_gb for a in made] == [1.5] * 3
    made = arrays(4000, 900, 100)
    assert [[ids[0] for ids in a.jobs] for a in made] == [["r0"], ["r1"], ["r2"]]
    assert made[1].time_min == 45
    mine = arrays(4000, 900, 100, request=JobRequest(time_min=7, mem_gb=0.5))
    assert [(len(a.jobs), a.time_min, a.mem_gb) for a in mine] == [(3, 7, 0.5)]


def test_a_job_needs_the_time_of_its_runs_and_the_memory_of_the_concurrent_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *TINY, "--quiet"]) == 0
    runs = RunStore("results/s").read_plan().runs
    one, four, two_by_two = job_needs(runs[:1]), job_needs(runs), job_needs(runs, workers=2)
    start = 5.0
    assert four.seconds - start == pytest.approx(sum(job_needs([r]).seconds - start for r in runs))
    assert two_by_two.seconds - start == pytest.approx((four.seconds - start) / 2)
    assert one.known
    assert two_by_two.host_bytes > four.host_bytes > 0.2e9
    from dataclasses import replace

    on_gpu = job_needs([replace(runs[0], execution=Execution("cuda"))])
    assert not on_gpu.known
    assert on_gpu.seconds > start


def test_slurms_output_is_parsed(monkeypatch):
    answers = {
        "squeue": "12|0|RUNNING|s-ab|None\n12|1|PENDING|s-ab|Resources\n12|2|CANCELLED|s-ab|None\n9|N/A|TIMEOUT|s-cd|TimeLimit\n",
        "sinfo": "debug*|1000|infinite\ngpu|250000+|2-01:00:00\ngpu|500000|2-01:00:00\n",
        "scontrol": "MaxArraySize            = 4001\n",
    }
    monkeypatch.setattr(slurm, "run_command", lambda *command: answers[command[0]])
    jobs = slurm.queue(["s-ab", "s-cd"])
    assert [(j.job_id, j.task, j.has_ended) for j in jobs] == [
        ("12_0", 0, False), ("12_1", 1, False), ("12_2", 2, True), ("9", 0, True),
    ]  # fmt: skip
    assert slurm.describe_queue(jobs) == "1 running, 1 pending (Resources)"
    assert slurm.max_array_size() == 4001
    assert slurm.partition_limits(None) == slurm.PartitionLimits(1000, None)
    answers["sinfo"] = "gpu|250000+|2-01:00:00\ngpu|500000|2-01:00:00\n"
    assert slurm.partition_limits("gpu") == slurm.PartitionLimits(500000, 49 * 60)
    assert slurm.minutes("30:00") == 30
    assert slurm.minutes("1:30:00") == 90


def test_runs_of_one_stack_stay_in_one_job():
    from types import SimpleNamespace

    names = ["a", None, None, "b", "a", "b", "b"]
    runs = [SimpleNamespace(run_id=f"r{k}", execution=SimpleNamespace(stack=s)) for k, s in enumerate(names)]
    pending = {r.run_id for r in runs} - {"r2"}
    assert group_into_jobs(runs, pending, 1) == (("r0", "r4"), ("r1",), ("r3", "r5", "r6"))
    assert group_into_jobs(runs, pending, 3) == (("r0", "r4", "r1"), ("r3", "r5", "r6"))


def test_the_reason_why_no_job_runs_is_printed_once(tmp_path, monkeypatch, capsys):
    """A job that asks for more than any node has waits forever: Slurm accepts it, and gives the reason only in its queue."""

    class Queue:
        title = "Slurm"

        def __init__(self) -> None:
            self.answers = [
                "",
                "1 pending (PartitionConfig)",
                "1 pending (PartitionConfig)",
                "1 pending (Priority)",
            ]

        def array_size(self):
            return 10

        def limit(self, time_min, mem_gb):
            return time_min, mem_gb, None

        def submit(self, array, jobs, folder):
            self.name = folder.name
            return "Slurm job 1"

        def active(self, names):
            words = self.answers.pop(0) if self.answers else ""
            return ({(self.name, 0)} if words else set()), words

        def ending(self, folder, task):
            return "Slurm job 1 is CANCELLED"

    for name in ("POLL_S", "QUEUE_FIRST_S"):
        monkeypatch.setattr(cluster, name, 0.01)
    planned = PlannedRun(spec(), Execution())
    plan = Plan("s", (planned,), spec().convention, "abc")
    jobs = SweepJobs(RunStore(tmp_path / "s"), plan, ((planned.run_id,),), {"kind": "none"}, LineReporter())
    cluster.launch_jobs(Queue(), jobs, JobRequest())
    waiting = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting ")]
    assert waiting == [
        "waiting in Slurm's queue: 1 pending (PartitionConfig)",
        "waiting in Slurm's queue: 1 pending (Priority)",
    ]


def test_a_job_that_left_the_queue_without_starting_is_not_called_pending(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="pip install 'scaling-lab[slurm]'")
    from scaling_lab.launching.submitit_backends import SlurmBackend

    monkeypatch.setattr(slurm, "check_commands", lambda: None)
    answers = ["12|0|RUNNING|s-ab|None\n12|1|PENDING|s-ab|Resources\n", "12|0|TIMEOUT|s-ab|TimeLimit\n"]
    monkeypatch.setattr(slurm, "run_command", lambda *command: answers.pop(0))
    backend = SlurmBackend({}, 1)
    backend.active(["s-ab"])
    assert backend.active(["s-ab"]) == (set(), "")
    assert backend.ending(tmp_path / "s-ab", 0).startswith(
        "Slurm job 12_0 is TIMEOUT (hydra.launcher.timeout_min"
    )
    assert (
        backend.ending(tmp_path / "s-ab", 1)
        == "Slurm job 12_1 left the queue (cancelled?), last seen PENDING"
    )
