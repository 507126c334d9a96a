"""Submitting jobs through submitit: to Slurm, and to processes of this machine."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import install_line
from scaling_lab.launching import slurm
from scaling_lab.launching.cluster import Array
from scaling_lab.launching.cluster_job import ClusterJob

# Submitit writes <id>_<task>_log.out and .err, the pickled job and its result into the folder of the submission log.
MAX_SIGNAL_DELAY_S = 120


def executor_class(kind: str) -> Any:
    """submitit's executor. Raises `UserError` if it is not installed."""
    try:
        from submitit.local.local import LocalExecutor
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise UserError(
            f"hydra/launcher=submitit_{kind} needs submitit ({error}): {install_line('slurm')}"
        ) from error
    # Its messages about polling are for programs that wait for return values.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    return SlurmExecutor if kind == "slurm" else LocalExecutor


class SlurmBackend:
    """Slurm job arrays."""

    title = "Slurm"

    def __init__(self, parameters: Mapping[str, Any], max_num_timeout: int) -> None:
        """`parameters`: sbatch's options by submitit's names, without time, memory and name."""
        slurm.check_commands()
        self._executor = executor_class("slurm")
        self.parameters, self.max_num_timeout = dict(parameters), max_num_timeout
        self._last: Mapping[tuple[str, int], slurm.QueuedJob] = {}

    def array_size(self) -> int:
        return slurm.max_array_size()

    def limit(self, time_min: int, mem_gb: float) -> tuple[int, float, str | None]:
        partition = self.parameters.get("partition")
        limits = slurm.partition_limits(partition)
        where = f"partition {partition}" if partition else "the default partition"
        why = []
        if limits.time_min is not None and time_min > limits.time_min:
            why.append(f"{time_min} min; {where} allows {limits.time_min} min")
            time_min = max(1, limits.time_min)
        # In submitit a GB is 1024 MB.
        if limits.memory_mb is not None and mem_gb * 1024 > limits.memory_mb:
            why.append(f"{mem_gb:g} GB; the nodes of {where} have {limits.memory_mb / 1024:.2g} GB")
            mem_gb = limits.memory_mb / 1024
        return (
            time_min,
            mem_gb,
            f"estimate above the limit, which is requested instead: {', '.join(why)}." if why else None,
        )

    def submit(self, array: Array, jobs: Sequence[ClusterJob], folder: Path) -> str:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        delay_s = min(MAX_SIGNAL_DELAY_S, 12 * array.time_min)
        options = {
            "signal_delay_s": delay_s,
            **self.parameters,
            "job_name": folder.name,
            "time": array.time_min,
        }
        if not {"mem_per_gpu", "mem_per_cpu"} & options.keys():
            options["mem"] = f"{int(array.mem_gb * 1024)}MB"
        try:
            executor = self._executor(folder, max_num_timeout=self.max_num_timeout)
            executor.update_parameters(**options)
            handles = executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as error:
            text = " ".join(str(error).replace("sbatch: error:", "").split()) or "no reason given"
            raise UserError(
                f"sbatch rejected the job: {text} (requested: {_requested(options)}; set these with hydra.launcher.NAME=VALUE)."
            ) from error
        except ValueError as error:
            raise UserError(f"hydra.launcher: {' '.join(str(error).split())[:300]}") from error
        return f"Slurm job {handles[0].job_id.partition('_')[0]}"

    def active(self, names: Sequence[str]) -> tuple[set[tuple[str, int]], str] | None:
        try:
            jobs = slurm.queue(names)
        except slurm.SlurmUnavailable:
            return None
        self._last = {**self._last, **slurm.by_task(jobs)}
        return {(job.name, job.task) for job in jobs if not job.has_ended}, slurm.describe_queue(jobs)

    def ending(self, folder: Path, index: int) -> str:
        job = self._last.get((folder.name, index))
        if job is None:
            return ""
        reason = error_line(folder / f"{job.job_id}_0_log.err")
        hint = {
            "TIMEOUT": " (hydra.launcher.timeout_min gives more time)",
            "OUT_OF_MEMORY": " (hydra.launcher.mem_gb gives more memory)",
        }.get(job.state, "")
        # A job that is cancelled before it starts disappears from the queue: its last known state is not how it ended.
        how = f"is {job.state}" if job.has_ended else f"left the queue (cancelled?), last seen {job.state}"
        return f"Slurm job {job.job_id} {how}{hint}{': ' + reason if reason else ''}"


# How the line of a job's log begins that says why it failed: bad input, or a job of an older version (`_moved.py`).
ERROR_PREFIXES = ("error: ", "ImportError: scaling_lab.")


def error_line(log: Path) -> str | None:
    """Why a job failed: the last line of its log that has one of `ERROR_PREFIXES`."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if line.startswith(ERROR_PREFIXES)), None)


def _requested(options: Mapping[str, Any]) -> str:
    ours = {"time": "timeout_min", "mem": "mem_gb"}
    return ", ".join(
        f"{ours.get(k, k)}={v}" for k, v in options.items() if k not in ("job_name", "additional_parameters")
    )


class LocalBackend:
    """Processes of this machine, `parallel` at a time: submitit without a cluster, to try out a sweep's jobs."""

    title = "submitit_local"

    def __init__(self, parallel: int, max_num_timeout: int) -> None:
        self._executor = executor_class("local")
        self.parallel, self.max_num_timeout = parallel, max_num_timeout
        self._waiting: deque[tuple[str, int, Any, Array]] = deque()
        self._running: dict[tuple[str, int], Any] = {}
        self._folders: dict[str, Path] = {}

    def array_size(self) -> int:
        return 1_000_000

    def limit(self, time_min: int, mem_gb: float) -> tuple[int, float, str | None]:
        return time_min, mem_gb, None

    def submit(self, array: Array, jobs: Sequence[ClusterJob], folder: Path) -> str:
        self._folders[folder.name] = folder
        self._waiting += [(folder.name, k, job, array) for k, job in enumerate(jobs)]
        return f"on this machine, {self.parallel} at a time"

    def active(self, names: Sequence[str]) -> tuple[set[tuple[str, int]], str]:
        self._running = {place: job for place, job in self._running.items() if not job.done()}
        while self._waiting and len(self._running) < self.parallel:
            name, task, job, array = self._waiting.popleft()
            executor = self._executor(self._folders[name], max_num_timeout=self.max_num_timeout)
            executor.update_parameters(
                timeout_min=array.time_min, signal_delay_s=min(MAX_SIGNAL_DELAY_S, 12 * array.time_min)
            )
            self._running[name, task] = executor.submit(job)
        waiting = {(name, task) for name, task, _, _ in self._waiting}
        return waiting | self._running.keys(), f"{len(self._running)} running, {len(waiting)} pending"

    def ending(self, folder: Path, index: int) -> str:
        logs = sorted(folder.glob("*_0_log.err"))
        return next((reason for log in reversed(logs) if (reason := error_line(log))), "")
