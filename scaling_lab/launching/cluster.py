"""A sweep's jobs on a cluster: their time and memory limits, arrays, the submission log, and waiting for them.

The process that submits and waits is called the head. It may die at any moment: the jobs keep running, and another head
reads the submission log and waits for the same jobs. What a job returned is never used; the records are.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_time
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.cluster_job import ClusterJob
from scaling_lab.launching.progress import LaunchReporter, SweepProgress
from scaling_lab.launching.sweeping import SweepJobs
from scaling_lab.launching.workers import terminate_as_interrupt
from scaling_lab.planning.cost import UNMEASURED, JobNeeds, Speeds, job_needs

# Folder of the submission log in a sweep's folder: a folder per submitted array.
JOB_LOG = "cluster"
# A shorter limit gains nothing from the scheduler and fails on slow nodes and cold file systems.
MIN_TIME_MIN = 10
# Jobs of one array share its limits: those whose estimated times are within this factor of each other form an array.
ARRAY_TIME_RANGE = 4.0
POLL_S = 1.0
# How often the queue is asked: at first, and later. Its controller serves many users.
QUEUE_FIRST_S, QUEUE_EVERY_S = 2.0, 15.0
# After so many answers without a job of ours the jobs are taken to be over: records written on other machines take a
# while to appear on a shared file system.
EMPTY_ANSWERS = 2
MAX_UNFINISHED_SHOWN = 10


@dataclass(frozen=True)
class JobRequest:
    """The limits and workers that the user asks for; None: estimated from the plan."""

    time_min: int | None = None
    mem_gb: float | None = None
    workers: int = 1
    time_factor: float = 3.0
    memory_factor: float = 1.5

    def __post_init__(self) -> None:
        for name, value in (
            ("timeout_min", self.time_min),
            ("mem_gb", self.mem_gb),
            ("workers", self.workers),
        ):
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise UserError(f"hydra.launcher.{name}={value!r} must be a positive number.")
        for name, factor in (("time_factor", self.time_factor), ("memory_factor", self.memory_factor)):
            if not (isinstance(factor, (int, float)) and factor >= 1):
                raise UserError(f"hydra.launcher.{name}={factor!r} must be a number of at least 1.")


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together, with the same limits."""

    jobs: tuple[tuple[str, ...], ...]
    """The run ids of each job."""
    time_min: int
    mem_gb: float
    estimate_s: float
    """Of the longest job."""


class Backend(Protocol):
    """Where jobs are submitted: Slurm, or processes of this machine."""

    title: str

    def array_size(self) -> int:
        """The most jobs that one array can have."""
        ...

    def limit(self, time_min: int, mem_gb: float) -> tuple[int, float, str | None]:
        """These limits cut to what can be asked for, and a message if they were cut."""
        ...

    def submit(self, array: Array, jobs: Sequence[ClusterJob], folder: Path) -> str:
        """Submit; returns the array's title for the user. Raises `UserError` with the reason of a rejection."""
        ...

    def active(self, names: Sequence[str]) -> tuple[set[tuple[str, int]], str] | None:
        """(array's name, index in it) of every job that is not over, and a description of the queue; None: no answer."""
        ...

    def ending(self, folder: Path, index: int) -> str:
        """How job `index` of the array in `folder` ended; empty if unknown."""
        ...


