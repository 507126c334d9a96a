"""One cluster job: it trains its runs with worker processes, and is requeued by submitit with checkpoints written.

Submitit calls `checkpoint` from its handler of SIGUSR2 (near the time limit; on some clusters: preemption) in the main
thread, requeues the job and exits. The workers are therefore watched from a second thread, which the main thread stops.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import EXIT_REQUEUE, UserError

log = logging.getLogger(__name__)

POLL_S = 0.2


@dataclass(frozen=True)
class ClusterJob:
    """The runs of one job. Submitit pickles it: plain values only, and pickles of it are in queues, so that neither its
    path nor its fields change."""

    folder: str
    """The sweep's folder, absolute."""
    run_ids: tuple[str, ...]
    workers: int
    """Worker processes at a time."""
    max_attempts: int
    tracker: dict[str, Any] | None = None

    def __call__(self) -> None:
        """Train until no run is left for this job. Runs that other processes train are left to them."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        watcher = _Watcher(self)
        _watchers.append(watcher)
        before = signal.getsignal(signal.SIGTERM)

        def terminate(number: int, frame: Any) -> None:
            # Submitit's own handler is called after this one.
            watcher.stop.set()
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, terminate)
        watcher.thread.start()
        while watcher.thread.is_alive():
            watcher.thread.join(POLL_S)
        if watcher.stop.is_set():
            self._requeue_if_preempted()
            sys.exit(EXIT_REQUEUE)
        if watcher.error is not None:
            raise watcher.error

    def checkpoint(self) -> Any:
        """Submitit's hook: the workers write checkpoints and release their claims; then the same job is queued again."""
        from submitit.helpers import DelayedSubmission

        for watcher in _watchers:
            watcher.stop.set()
            watcher.thread.join()
        return DelayedSubmission(self)

    def _requeue_if_preempted(self) -> None:
        """Requeue a preempted job. Slurm does so itself, except for a job that exits within its grace time; a cancelled
        job must not be requeued."""
        import submitit

        from scaling_lab.launching.slurm import was_preempted

        job = submitit.JobEnvironment()
        if job.cluster == "slurm" and was_preempted(job.raw_job_id):
            log.warning("preempted: back into the queue.")
            job._requeue(0)


class _Watcher:
    """The thread that runs this process's workers."""

    def __init__(self, job: ClusterJob) -> None:
        self.job, self.stop = job, threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="workers")

    def _run(self) -> None:
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


# At most one: a job is one process.
_watchers: list[_Watcher] = []
