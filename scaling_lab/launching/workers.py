"""Owns the local launcher's work: start worker processes, watch them, start them again, and stop them together.

What a worker did is read from the run folders (claims and records), never from the worker: one that was killed says
nothing. Each worker's output goes to <sweep>/logs/worker-<k>.log, below a cluster to <job>-worker-<k>.log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from scaling_lab.core.errors import DiskError, Preempted, UserError
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.files import disk_error
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.progress import LaunchReporter, ProgressDisplay, SweepProgress
from scaling_lab.launching.sweeping import go_on_hint
from scaling_lab.planning.cost import device_bytes

POLL_S = 0.25
STATES_EVERY_S = 1.0
# A worker stops between two blocks of steps; a compilation in progress may hold it up.
STOP_GRACE_S = 30.0
# Workers that end without having begun a run, one after another: something is wrong with all of them.
MAX_FRUITLESS = 3
EXIT_USER, EXIT_DISK, EXIT_REQUEUE = 2, 74, 75
# An argument may have at most 128 KiB on Linux; longer lists of ids are not passed (the plan's pending runs are).
MAX_ARGUMENT_BYTES = 100_000
# Several small models fit one GPU and hide each other's launch latency; each needs a CPU core to feed it.
MAX_WORKERS_PER_GPU = 4


@dataclass
class Worker:
    """One worker process in its slot."""

    slot: int
    process: subprocess.Popen[bytes]
    log: Path
    file: IO[bytes] = field(repr=False)


def run_workers(
    store: RunStore,
    plan: Plan,
    run_ids: Sequence[str],
    reporter: LaunchReporter,
    *,
    workers: int | None = None,
    max_attempts: int = 3,
    tracker: Mapping[str, Any] | None = None,
    stop: threading.Event | None = None,
    leave_others: bool = False,
    log_prefix: str = "",
) -> None:
    """Train `run_ids` with worker processes side by side; returns when each has a record or is lost to nobody.

    Runs that another process computes are waited for, and taken over if it dies. With `leave_others` they are left to
    it as soon as it has been seen to live. Setting `stop` ends the work as Ctrl-C does. Raises `UserError` where workers
    cannot start, and `KeyboardInterrupt` with a hint after the workers were stopped.
    """
    for name, value in (("workers", workers), ("hydra.launcher.max_attempts", max_attempts)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise UserError(f"{name}={value!r} must be a whole number of at least 1.")
    wanted = set(run_ids)
    runs = [run for run in plan.runs if run.run_id in wanted]
    if not runs:
        return
    largest = max(map(device_bytes, runs)) if workers is None and runs[0].execution.device == "cuda" else 0.0
    slots = worker_slots(runs[0].execution, workers, len(runs), largest)
    reporter.say(
        f"{len(runs)} runs on {len(slots)} worker{'s' * (len(slots) > 1)} ({runs[0].execution.device}); logs: {store.folder / 'logs'}"
    )
    crew = Crew(store, plan, runs, slots, max_attempts, tracker, stop, leave_others, log_prefix)
    with terminate_as_interrupt(), reporter.display(store.folder.name) as display:
        try:
            crew.work(display)
        except KeyboardInterrupt as told:
            crew.stop()
            raise type(told)(go_on_hint(store)) from None
        except BaseException:
            crew.stop()
            raise


def worker_slots(
    execution: Execution, workers: int | None, n_runs: int, largest_bytes: float = 0.0
) -> list[dict[str, str]]:
    """The environment of each worker: one a core (of the plan's threads) on a CPU, spread over the GPUs on CUDA, on each
    as many as runs of `largest_bytes` fit beside each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {
        name: str(execution.threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    }
    if execution.device == "cuda":
        devices = visible_gpus()
        fitting = (
            int(min(MAX_WORKERS_PER_GPU, gpu_bytes() / largest_bytes))
            if largest_bytes
            else MAX_WORKERS_PER_GPU
        )
        count = workers or len(devices) * max(1, min(MAX_WORKERS_PER_GPU, fitting, cores // len(devices)))
        return [
            {**threads, "CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} for k in range(min(count, n_runs))
        ]
    # One MPS device is shared; two workers on it gain nothing.
    count = workers or (1 if execution.device == "mps" else max(1, cores // execution.threads))
    return [dict(threads) for _ in range(min(count, n_runs))]


def gpu_bytes() -> float:
    """Memory of the smallest GPU that this process may use; no limit where there is none to ask."""
    import torch

    sizes = [torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())]
    return float(min(sizes, default=float("inf")))


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(k) for k in range(torch.cuda.device_count())] or ["0"]


class Crew:
    """The workers of one launch."""

    def __init__(
        self,
        store: RunStore,
        plan: Plan,
        runs: Sequence[PlannedRun],
        slots: Sequence[Mapping[str, str]],
        max_attempts: int,
        tracker: Mapping[str, Any] | None,
        stop: threading.Event | None = None,
        leave_others: bool = False,
        log_prefix: str = "",
    ) -> None:
        self.store, self.plan, self.slots = store, plan, slots
        self.stop_asked, self.leave_others = stop or threading.Event(), leave_others
        self.log_prefix = log_prefix
        self.first_seen: dict[str, tuple[int, float]] = {}
        self.runs = {run.run_id: run for run in runs}
        self.max_attempts, self.tracker = max_attempts, tracker
        self.progress = SweepProgress(store, runs)
        self.workers: dict[int, Worker] = {}
        self.deaths: Counter[str] = Counter()
        self.fruitless = 0
        self.not_before = 0.0

    def work(self, display: ProgressDisplay) -> None:
        """Until every run is over."""
        next_look = 0.0
        while True:
            self._reap()
            now = time.monotonic()
            if now >= next_look:
                self.progress.look()
                display.show(self.progress)
                # A look at thousands of open runs takes a while: at most a fifth of the time is spent looking.
                next_look = now + max(STATES_EVERY_S, 5 * (time.monotonic() - now))
                if not self.progress.open_ids() or (self.leave_others and self._rest_is_others()):
                    break
                if now >= self.not_before:
                    self._fill()
            if self.stop_asked.wait(POLL_S):
                raise KeyboardInterrupt
        for worker in self.workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=STOP_GRACE_S)
        self.stop()

    def _rest_is_others(self) -> bool:
        """Whether every run that is left is computed elsewhere, by owners that have been seen to live: a heartbeat came
        since they were first looked at. One that stays silent may be this job's former self on another machine."""
        if self.workers or self.progress.claimable_ids():
            return False
        moved = []
        for state in self.progress.running():
            if state.claim is not None:
                beat = (state.claim.generation, state.claim.heartbeat_unix_s)
                moved.append(self.first_seen.setdefault(state.run_id, beat) != beat)
        return all(moved)

    def _fill(self) -> None:
        """Start workers in the free slots as long as there are runs for them."""
        free = self.progress.claimable_ids()
        # A worker that is just starting has claimed nothing yet: it will take one of the free runs.
        idle = sum(1 for w in self.workers.values() if not self.progress.claimed_by(w.process.pid))
        for slot in range(len(self.slots)):
            if slot not in self.workers and len(free) > idle:
                self.workers[slot] = self._start(slot)
                idle += 1

    def _start(self, slot: int) -> Worker:
        log = self.store.folder / "logs" / f"{self.log_prefix}worker-{slot}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # -P: Python would look into the working folder first, and a clone there, a folder named scaling_lab, hides the package
        # of an editable installation.
        command = [sys.executable, "-P", "-m", "scaling_lab.worker", str(self.store.folder)]
        command += ["--stop-with", str(os.getpid())]
        ids = ",".join(self.progress.open_ids())
        if len(ids) < MAX_ARGUMENT_BYTES:
            command += ["--run-ids", ids]
        if self.tracker:
            command += ["--tracker", json.dumps(dict(self.tracker))]
        file = open(log, "ab")  # noqa: SIM115  closed when the worker is reaped or stopped
        # A session of its own: Ctrl-C comes to us alone, and we stop the workers in good order.
        process = subprocess.Popen(
            command,
            env={**os.environ, **self.slots[slot]},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Worker(slot, process, log, file)

    def _reap(self) -> None:
        for slot, worker in list(self.workers.items()):
            status = worker.process.poll()
            if status is None:
                continue
            del self.workers[slot]
            worker.file.close()
            self._judge(worker, status)

    def _judge(self, worker: Worker, status: int) -> None:
        """What the end of a worker means for the run that it held."""
        self.progress.look()
        if status == EXIT_DISK:
            # What it said does not reach a log on a full disk.
            raise self._disk_error(worker)
        if status == EXIT_USER:
            raise UserError(_last_error(worker.log) or f"a worker refused its input: see {worker.log}.")
        held = [i for i in self.progress.last_claimed_by(worker.process.pid) if i in self.progress.open_ids()]
        if status == 0 or (status == EXIT_REQUEUE and held):
            self.fruitless = 0 if held or not self.progress.claimable_ids() else self.fruitless + 1
        elif held:
            self.fruitless = 0
            for run_id in held:
                self.deaths[run_id] += 1
                if self.deaths[run_id] >= self.max_attempts:
                    self._give_up(run_id, worker, status)
        else:
            self.fruitless += 1
        if self.fruitless >= MAX_FRUITLESS:
            raise UserError(
                f"workers end before they begin a run ({_ending(status)}): {_last_line(worker.log)} (log: {worker.log})."
            )
        self.not_before = time.monotonic() + 0.5 * 2**self.fruitless * bool(self.fruitless)

    def _disk_error(self, worker: Worker) -> DiskError:
        said = _last_error(worker.log)
        if said is not None:
            return DiskError(said)
        refused = disk_error(OSError(errno.ENOSPC, "no space left"), self.store.folder)
        assert refused is not None
        return refused

    def _give_up(self, run_id: str, worker: Worker, status: int) -> None:
        """Record a run as failed whose worker died again and again."""
        from scaling_lab.launching.worker import failed_record

        planned = self.runs[run_id]
        claim = self.store.claim(planned.spec)
        if claim is None:
            return
        reason = (
            f"its worker died {self.deaths[run_id]} times (the last: {_ending(status)}; log: {worker.log})"
        )
        self.store.write_record(failed_record(planned, self.store, self.plan.data_fingerprint, reason))
        self.progress.look()

    def stop(self) -> None:
        """Ask every worker to stop, wait, and end those that do not; a second Ctrl-C does not wait."""
        live = [w for w in self.workers.values() if w.process.poll() is None]
        for worker in live:
            _signal(worker, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        try:
            for worker in live:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            for worker in live:
                if worker.process.poll() is None:
                    _signal(worker, signal.SIGKILL)
                    worker.process.wait()
            for worker in self.workers.values():
                worker.file.close()
            self.workers.clear()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within it SIGTERM, SIGUSR1 and SIGHUP end the sweep as Ctrl-C does, so that no worker outlives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise Preempted if number != signal.SIGHUP else KeyboardInterrupt

    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(worker: Worker, number: int) -> None:
    """To the worker's whole group: compilers that it started end with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, number)


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"{name}, as when memory runs out" if name == "SIGKILL" else name


def _tail(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip()]


def _last_line(log: Path) -> str:
    return (_tail(log) or ["it said nothing"])[-1]


def _last_error(log: Path) -> str | None:
    found = [line.removeprefix("error: ") for line in _tail(log) if line.startswith("error: ")]
    return found[-1] if found else None