@dataclass
class SubmittedArray:
    """An entry of the submission log: the run ids of each job of an array. It is written before the array is submitted."""

    folder: Path
    jobs: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Also the jobs' name in the queue."""
        return self.folder.name

    @staticmethod
    def create(store: RunStore, prefix: str, jobs: Sequence[Sequence[str]]) -> SubmittedArray:
        """A new entry."""
        folder = store.folder.absolute() / JOB_LOG / f"{prefix}-{secrets.token_hex(4)}"
        array = SubmittedArray(folder, [list(job) for job in jobs])
        folder.mkdir(parents=True)
        write_atomic(folder / "jobs.json", json.dumps({"schema_version": 1, "jobs": array.jobs}))
        return array

    def delete(self) -> None:
        """Remove the entry of an array that was not accepted."""
        (self.folder / "jobs.json").unlink()

    @staticmethod
    def all_of(store: RunStore) -> list[SubmittedArray]:
        """The submission log of a sweep."""
        arrays = []
        for path in sorted((store.folder.absolute() / JOB_LOG).glob("*/jobs.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                jobs = json.loads(path.read_text(encoding="utf-8"))["jobs"]
                arrays.append(SubmittedArray(path.parent, jobs))
        return arrays


def launch_jobs(
    backend: Backend,
    jobs: SweepJobs,
    request: JobRequest,
    *,
    name: str | None = None,
    max_attempts: int = 3,
    speeds: Speeds = UNMEASURED,
    gpus: int = 1,
) -> None:
    """Submit jobs, without runs that jobs of an earlier head still hold, and wait until all are over.

    `speeds` and `gpus`, the GPUs of one job, decide the time limits. Raises `UserError` if the cluster rejects them, and `KeyboardInterrupt` when interrupted: the jobs keep running.
    """
    store, reporter = jobs.store, jobs.reporter
    runs = {run.run_id: run for run in jobs.plan.runs}
    wanted = [run_id for job in jobs.run_ids for run_id in job]
    head = Head(backend, store, [runs[i] for i in wanted], reporter)
    in_queue = head.runs_in_queue()
    remaining = [ids for job in jobs.run_ids if (ids := tuple(i for i in job if i not in in_queue))]
    if in_queue:
        reporter.say(
            f"{len(in_queue)} runs are in jobs that an earlier start of this sweep submitted: {head.queue}."
        )
    needs = [(ids, job_needs([runs[i] for i in ids], request.workers, speeds, gpus)) for ids in remaining]
    source = speeds.source([runs[i] for ids in remaining for i in ids]) if remaining else ""
    for array in make_arrays(backend, needs, request, reporter, source):
        work = [
            ClusterJob(
                str(store.folder.absolute()),
                ids,
                min(request.workers, len(ids)),
                max_attempts,
                dict(jobs.tracker),
            )
            for ids in array.jobs
        ]
        head.submit(array, work, name or store.folder.name)
    head.wait()


def make_arrays(
    backend: Backend,
    jobs: Sequence[tuple[tuple[str, ...], JobNeeds]],
    request: JobRequest,
    reporter: LaunchReporter,
    source: str,
) -> list[Array]:
    """Jobs, longest first, in arrays of similar times and of at most the cluster's size; `source` of the times, in words."""
    if not jobs:
        return []
    ordered = sorted(jobs, key=lambda job: (-job[1].seconds, job[0]))
    size, reasons = backend.array_size(), list[str]()
    groups: list[list[tuple[tuple[str, ...], JobNeeds]]] = []
    for job in ordered:
        if (
            not groups
            or len(groups[-1]) == size
            or (request.time_min is None and job[1].seconds * ARRAY_TIME_RANGE < groups[-1][0][1].seconds)
        ):
            groups.append([])
        groups[-1].append(job)
    arrays = []
    for group in groups:
        longest = group[0][1].seconds
        memory = max(needs.host_bytes for _, needs in group) * request.memory_factor / 1e9
        time_min, mem_gb, why = backend.limit(
            request.time_min or max(MIN_TIME_MIN, math.ceil(longest * request.time_factor / 60)),
            request.mem_gb or math.ceil(memory * 10) / 10,
        )
        reasons += [why] if why and why not in reasons else []
        arrays.append(Array(tuple(ids for ids, _ in group), time_min, mem_gb, longest))
    for why in reasons:
        reporter.say(why)
    if request.time_min is None:
        unknown = any(not needs.known for _, needs in jobs)
        advice = "; gpu=NAME (h100, a100, ...) gives a closer estimate" if unknown else ""
        reporter.say(
            f"time limits: {request.time_factor:g} times the plan's estimate (from {source}{advice}), at least {MIN_TIME_MIN} "
            "min; a job that reaches its limit is requeued and resumes from its checkpoints."
        )
    return arrays


class Head:
    """Submits the jobs of a sweep, or finds those of an earlier head, and waits for them."""

    def __init__(
        self, backend: Backend, store: RunStore, runs: Sequence[PlannedRun], reporter: LaunchReporter
    ) -> None:
        self.backend, self.store, self.reporter = backend, store, reporter
        self.progress = SweepProgress(store, runs)
        self.arrays = SubmittedArray.all_of(store)
        self.queue = ""
        """The queue's latest description."""
        self._rejected = False
        self._n_submitted = 0
        self._reported_queue = ""

    def runs_in_queue(self) -> set[str]:
        """Runs in jobs that are not over. Raises `UserError` if the queue does not answer: submitting regardless could
        put every run into it twice."""
        found = self._active_runs()
        if found is None:
            raise UserError(f"{self.backend.title} does not answer: try again in a minute.")
        return found

    def _active_runs(self) -> set[str] | None:
        open_ids = set(self.progress.open_ids())
        arrays = [a for a in self.arrays if any(open_ids.intersection(ids) for ids in a.jobs)]
        answer = self.backend.active([a.name for a in arrays])
        if answer is None:
            return None
        active, self.queue = answer
        return {
            i
            for a in arrays
            for k, ids in enumerate(a.jobs)
            if (a.name, k) in active
            for i in ids
            if i in open_ids
        }

    def submit(self, array: Array, work: Sequence[ClusterJob], prefix: str) -> None:
        """Submit one array. A rejection after others were accepted is a warning: those run, the rest is left for later."""
        if self._rejected:
            return
        entry = SubmittedArray.create(self.store, prefix, array.jobs)
        try:
            title = self.backend.submit(array, work, entry.folder)
        except UserError as error:
            entry.delete()
            if not self._n_submitted:
                raise
            self._rejected = True
            self.reporter.warn(f"the remaining jobs were not submitted: {error}")
            return
        self.arrays.append(entry)
        self._n_submitted += 1
        n, runs = len(array.jobs), sum(map(len, array.jobs))
        self.reporter.say(
            f"{title}: {n} job{'s' * (n > 1)}, {runs} run{'s' * (runs > 1)}; limits {array.time_min} min (estimate "
            f"{human_time(array.estimate_s)}) and {array.mem_gb:.2g} GB each; logs: {entry.folder}"
        )

    def wait(self) -> None:
        """Wait until every run has finished, or no run is in a job or being trained."""
        empty, next_question, began = 0, 0.0, time.monotonic()
        with terminate_as_interrupt(), self.reporter.display(self.store.folder.name) as display:
            try:
                while True:
                    self.progress.look()
                    display.show(self.progress)
                    if not self.progress.open_ids():
                        return
                    now = time.monotonic()
                    if now >= next_question:
                        active = self._active_runs()
                        quick = now - began < 10 * QUEUE_FIRST_S or empty
                        next_question = now + (QUEUE_FIRST_S if quick else QUEUE_EVERY_S)
                        if active is not None:
                            empty = 0 if active or self.progress.running() else empty + 1
                            self._report_waiting(bool(active))
                        if empty > EMPTY_ANSWERS:
                            break
                    time.sleep(POLL_S)
            except KeyboardInterrupt as interrupt:
                names = ",".join(array.name for array in self.arrays[-3:])
                raise type(interrupt)(
                    f"the jobs keep running ({self.queue or 'queue unknown'}); the same command waits for them again, "
                    f"`scancel --name={names}` cancels them"
                ) from None
        self._report_unfinished()

    def _report_waiting(self, active: bool) -> None:
        """Report why no job runs, in the queue's own words, whenever they change: some reasons never go away."""
        if (
            active
            and not self.progress.running()
            and "running" not in self.queue
            and self.queue != self._reported_queue
        ):
            self._reported_queue = self.queue
            self.reporter.say(f"waiting in {self.backend.title}'s queue: {self.queue}")

    def _report_unfinished(self) -> None:
        """Report why runs have not finished although no job is left."""
        unfinished = self.progress.open_ids()
        last = {i: (array, k) for array in self.arrays for k, ids in enumerate(array.jobs) for i in ids}
        for run_id in unfinished[:MAX_UNFINISHED_SHOWN]:
            if run_id in last:
                array, index = last[run_id]
                why = self.backend.ending(array.folder, index) or "its job has ended"
                self.reporter.warn(f"{run_id} has not finished: {why}; logs: {array.folder}")
        if len(unfinished) > MAX_UNFINISHED_SHOWN:
            self.reporter.warn(f"and {len(unfinished) - MAX_UNFINISHED_SHOWN} more runs have not finished.")
