"""Owns a sweep's work on a cluster, as its head sees it: what to ask for, arrays, the book of what was submitted, and
waiting until the records say that all is over or nothing is left in the queue.

The head may die at any moment: the jobs go on, and a second head reads the books and waits for the same jobs. A job's
return value is never looked at.
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
from scaling_lab.planning.cost import JobNeeds, job_needs

BOOKS = "cluster"
# A limit below this gains nothing from the scheduler and loses to slow nodes and cold file systems.
MIN_TIME_MIN = 10
# Jobs of one array share its limits: those whose times lie within this factor of each other go into one.
ARRAY_TIME_RANGE = 4.0
LOOK_S = 1.0
# The first questions to the queue come quickly, later ones at this distance: its controller serves many users.
QUEUE_FIRST_S, QUEUE_EVERY_S = 2.0, 15.0
# The queue has to be empty of our jobs in so many answers, this far apart: records of other machines take a while to
# appear on a shared file system.
EMPTY_ANSWERS = 2
MAX_LOST_SHOWN = 10


@dataclass(frozen=True)
class Wishes:
    """What the user says about jobs; None: decided here."""

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
    """Where jobs go: Slurm, or processes of this machine."""

    title: str

    def array_size(self) -> int: ...
    def limit(self, time_min: int, mem_gb: float) -> tuple[int, float, str | None]:
        """What of it can be asked for here, and why it is less."""
        ...

    def submit(self, array: Array, jobs: Sequence[ClusterJob], folder: Path) -> str:
        """Submit; returns what the user calls the array. Raises `UserError` with the reason of a refusal."""
        ...

    def active(self, names: Sequence[str]) -> tuple[set[tuple[str, int]], str] | None:
        """(array's name, number in it) of every job that is not over, and the queue in words; None: no answer."""
        ...

    def fate(self, folder: Path, task: int) -> str:
        """How a job of the array in `folder` ended, as far as is known."""
        ...


@dataclass
class Book:
    """One submitted array: which runs each of its jobs was handed. Written before it is submitted."""

    folder: Path
    jobs: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Also the jobs' name in the queue."""
        return self.folder.name

    @staticmethod
    def open_new(store: RunStore, prefix: str, jobs: Sequence[Sequence[str]]) -> Book:
        book = Book(
            store.folder.absolute() / BOOKS / f"{prefix}-{secrets.token_hex(4)}", [list(j) for j in jobs]
        )
        book.folder.mkdir(parents=True)
        write_atomic(book.folder / "jobs.json", json.dumps({"schema_version": 1, "jobs": book.jobs}))
        return book

    @staticmethod
    def all_of(store: RunStore) -> list[Book]:
        books = []
        for path in sorted((store.folder.absolute() / BOOKS).glob("*/jobs.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                books.append(Book(path.parent, json.loads(path.read_text(encoding="utf-8"))["jobs"]))
        return books


def launch_jobs(
    backend: Backend, jobs: SweepJobs, wishes: Wishes, *, name: str | None = None, max_attempts: int = 3
) -> None:
    """Submit jobs, less the runs that an earlier head's jobs still hold, and wait.

    Raises `UserError` where the cluster refuses, and `KeyboardInterrupt` when told to stop: the jobs go on.
    """
    store, reporter = jobs.store, jobs.reporter
    runs = {run.run_id: run for run in jobs.plan.runs}
    wanted = [run_id for job in jobs.run_ids for run_id in job]
    head = Head(backend, store, [runs[i] for i in wanted], reporter)
    held = head.held_runs()
    left = [ids for job in jobs.run_ids if (ids := tuple(i for i in job if i not in held))]
    if held:
        reporter.say(
            f"{len(held)} runs are in jobs that an earlier start of this sweep submitted: {head.words}."
        )
    arrays = make_arrays(
        backend, [(ids, job_needs([runs[i] for i in ids], wishes.workers)) for ids in left], wishes, reporter
    )
    for array in arrays:
        work = [
            ClusterJob(
                str(store.folder.absolute()),
                ids,
                min(wishes.workers, len(ids)),
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
    wishes: Wishes,
    reporter: LaunchReporter,
) -> list[Array]:
    """Jobs, longest first, in arrays of like time and of at most the cluster's size."""
    if not jobs:
        return []
    ordered = sorted(jobs, key=lambda job: (-job[1].seconds, job[0]))
    size, reasons = backend.array_size(), list[str]()
    groups: list[list[tuple[tuple[str, ...], JobNeeds]]] = []
    for job in ordered:
        if (
            not groups
            or len(groups[-1]) == size
            or (wishes.time_min is None and job[1].seconds * ARRAY_TIME_RANGE < groups[-1][0][1].seconds)
        ):
            groups.append([])
        groups[-1].append(job)
    arrays = []
    for group in groups:
        longest = group[0][1].seconds
        memory = max(needs.host_bytes for _, needs in group) * wishes.memory_factor / 1e9
        time_min, mem_gb, why = backend.limit(
            wishes.time_min or max(MIN_TIME_MIN, math.ceil(longest * wishes.time_factor / 60)),
            wishes.mem_gb or math.ceil(memory * 10) / 10,
        )
        reasons += [why] if why and why not in reasons else []
        arrays.append(Array(tuple(ids for ids, _ in group), time_min, mem_gb, longest))
    for why in reasons:
        reporter.say(why)
    if wishes.time_min is None:
        guess = (
            "" if all(needs.known for _, needs in jobs) else " (speeds assumed, not measured, on this device)"
        )
        reporter.say(
            f"time limits: {wishes.time_factor:g} times the plan's estimate{guess}, at least {MIN_TIME_MIN} min; a job "
            "that runs out of time goes back into the queue and on from its checkpoints."
        )
    return arrays


class Head:
    """The process that submitted, or came back, and waits."""

    def __init__(
        self, backend: Backend, store: RunStore, runs: Sequence[PlannedRun], reporter: LaunchReporter
    ) -> None:
        self.backend, self.store, self.reporter = backend, store, reporter
        self.progress = SweepProgress(store, runs)
        self.books = Book.all_of(store)
        self.words = ""
        self.refused: str | None = None

    def held_runs(self) -> set[str]:
        """Runs in jobs that are not over. Raises `UserError` where the queue cannot be asked: submitting without knowing
        would put everything into it twice."""
        held = self._active_runs()
        if held is None:
            raise UserError(f"{self.backend.title} does not answer: try again in a minute.")
        return held

    def _active_runs(self) -> set[str] | None:
        open_ids = set(self.progress.open_ids())
        books = [b for b in self.books if any(open_ids.intersection(ids) for ids in b.jobs)]
        answer = self.backend.active([b.name for b in books])
        if answer is None:
            return None
        places, self.words = answer
        return {
            i
            for b in books
            for k, ids in enumerate(b.jobs)
            if (b.name, k) in places
            for i in ids
            if i in open_ids
        }

    def submit(self, array: Array, work: Sequence[ClusterJob], prefix: str) -> None:
        """One array. A refusal after others were accepted is a warning: those go on, the rest another time."""
        if self.refused:
            return
        book = Book.open_new(self.store, prefix, array.jobs)
        try:
            title = self.backend.submit(array, work, book.folder)
        except UserError as error:
            (book.folder / "jobs.json").unlink()
            if not self._mine:
                raise
            self.refused = str(error)
            self.reporter.warn(f"the rest was not submitted: {error}")
            return
        self.books.append(book)
        self._mine += 1
        n, runs = len(array.jobs), sum(map(len, array.jobs))
        self.reporter.say(
            f"{title}: {n} job{'s' * (n > 1)}, {runs} run{'s' * (runs > 1)}; limits {array.time_min} min (estimate "
            f"{human_time(array.estimate_s)}) and {array.mem_gb:.2g} GB each; logs: {book.folder}"
        )

    _mine = 0
    _said = ""

    def wait(self) -> None:
        """Until every run is over, or none of them is in a job or computed by anybody."""
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
                            self._say_waiting(bool(active))
                        if empty > EMPTY_ANSWERS:
                            break
                    time.sleep(LOOK_S)
            except KeyboardInterrupt as told:
                raise type(told)(
                    f"the jobs go on ({self.words or 'queue not known'}); the same command watches them again, "
                    f"`scancel --name={','.join(b.name for b in self.books[-3:])}` cancels them"
                ) from None
        self._say_lost()

    def _say_waiting(self, active: bool) -> None:
        """Why no job runs, in the queue's own words, as often as they change: some reasons never go away by themselves."""
        if (
            active
            and not self.progress.running()
            and "running" not in self.words
            and self.words != self._said
        ):
            self._said = self.words
            self.reporter.say(f"waiting in {self.backend.title}'s queue: {self.words}")

    def _say_lost(self) -> None:
        """Why runs are not over though no job is left."""
        lost = self.progress.open_ids()
        last = {i: (book, k) for book in self.books for k, ids in enumerate(book.jobs) for i in ids}
        for run_id in lost[:MAX_LOST_SHOWN]:
            if run_id in last:
                book, task = last[run_id]
                fate = self.backend.fate(book.folder, task)
                self.reporter.warn(
                    f"{run_id} is not over: {fate or 'its job has ended'}; logs: {book.folder}"
                )
        if len(lost) > MAX_LOST_SHOWN:
            self.reporter.warn(f"and {len(lost) - MAX_LOST_SHOWN} more runs are not over.")
