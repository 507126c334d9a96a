"""Worker processes on one machine: start them, watch them, start them again when they die, and stop them together.

What a worker has done is read from the run folders (claims and records), never from the worker: one that was killed
reports nothing. Worker k logs to <sweep>/logs/worker-<k>.log, in a cluster job to <sweep>/logs/<job>-worker-<k>.log.
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

from scaling_lab.core.errors import EXIT_REQUEUE, DiskError, Preempted, UserError
from scaling_lab.core.spec import Plan, PlannedRun
from scaling_lab.core.storage.files import disk_error
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.gpu_sharing import MPS_CONTROL, GpuSharing, find_gpu_sharing, n_programs
from scaling_lab.launching.progress import LaunchReporter, ProgressDisplay, SweepProgress
from scaling_lab.launching.sweeping import resume_hint
from scaling_lab.planning.cost import device_bytes
from scaling_lab.planning.execution import usable_cores

POLL_S = 0.25
STATES_EVERY_S = 1.0
# A worker stops between two blocks of steps; a compilation in progress may delay it.
STOP_GRACE_S = 30.0
# So many workers in a row that exit without starting a run: the cause affects all of them.
MAX_FAILED_STARTS = 3
EXIT_USER, EXIT_DISK = 2, 74
# Linux limits an argument to 128 KiB; longer lists of ids are not passed, and the worker takes the plan's pending runs.
MAX_ARGUMENT_BYTES = 100_000
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# Processes that torch.compile starts in each worker; by default one per core, up to 32.
COMPILE_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"


@dataclass
class Worker:
    """One worker process."""

    index: int
    """Its place among the workers, which decides its environment and its log."""
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
    """Train `run_ids` with worker processes; returns when each run has a record.

    Args:
        workers: processes at a time; None decides by the device (`worker_environments`).
        max_attempts: a run whose worker dies this often is recorded as failed.
        tracker: `kind` and the tracker's options.
        stop: setting it ends the call as Ctrl-C does.
        leave_others: whether runs that another live process trains are left to it. Otherwise they are waited for, and
            taken over if that process dies.

    Raises:
        UserError: workers cannot start.
        KeyboardInterrupt: interrupted; the workers have stopped, and the message says how to resume.
    """
    for name, value in (("workers", workers), ("hydra.launcher.max_attempts", max_attempts)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise UserError(f"{name}={value!r} must be a whole number of at least 1.")
    wanted = set(run_ids)
    runs = [run for run in plan.runs if run.run_id in wanted]
    if not runs:
        return
    refuse_missing_device(plan.sweep, runs[0].execution.device)
    on_cuda = runs[0].execution.device == "cuda"
    sharing = find_gpu_sharing() if on_cuda else None
    environments = worker_environments(runs, workers, sharing)
    plural = "s" * (len(environments) > 1)
    device = f"cuda; {sharing.describe()}" if sharing else runs[0].execution.device
    reporter.say(
        f"{len(runs)} runs on {len(environments)} worker{plural} ({device}); logs: {store.folder / 'logs'}"
    )
    pool = WorkerPool(store, plan, runs, environments, max_attempts, tracker, stop, leave_others, log_prefix)
    with terminate_as_interrupt(), reporter.display(store.folder.name) as display:
        try:
            pool.run(display)
        except KeyboardInterrupt as interrupt:
            pool.stop()
            raise type(interrupt)(resume_hint(store)) from None
        except BaseException:
            pool.stop()
            raise


def worker_environments(
    runs: Sequence[PlannedRun], workers: int | None, sharing: GpuSharing | None = None
) -> list[dict[str, str]]:
    """Environment variables of each worker that trains `runs`.

    By default one worker per CPU core, divided by the plan's threads; on CUDA as many on each GPU as `sharing` (needed there)
    advises, the largest run fits in its memory, and there are cores to feed them. The compiler's processes of all workers
    together are as many as the cores.

    Raises:
        UserError: more workers than exclusive mode allows.
    """
    execution, cores = runs[0].execution, usable_cores()
    threads = dict.fromkeys(THREAD_VARIABLES, str(execution.threads))
    if execution.device == "cuda":
        assert sharing is not None
        devices = visible_gpus()
        most = sharing.max_workers and sharing.max_workers * len(devices)
        if workers and most and workers > most:
            raise UserError(
                f"workers={workers}, but the GPUs are in exclusive mode, which allows one process each. Choices: workers={most}, "
                f"or MPS: {MPS_CONTROL} -d"
            )
        each = 1 if workers else sharing.workers_per_gpu(runs)
        if each > 1:
            each = max(1, int(min(each, gpu_bytes() / max(map(device_bytes, runs)), cores // len(devices))))
        count = min(workers or each * len(devices), n_programs(runs))
        own = [{"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} for k in range(count)]
    else:
        # All workers would share the one MPS device of Apple's: two gain nothing.
        each_core = max(1, cores // execution.threads)
        count = min(workers or (1 if execution.device == "mps" else each_core), len(runs))
        own = [{} for _ in range(count)]
    if COMPILE_THREADS not in os.environ:
        threads[COMPILE_THREADS] = str(max(1, cores // count))
    return [{**threads, **each_own} for each_own in own]


def refuse_missing_device(sweep: str, device: str) -> None:
    """Raise `UserError` if this machine lacks the device that a sweep is planned for."""
    if device == "cpu":
        return
    from scaling_lab.training.engine.devices import resolve_device

    try:
        resolve_device(device)
    except UserError:
        raise UserError(
            f"sweep {sweep} is planned for device={device}, which is not available on this machine. Start it where it is, or plan "
            f"another: sweep={sweep}-cpu device=cpu."
        ) from None


def gpu_bytes() -> float:
    """Memory of the smallest visible GPU; infinite if there is none."""
    import torch

    sizes = [torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())]
    return float(min(sizes, default=float("inf")))


def visible_gpus() -> list[str]:
    """The visible GPUs, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(k) for k in range(torch.cuda.device_count())] or ["0"]


