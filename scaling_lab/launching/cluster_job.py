"""Owns what one cluster job does: it trains its runs with worker processes, as the local launcher does on one machine,
stops them with a checkpoint when it is told to, and lets submitit put it back into the queue.

Submitit calls `checkpoint` from its handler of SIGUSR2 (the time limit is near; some clusters: preemption) in the main
thread, requeues the job and exits. So the workers are watched from a second thread, which the main thread can stop.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError

log = logging.getLogger(__name__)

LOOK_S = 0.2
EXIT_USER, EXIT_REQUEUE = 2, 75


@dataclass(frozen=True)
class ClusterJob:
    """The runs of one job; submitit pickles it, so it holds plain values only."""

    folder: str
    """The sweep's folder, absolute."""
    run_ids: tuple[str, ...]
    workers: int
    """Worker processes side by side."""
    max_attempts: int
    tracker: dict[str, Any] | None = None

    def __call__(self) -> None:
        """Train until no run is left for this job. Runs that other processes compute are left to them."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        watch = _Watch(self)
        _watches.append(watch)
        before = signal.getsignal(signal.SIGTERM)

        def terminated(number: int, frame: Any) -> None:
            # Submitit's own handler stays in place behind this one.
            watch.stop.set()
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, terminated)
        watch.thread.start()
        while watch.thread.is_alive():
            watch.thread.join(LOOK_S)
        if watch.stop.is_set():
            self._requeue_if_preempted()
            sys.exit(EXIT_REQUEUE)
        if watch.error is not None:
            raise watch.error

    def checkpoint(self) -> Any:
        """Submitit's hook: the workers write checkpoints and give their claims back; the same job is queued again."""
        from submitit.helpers import DelayedSubmission

        for watch in _watches:
            watch.stop.set()
            watch.thread.join()
        return DelayedSubmission(self)

    def _requeue_if_preempted(self) -> None:
        """Put a preempted job back. Slurm does it by itself, but not for one that ends within its grace time; a job
        that was cancelled must stay away."""
        import submitit

        from scaling_lab.launching.slurm import was_preempted

        environment = submitit.JobEnvironment()
        if environment.cluster == "slurm" and was_preempted(environment.raw_job_id):
            log.warning("preempted: back into the queue.")
            environment._requeue(0)


class _Watch:
    """The thread that watches the workers of this process's job."""

    def __init__(self, job: ClusterJob) -> None:
        self.job, self.stop = job, threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="workers")

    def _work(self) -> None:
        import submitit

        from scaling_lab.core.storage.store import RunStore
        from scaling_lab.launching.progress import LineReporter
        from scaling_lab.launching.workers import run_workers

        store = RunStore(Path(self.job.folder))
        try:
            run_workers(
                store,
                store.read_plan(self.job.run_ids),
                self.job.run_ids,
                LineReporter(),
                workers=self.job.workers,
                max_attempts=self.job.max_attempts,
                tracker=self.job.tracker,
                stop=self.stop,
                leave_others=True,
                log_prefix=f"job-{submitit.JobEnvironment().job_id}-",
            )
        except KeyboardInterrupt:
            self.stop.set()
        except UserError as error:
            # The head of the sweep looks for this line in the job's log.
            print(f"error: {error}", file=sys.stderr, flush=True)
            self.error = error
        except BaseException as error:
            self.error = error


# A job is one process: there is one at most.
_watches: list[_Watch] = []
