"""Owns trackers: sinks that mirror a run elsewhere. Never a source: the record on disk is the truth."""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path
from typing import Any, ClassVar, Protocol

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import unknown
from scaling_lab.core.record import EvalPoint, RunRecord
from scaling_lab.core.spec import PlannedRun

log = logging.getLogger(__name__)


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


class WandbTracker:
    """Mirrors a run to Weights & Biases from a thread of its own: offline where nobody is logged in, never fatal.

    Group = sweep, x-axis = train FLOPs. A failure of any kind (no package, no disk, no server) is one warning, and the
    local record is complete without it.
    """

    kind: ClassVar[str] = "wandb"

    def __init__(
        self, folder: Path, project: str = "scaling_lab", mode: str = "auto", entity: str | None = None
    ) -> None:
        self._folder, self._project, self._mode, self._entity = folder, project, mode, entity
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, planned: PlannedRun, data_fingerprint: str) -> None:
        self._thread = threading.Thread(target=self._work, args=(planned, data_fingerprint), daemon=True)
        self._thread.start()

    def log(self, point: EvalPoint) -> None:
        self._queue.put(("log", point))

    def finish(self, record: RunRecord) -> None:
        self._queue.put(("finish", record))
        if self._thread:
            # Long enough for an offline file to be closed; a server that hangs does not hold the sweep up.
            self._thread.join(timeout=FINISH_TIMEOUT_S)
            if self._thread.is_alive():
                log.warning(
                    "tracker=wandb did not finish in %g s: the local record is complete.", FINISH_TIMEOUT_S
                )

    def abandon(self) -> None:
        """The run stopped without a record here (interrupted, failed, taken over): close its mirror, do not wait long."""
        self._queue.put(("abandon", None))
        if self._thread:
            self._thread.join(timeout=ABANDON_TIMEOUT_S)

    def _work(self, planned: PlannedRun, data_fingerprint: str) -> None:
        try:
            run = self._open(planned, data_fingerprint)
            while True:
                kind, value = self._queue.get()
                if kind == "log":
                    run.log(point_metrics(value))
                    continue
                if kind == "finish":
                    run.summary.update(record_summary(value))
                run.finish(exit_code=0 if kind == "finish" and value.status.value == "completed" else 1)
                return
        except (
            BaseException
        ) as error:  # wandb raises its own kinds, SystemExit among them; none may reach training
            log.warning(
                "tracker=wandb stopped (%s: %s): the local record is complete.", type(error).__name__, error
            )

    def _open(self, planned: PlannedRun, data_fingerprint: str) -> Any:
        # Importing wandb takes a second and is not needed without the tracker.
        import wandb

        spec = planned.spec
        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project,
            entity=self._entity,
            dir=str(self._folder),
            mode=wandb_mode(self._mode),  # type: ignore[arg-type]
            group=spec.sweep,
            job_type=spec.role,
            name=planned.run_id,
            # An id is unique in a project: the sweep's name keeps the same run of two sweeps apart.
            id=f"{spec.sweep}-{planned.run_id}",
            resume="allow",
            # A run that hangs or failed may still be open in this process: never log into it.
            reinit="create_new",
            tags=[spec.shape.kind, f"C={spec.budget_flops:.2g}"],
            config=run_config(planned, data_fingerprint),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        run.define_metric("train_flops")
        run.define_metric("*", step_metric="train_flops")
        return run


FINISH_TIMEOUT_S = 60.0
ABANDON_TIMEOUT_S = 5.0


def wandb_mode(mode: str) -> str:
    """`auto`: what WANDB_MODE says, else online where a key is known, else offline. Asks nobody anything."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "online" if "api.wandb.ai" in netrc.read_text() else "offline"
    except OSError:
        return "offline"


def point_metrics(point: EvalPoint) -> dict[str, float]:
    """One line of the curve as metrics; FLOPs, tokens and losses go in one call, or histories come back torn."""
    values = {
        "train_flops": point.train_flops,
        "tokens": point.tokens,
        "train_step": point.step,
        "lr": point.lr,
        "train_loss_nats": point.train_loss_nats,
        "val_loss_nats": point.val_loss_nats,
        "val_loss_sem_nats": point.val_loss_sem_nats,
        "train_time_s": point.wall_time_s,
    }
    return {name: value for name, value in values.items() if value is not None}


def record_summary(record: RunRecord) -> dict[str, Any]:
    """What the table of runs shows of a run that is over."""
    return {
        "status": record.status.value,
        "reason": record.reason,
        "final_val_loss_nats": record.final_val_loss_nats,
        "final_val_loss_sem_nats": record.final_val_loss_sem_nats,
        "wall_time_s": record.wall_time_s,
    }


WANDB_MODES = ("auto", "online", "offline", "disabled")


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
    return WandbTracker(folder / "wandb", **options)
