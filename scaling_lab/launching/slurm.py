"""Owns what Slurm says: its queue and its limits, asked with squeue, scontrol and sinfo.

Nothing here needs accounting (sacct): many small clusters have none, and squeue also knows the jobs that ended lately.
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
# Slurm's default, where `scontrol show config` does not say: indices 0 to 1000.
DEFAULT_MAX_ARRAY_SIZE = 1001
# States in which a job will not run again without anybody's doing (squeue(1), "JOB STATE CODES"). A job that was
# preempted, or whose node failed, is shown as pending once it is in the queue again.
OVER = frozenset(
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
    def is_over(self) -> bool:
        return self.state in OVER


class SlurmSilent(RuntimeError):
    """A Slurm command did not answer: the controller may be busy or down, the jobs go on."""


def check_commands() -> None:
    """Raise `UserError` where this machine cannot submit."""
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm needs Slurm's sbatch and squeue on this machine: start the sweep on a login "
            "node of the cluster, or leave hydra/launcher out to train on this machine."
        )


def ask(*command: str) -> str:
    """The output of a Slurm command. Raises `SlurmSilent`."""
    # A user's own output format or filters would change what squeue and sinfo print.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SINFO_"))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmSilent(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmSilent(f"{command[0]}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]}")
    return done.stdout


def queue(names: Collection[str]) -> list[QueuedJob]:
    """Every job with one of these names that is queued, running or ended lately. Raises `SlurmSilent`."""
    if not names:
        return []
    # -r: one line a task of an array.
    text = ask("squeue", "-h", "-r", "-t", "all", f"--name={','.join(sorted(names))}", "-o", "%F|%K|%T|%j|%r")
    found = []
    for line in text.splitlines():
        array, task, state, name, reason = line.strip().split("|", 4)
        single = not task.isdecimal()
        found.append(
            QueuedJob(name, 0 if single else int(task), array if single else f"{array}_{task}", state, reason)
        )
    return found


def max_array_size() -> int:
    """How many tasks an array of this cluster may have."""
    try:
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    except SlurmSilent:
        match = None
    return max(1, int(match[1])) if match else DEFAULT_MAX_ARRAY_SIZE


@dataclass(frozen=True)
class PartitionLimits:
    """What the nodes of a partition can give at most; None: not known, or no limit."""

    memory_mb: int | None = None
    time_min: int | None = None


def partition_limits(partition: str | None) -> PartitionLimits:
    """The limits of a partition, or of the default one."""
    try:
        text = ask("sinfo", "-h", "-o", "%P|%m|%l", *([f"--partition={partition}"] if partition else []))
    except SlurmSilent:
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
    """Whether a running job has been told to make room for another one."""
    try:
        return re.search(r"\bPreemptTime=\d", ask("scontrol", "show", "job", "-o", job_id)) is not None
    except SlurmSilent:
        return False


def in_words(jobs: Collection[QueuedJob]) -> str:
    """`2 running, 5 pending (Resources, Priority)` of the jobs that are not over."""
    counts: dict[str, int] = {}
    for job in jobs:
        if not job.is_over:
            counts[job.state] = counts.get(job.state, 0) + 1
    reasons = sorted({j.reason for j in jobs if j.state == "PENDING" and j.reason not in ("None", "")})
    parts = [f"{n} {state.lower()}" for state, n in sorted(counts.items(), key=lambda item: -item[1])]
    return ", ".join(parts) + (f" ({', '.join(reasons[:3])})" if reasons else "")


def by_place(jobs: Collection[QueuedJob]) -> Mapping[tuple[str, int], QueuedJob]:
    """(name, task) -> job. Of two with one place (an array that was submitted again), the one that is not over."""
    found: dict[tuple[str, int], QueuedJob] = {}
    for job in sorted(jobs, key=lambda job: not job.is_over):
        found[job.name, job.task] = job
    return found
