"""Slurm's queue and limits, read with squeue, scontrol and sinfo.

No accounting (sacct) is needed: many small clusters have none, and squeue also lists jobs that ended recently.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from scaling_lab.core.errors import UserError

COMMAND_TIMEOUT_S = 60.0
# Slurm's default, used if `scontrol show config` does not answer: indices 0 to 1000.
DEFAULT_MAX_ARRAY_SIZE = 1001
# States from which a job does not run again by itself (squeue(1), "JOB STATE CODES"). A job that was preempted, or
# whose node failed, is shown as pending once it has been requeued.
ENDED_STATES = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one task of an array, as squeue shows it."""

    name: str
    task: int
    job_id: str
    """12, or 12_3 for a task of an array: what scancel takes."""
    state: str
    reason: str

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED_STATES


class SlurmUnavailable(RuntimeError):
    """A Slurm command failed: the controller may be busy or down, which does not affect the jobs."""


def check_commands() -> None:
    """Raise `UserError` if this machine cannot submit jobs."""
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm needs Slurm's sbatch and squeue on this machine: start the sweep on a login "
            "node of the cluster, or omit hydra/launcher to train on this machine."
        )


def run_command(*command: str) -> str:
    """The output of a Slurm command. Raises `SlurmUnavailable`."""
    # The user's own formats and filters would change the output of squeue and sinfo.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SINFO_"))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=variables, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmUnavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmUnavailable(
            f"{command[0]}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]}"
        )
    return done.stdout


def queue(names: Collection[str]) -> list[QueuedJob]:
    """Every job with one of these names that is queued, running or ended recently. Raises `SlurmUnavailable`."""
    if not names:
        return []
    # -r: one line per task of an array.
    text = run_command(
        "squeue", "-h", "-r", "-t", "all", f"--name={','.join(sorted(names))}", "-o", "%F|%K|%T|%j|%r"
    )
    found = []
    for line in text.splitlines():
        array, task, state, name, reason = line.strip().split("|", 4)
        single = not task.isdecimal()
        found.append(
            QueuedJob(name, 0 if single else int(task), array if single else f"{array}_{task}", state, reason)
        )
    return found


def max_array_size() -> int:
    """The most tasks that an array of this cluster can have."""
    try:
        match = re.search(
            r"^MaxArraySize\s*=\s*(\d+)", run_command("scontrol", "show", "config"), re.MULTILINE
        )
    except SlurmUnavailable:
        match = None
    return max(1, int(match[1])) if match else DEFAULT_MAX_ARRAY_SIZE


@dataclass(frozen=True)
class PartitionLimits:
    """The largest memory and time of a partition; None: unknown, or no limit."""

    memory_mb: int | None = None
    time_min: int | None = None


def partition_limits(partition: str | None) -> PartitionLimits:
    """The limits of a partition, or of the default one."""
    try:
        text = run_command(
            "sinfo", "-h", "-o", "%P|%m|%l", *([f"--partition={partition}"] if partition else [])
        )
    except SlurmUnavailable:
        return PartitionLimits()
    rows = [line.strip().split("|") for line in text.splitlines() if line.count("|") == 2]
    if not partition:
        rows = [row for row in rows if row[0].endswith("*")] or rows
    memory = [int(m[0]) for row in rows if (m := re.match(r"\d+", row[1]))]
    times = [t for row in rows if (t := minutes(row[2])) is not None]
    return PartitionLimits(max(memory, default=None), max(times, default=None))


def minutes(text: str) -> int | None:
    """Slurm's `days-hours:minutes:seconds` (and its shorter forms as sinfo prints them) in minutes; None: no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + mins


def was_preempted(job_id: str) -> bool:
    """Whether a running job is being preempted."""
    try:
        return (
            re.search(r"\bPreemptTime=\d", run_command("scontrol", "show", "job", "-o", job_id)) is not None
        )
    except SlurmUnavailable:
        return False


def describe_queue(jobs: Collection[QueuedJob]) -> str:
    """`2 running, 5 pending (Resources, Priority)` for the jobs that have not ended."""
    counts: dict[str, int] = {}
    for job in jobs:
        if not job.has_ended:
            counts[job.state] = counts.get(job.state, 0) + 1
    reasons = sorted({j.reason for j in jobs if j.state == "PENDING" and j.reason not in ("None", "")})
    parts = [f"{n} {state.lower()}" for state, n in sorted(counts.items(), key=lambda item: -item[1])]
    return ", ".join(parts) + (f" ({', '.join(reasons[:3])})" if reasons else "")


def by_task(jobs: Collection[QueuedJob]) -> Mapping[tuple[str, int], QueuedJob]:
    """(name, task) -> job. Of two jobs with the same name and task (a resubmitted array), the one that has not ended."""
    found: dict[tuple[str, int], QueuedJob] = {}
    for job in sorted(jobs, key=lambda job: not job.has_ended):
        found[job.name, job.task] = job
    return found