class WorkerPool:
    """The worker processes of one launch."""

    def __init__(
        self,
        store: RunStore,
        plan: Plan,
        runs: Sequence[PlannedRun],
        environments: Sequence[Mapping[str, str]],
        max_attempts: int,
        tracker: Mapping[str, Any] | None,
        stop: threading.Event | None = None,
        leave_others: bool = False,
        log_prefix: str = "",
    ) -> None:
        self.store, self.plan, self.environments = store, plan, environments
        self.stop_requested, self.leave_others = stop or threading.Event(), leave_others
        self.log_prefix = log_prefix
        self.first_heartbeats: dict[str, tuple[int, float]] = {}
        self.runs = {run.run_id: run for run in runs}
        self.max_attempts, self.tracker = max_attempts, tracker
        self.progress = SweepProgress(store, runs)
        self.workers: dict[int, Worker] = {}
        self.deaths: Counter[str] = Counter()
        self.failed_starts = 0
        self.next_start = 0.0

    def run(self, display: ProgressDisplay) -> None:
        """Keep workers running until every run has a record."""
        next_look = 0.0
        while True:
            self._collect_exits()
            now = time.monotonic()
            if now >= next_look:
                self.progress.look()
                display.show(self.progress)
                # Reading the states of thousands of runs takes a while: at most a fifth of the time is spent on it.
                next_look = now + max(STATES_EVERY_S, 5 * (time.monotonic() - now))
                if not self.progress.open_ids() or (self.leave_others and self._others_train_the_rest()):
                    break
                if now >= self.next_start:
                    self._start_workers()
            if self.stop_requested.wait(POLL_S):
                raise KeyboardInterrupt
        for worker in self.workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=STOP_GRACE_S)
        self.stop()

    def _others_train_the_rest(self) -> bool:
        """Whether other live processes train every unfinished run: each has sent a heartbeat since the first look. A
        silent one may be this job's predecessor on another machine."""
        if self.workers or self.progress.claimable_ids():
            return False
        alive = []
        for state in self.progress.running():
            if state.claim is not None:
                heartbeat = (state.claim.generation, state.claim.heartbeat_unix_s)
                alive.append(self.first_heartbeats.setdefault(state.run_id, heartbeat) != heartbeat)
        return all(alive)

    def _start_workers(self) -> None:
        """Start missing workers while there are runs for them."""
        free = self.progress.claimable_ids()
        # A worker that is starting up has no claim yet; it will take one of the free runs.
        idle = sum(1 for w in self.workers.values() if not self.progress.claimed_by(w.process.pid))
        for index in range(len(self.environments)):
            if index not in self.workers and len(free) > idle:
                self.workers[index] = self._start_worker(index)
                idle += 1

    def _start_worker(self, index: int) -> Worker:
        log = self.store.folder / "logs" / f"{self.log_prefix}worker-{index}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # -P: otherwise Python searches the working folder first, where a clone, a folder named scaling_lab, would hide
        # the package of an editable installation.
        command = [sys.executable, "-P", "-m", "scaling_lab.worker", str(self.store.folder)]
        command += ["--stop-with", str(os.getpid())]
        ids = ",".join(self.progress.open_ids())
        if len(ids) < MAX_ARGUMENT_BYTES:
            command += ["--run-ids", ids]
        if self.tracker:
            command += ["--tracker", json.dumps(dict(self.tracker))]
        file = open(log, "ab")  # noqa: SIM115  closed when the worker has exited
        # A session of its own: Ctrl-C reaches this process alone, which then stops the workers.
        process = subprocess.Popen(
            command,
            env={**os.environ, **self.environments[index]},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Worker(index, process, log, file)

    def _collect_exits(self) -> None:
        for index, worker in list(self.workers.items()):
            status = worker.process.poll()
            if status is None:
                continue
            del self.workers[index]
            worker.file.close()
            self._handle_exit(worker, status)

    def _handle_exit(self, worker: Worker, status: int) -> None:
        """Update the counts of deaths and failed starts, and record a run as failed if its workers keep dying."""
        self.progress.look()
        if status == EXIT_DISK:
            # Its message may not have reached a log on a full disk.
            raise self._disk_error(worker)
        if status == EXIT_USER:
            raise UserError(_last_error(worker.log) or f"a worker refused its input: see {worker.log}.")
        held = [i for i in self.progress.last_claimed_by(worker.process.pid) if i in self.progress.open_ids()]
        if status == 0 or (status == EXIT_REQUEUE and held):
            self.failed_starts = 0 if held or not self.progress.claimable_ids() else self.failed_starts + 1
        elif held:
            self.failed_starts = 0
            for run_id in held:
                self.deaths[run_id] += 1
                if self.deaths[run_id] >= self.max_attempts:
                    self._mark_failed(run_id, worker, status)
        else:
            self.failed_starts += 1
        if self.failed_starts >= MAX_FAILED_STARTS:
            raise UserError(
                f"workers exit before they start a run ({_exit_text(status)}): {_last_line(worker.log)} (log: {worker.log})."
            )
        self.next_start = time.monotonic() + 0.5 * 2**self.failed_starts * bool(self.failed_starts)

    def _disk_error(self, worker: Worker) -> DiskError:
        message = _last_error(worker.log)
        if message is not None:
            return DiskError(message)
        error = disk_error(OSError(errno.ENOSPC, "no space left"), self.store.folder)
        assert error is not None
        return error

    def _mark_failed(self, run_id: str, worker: Worker, status: int) -> None:
        """Record a run as failed whose workers died `max_attempts` times."""
        from scaling_lab.launching.worker import failed_record

        planned = self.runs[run_id]
        claim = self.store.claim(planned.spec)
        if claim is None:
            return
        reason = f"its worker died {self.deaths[run_id]} times (most recently: {_exit_text(status)}; log: {worker.log})"
        self.store.write_record(failed_record(planned, self.store, self.plan.data_fingerprint, reason))
        self.progress.look()

    def stop(self) -> None:
        """Ask every worker to stop, wait, and kill those that do not; a second Ctrl-C kills them at once."""
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
    """Within it SIGTERM, SIGUSR1 and SIGHUP raise `KeyboardInterrupt` as Ctrl-C does, so that no worker is left behind."""
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
    """Signal the worker's process group, which includes compilers that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, number)


def _exit_text(status: int) -> str:
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
    return (_tail(log) or ["its log is empty"])[-1]


def _last_error(log: Path) -> str | None:
    found = [line.removeprefix("error: ") for line in _tail(log) if line.startswith("error: ")]
    return found[-1] if found else None
