"""Owns trackers: sinks that mirror a run elsewhere. Never a source: the record on disk is the truth."""

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
    RunCard,
    ServerFailed,
    Target,
    open_run,
    server_failed,
    wandb_folder,
    wandb_mode,
)

log = logging.getLogger(__name__)

# Beyond what the client itself waits for a server that hangs.
DRAIN_TIMEOUT_S = FINISH_TIMEOUT_S + 15.0
# A process that was told to stop has little time left.
ABANDON_TIMEOUT_S = 5.0


class Tracker(Protocol):
    """Told what happens in a run. No call may raise or wait: training does not depend on it."""

    def start(self, planned: PlannedRun, data_fingerprint: str) -> None: ...
    def log(self, point: EvalPoint) -> None: ...
    def finish(self, record: RunRecord) -> None: ...
    def abandon(self) -> None: ...


class NoTracker:
    """Mirrors nothing."""

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
    """A run's configuration as a browser of runs wants it: N, D, C under every convention, and the whole spec."""
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


def run_card(planned: PlannedRun, data_fingerprint: str) -> RunCard:
    """How a training run stands on W&B."""
    spec = planned.spec
    return RunCard(
        # An id is unique in a project: the sweep's name keeps the same run of two sweeps apart.
        id=f"{spec.sweep}-{planned.run_id}",
        name=planned.run_id,
        group=spec.sweep,
        job_type=spec.role,
        tags=[spec.shape.kind, spec.data.kind, f"C={spec.budget_flops:.2g}"],
        config=run_config(planned, data_fingerprint),
    )


class WandbTracker:
    """Mirrors a run to Weights & Biases from a thread of its own: offline where nobody is logged in, never fatal.

    Group = sweep, x-axis = train FLOPs. A failure of any kind (no package, no disk, no server) is one warning, and the
    local record is complete without it. Several may work in one process.
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
        """The run stopped without a record here (interrupted, taken over): its mirror is closed, to be resumed."""
        self._end("abandon", None)

    def _end(self, kind: str, record: RunRecord | None) -> None:
        if self._thread:
            self._queue.put((kind, record))
            _ending.append(self._thread)

    def _work(self, planned: PlannedRun, data_fingerprint: str, mode: str) -> None:
        # wandb raises its own kinds, SystemExit among them; none may reach training.
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
            say_stopped(str(error), self._folder)
        except TimeoutError as error:
            say_stopped(str(server_failed(error)), self._folder)
        except BaseException as error:
            say_stopped(f"{type(error).__name__}: {error}", self._folder)


def say_stopped(reason: str, folder: Path) -> None:
    """A warning, once for each reason in a process: with a server that is down every run would say the same."""
    if reason not in reported_reasons:
        reported_reasons.add(reason)
        log.warning(
            "tracker=wandb stopped (%s): the local record is complete; `scaling-lab upload-wandb sweep=%s` brings it up later.",
            reason, folder.parent.name,
        )  # fmt: skip


reported_reasons: set[str] = set()
_ending: list[threading.Thread] = []


def wait_for_mirrors(timeout_s: float | None = None) -> None:
    """Before a process ends: give the mirrors of ended runs this much time (default: what a slow server may take)."""
    deadline = time.monotonic() + (DRAIN_TIMEOUT_S if timeout_s is None else timeout_s)
    while _ending:
        thread = _ending.pop()
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("tracker=wandb did not finish in time: the local record is complete.")
            _ending.clear()


@contextlib.contextmanager
def mirrors_closed() -> Iterator[None]:
    """Whatever ends inside is closed when this is left, within the time that there is."""
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
    """The W&B run of a training run, train FLOPs as its x-axis."""
    target.save(folder)  # first: whatever becomes of the mirror, the sweep has one
    run = open_run(run_card(planned, data_fingerprint), target, folder, mode, finish_timeout_s)
    run.define_metric("train_flops")
    run.define_metric("*", step_metric="train_flops")
    return run


def log_point(run: Any, point: EvalPoint) -> None:
    """One point, at its own step: what a resumed run has on the server already is not sent twice."""
    if point.step >= run.starting_step:
        run.log(point_metrics(point), step=point.step)


def close_mirror(run: Any, record: RunRecord | None) -> None:
    """End the W&B run as the training run ended; without a record it is to be resumed."""
    if record is None:
        with contextlib.suppress(Exception):
            run.mark_preempting()
    else:
        run.summary.update(record_summary(record))
    completed = record is not None and record.status is RunStatus.COMPLETED
    run.finish(exit_code=0 if completed else 1)


# Fields of a point that would read as something else on W&B.
RENAMED = {"step": "train_step", "wall_time_s": "train_time_s"}


def point_metrics(point: EvalPoint) -> dict[str, float]:
    """One line of the curve as metrics; FLOPs, tokens and losses go in one call, or histories come back torn."""
    values = {f.name: getattr(point, f.name) for f in dataclasses.fields(point)}
    return {RENAMED.get(name, name): value for name, value in values.items() if value is not None}


def record_summary(record: RunRecord) -> dict[str, Any]:
    """What the table of runs shows of a run that is over: its loss, bits per byte, other distributions, ..."""
    return {
        "status": record.status.value,
        "reason": record.reason,
        "final_val_loss_nats": record.final_val_loss_nats,
        "final_val_loss_sem_nats": record.final_val_loss_sem_nats,
        "wall_time_s": record.wall_time_s,
        "curve_points": record.curve_points,
        **record.metrics,
    }


def make_tracker(settings: dict[str, Any] | None, folder: Path) -> Tracker:
    """The tracker that `settings` (`kind` and its options) describe. Raises `UserError` for an unknown one."""
    options = dict(settings or {"kind": "none"})
    kind = options.pop("kind", "none")
    if kind == NoTracker.kind:
        return NoTracker()
    if kind != WandbTracker.kind:
        raise unknown("tracker", kind, (NoTracker.kind, WandbTracker.kind))
    if options.get("mode", "auto") not in WANDB_MODES:
        raise unknown("tracker.mode", options["mode"], WANDB_MODES)
    return WandbTracker(wandb_folder(folder), **options)
