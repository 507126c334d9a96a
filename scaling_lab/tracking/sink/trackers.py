"""Experiment trackers that mirror a run. They are only written to: the source of truth is the record on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import unknown
from scaling_lab.core.record import EvalPoint, RunRecord, RunStatus
from scaling_lab.core.spec import PlannedRun
from scaling_lab.tracking.sink.wandb_client import (
    DEFAULT_PROJECT,
    FINISH_TIMEOUT_S,
    WANDB_MODES,
    RunInfo,
    ServerFailed,
    Target,
    open_run,
    remember_failure,
    wandb_folder,
    wandb_mode,
)

log = logging.getLogger(__name__)

# Longer than the client itself waits for a server that does not respond.
DRAIN_TIMEOUT_S = FINISH_TIMEOUT_S + 15.0
# A process that was asked to stop has little time left.
ABANDON_TIMEOUT_S = 5.0


class Tracker(Protocol):
    """Receives the events of a run. No call may raise or block: training does not depend on it."""

    def start(self, planned: PlannedRun, data_fingerprint: str) -> None: ...
    def log(self, point: EvalPoint) -> None: ...
    def finish(self, record: RunRecord) -> None: ...
    def abandon(self) -> None: ...


class NoTracker:
    """Does nothing."""

    kind: ClassVar[str] = "none"

    def start(self, planned: PlannedRun, data_fingerprint: str) -> None:
        pass

    def log(self, point: EvalPoint) -> None:
        pass

    def finish(self, record: RunRecord) -> None:
        pass

    def abandon(self) -> None:
        pass


def run_config(planned: PlannedRun, data_fingerprint: str) -> dict[str, Any]:
    """A run's configuration for the tracker's tables: N, D, C under every convention, and the whole spec."""
    spec, count = planned.spec, planned.spec.count()
    config: dict[str, Any] = {
        "run_id": planned.run_id,
        "N": spec.n_params(),
        "D": spec.train_tokens,
        "C": spec.train_flops(),
        "convention": spec.convention.value,
        "budget_flops": spec.budget_flops,
        "tokens_per_param": spec.train_tokens / spec.n_params(),
        "data_fingerprint": data_fingerprint,
        "spec": spec.to_dict(),
    }
    for convention in Convention:
        config[f"N/{convention.value}"] = count.n_params(convention)
        config[f"C/{convention.value}"] = count.flops_per_token(convention) * spec.train_tokens
    return config


def run_info(planned: PlannedRun, data_fingerprint: str) -> RunInfo:
    """Name, group and configuration of a training run on W&B."""
    spec = planned.spec
    return RunInfo(
        # Ids are unique within a project; the sweep's name distinguishes the same run in two sweeps.
        id=f"{spec.sweep}-{planned.run_id}",
        name=planned.run_id,
        group=spec.sweep,
        job_type=spec.role,
        tags=[spec.shape.kind, spec.data.kind, f"C={spec.budget_flops:.2g}"],
        config=run_config(planned, data_fingerprint),
    )


class WandbTracker:
    """Mirrors a run to Weights & Biases from its own thread: offline if the user is not logged in, and never fatal.

    Group = sweep, x-axis = training FLOPs. Any failure (no package, full disk, no server) is one warning; the local record
    is complete without the mirror. A process may have several of these trackers.
    """

    kind: ClassVar[str] = "wandb"

    def __init__(
        self, folder: Path, project: str = DEFAULT_PROJECT, mode: str = "auto", entity: str | None = None
    ) -> None:
        self._folder, self._target, self._mode = folder, Target(project, entity, mode), mode
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, planned: PlannedRun, data_fingerprint: str) -> None:
        mode = wandb_mode(self._mode)
        if mode == "disabled":
            return
        arguments = (planned, data_fingerprint, mode)
        self._thread = threading.Thread(target=self._work, args=arguments, daemon=True, name="wandb mirror")
        self._thread.start()

    def log(self, point: EvalPoint) -> None:
        if self._thread:
            self._queue.put(("log", point))

    def finish(self, record: RunRecord) -> None:
        self._end("finish", record)

    def abandon(self) -> None:
        """The run stopped here without a record (interrupted, taken over): close its mirror, which may be resumed."""
        self._end("abandon", None)

    def _end(self, kind: str, record: RunRecord | None) -> None:
        if self._thread:
            self._queue.put((kind, record))
            _ending.append(self._thread)

    def _work(self, planned: PlannedRun, data_fingerprint: str, mode: str) -> None:
        # wandb raises its own exceptions and SystemExit; none of them may reach training.
        try:
            run = open_mirror(planned, data_fingerprint, self._target, self._folder, mode)
            while True:
                kind, value = self._queue.get()
                if kind == "log":
                    log_point(run, value)
                else:
                    close_mirror(run, value)
                    return
        except ServerFailed as error:
            warn_stopped(str(error), self._folder)
        except TimeoutError as error:
            warn_stopped(str(remember_failure(error)), self._folder)
        except BaseException as error:
            warn_stopped(f"{type(error).__name__}: {error}", self._folder)


def warn_stopped(reason: str, folder: Path) -> None:
    """Warn once per reason and process: if the server is down, every run has the same one."""
    if reason not in reported_reasons:
        reported_reasons.add(reason)
        log.warning(
            "tracker=wandb stopped (%s): the local record is complete; `scaling-lab upload-wandb sweep=%s` uploads it later.",
            reason, folder.parent.name,
        )  # fmt: skip


reported_reasons: set[str] = set()
_ending: list[threading.Thread] = []


def wait_for_mirrors(timeout_s: float | None = None) -> None:
    """Before a process ends: give the mirrors of finished runs this much time (default: enough for a slow server)."""
    deadline = time.monotonic() + (DRAIN_TIMEOUT_S if timeout_s is None else timeout_s)
    while _ending:
        thread = _ending.pop()
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("tracker=wandb did not finish in time: the local record is complete.")
            _ending.clear()


@contextlib.contextmanager
def mirrors_closed() -> Iterator[None]:
    """Waits on exit for the mirrors of the runs that ended inside, for a short time after an error."""
    try:
        yield
    except BaseException:
        wait_for_mirrors(ABANDON_TIMEOUT_S)
        raise
    wait_for_mirrors()


def open_mirror(
    planned: PlannedRun,
    data_fingerprint: str,
    target: Target,
    folder: Path,
    mode: str,
    finish_timeout_s: float | None = None,
) -> Any:
    """Open the W&B run of a training run, with training FLOPs as its x-axis."""
    target.save(folder)  # first, so that the sweep has a target even if opening fails
    run = open_run(run_info(planned, data_fingerprint), target, folder, mode, finish_timeout_s)
    run.define_metric("train_flops")
    run.define_metric("*", step_metric="train_flops")
    return run


def log_point(run: Any, point: EvalPoint) -> None:
    """Log one point at its own step. Points that a resumed run already has on the server are not sent again."""
    if point.step >= run.starting_step:
        run.log(point_metrics(point), step=point.step)


def close_mirror(run: Any, record: RunRecord | None) -> None:
    """Finish the W&B run with the status of the record; without a record, mark it as to be resumed."""
    if record is None:
        with contextlib.suppress(Exception):
            run.mark_preempting()
    else:
        run.summary.update(record_summary(record))
    completed = record is not None and record.status is RunStatus.COMPLETED
    run.finish(exit_code=0 if completed else 1)


# Fields of a point whose names have another meaning on W&B.
RENAMED = {"step": "train_step", "wall_time_s": "train_time_s"}


def point_metrics(point: EvalPoint) -> dict[str, float]:
    """A point of the curve as metrics. They are logged in one call, so that a history has all of them in one row."""
    values = {f.name: getattr(point, f.name) for f in dataclasses.fields(point)}
    return {RENAMED.get(name, name): value for name, value in values.items() if value is not None}


def record_summary(record: RunRecord) -> dict[str, Any]:
    """The summary of a finished run for the table of runs: its loss, bits per byte, losses on other sets, ..."""
    return {
        "status": record.status.value,
        "reason": record.reason,
        "final_val_loss_nats": record.final_val_loss_nats,
        "final_val_loss_sem_nats": record.final_val_loss_sem_nats,
        "wall_time_s": record.wall_time_s,
        "curve_points": record.curve_points,
        **({} if record.mfu is None else {"mfu": record.mfu}),
        **record.metrics,
    }


def make_tracker(settings: dict[str, Any] | None, folder: Path) -> Tracker:
    """The tracker described by `settings` (`kind` and its options). Raises `UserError` for an unknown kind or mode."""
    options = dict(settings or {"kind": "none"})
    kind = options.pop("kind", "none")
    if kind == NoTracker.kind:
        return NoTracker()
    if kind != WandbTracker.kind:
        raise unknown("tracker", kind, (NoTracker.kind, WandbTracker.kind))
    if options.get("mode", "auto") not in WANDB_MODES:
        raise unknown("tracker.mode", options["mode"], WANDB_MODES)
    return WandbTracker(wandb_folder(folder), **options)
