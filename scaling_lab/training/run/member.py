"""One run in training, alone or as a member of a stack: its claim, curve, checkpoints, tracker and record."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from scaling_lab.core.record import EvalPoint, RunRecord, RunStatus
from scaling_lab.core.spec import PlannedRun, RunSpec
from scaling_lab.core.storage.claims import Claim, ClaimLost
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.sink.trackers import Tracker
from scaling_lab.training.engine.devices import run_environment
from scaling_lab.training.engine.process_errors import process_retries
from scaling_lab.training.engine.step import LOSS
from scaling_lab.training.measure.divergence import DivergenceDetector
from scaling_lab.training.measure.evaluation import EvaluationResult, evaluation_steps
from scaling_lab.training.run.checkpoint import (
    KEPT,
    Checkpoint,
    clean,
    kept_path,
    load_latest,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    shards_of,
    write_checkpoint,
)
from scaling_lab.training.run.checkpoint_writer import CheckpointWriter
from scaling_lab.training.run.curve import CurveWriter
from scaling_lab.training.run.heartbeat import Heartbeat
from scaling_lab.training.run.session import TrainingSession
from scaling_lab.training.run.weights import write_weights

log = logging.getLogger(__name__)


class StepCounter:
    """How far a run is, and when it is evaluated next."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.done = 0
        """Number of completed steps whose metrics are in the curve."""
        self.ahead = 0
        """Number of steps after those that the device was given."""
        self.over = False
        self._evaluations = evaluation_steps(spec)

    @property
    def at_evaluation(self) -> bool:
        """Whether the run is evaluated at this step."""
        return self.done in self._evaluations

    @property
    def started(self) -> int:
        """Number of steps that the device was given."""
        return self.done + self.ahead

    @property
    def pauses(self) -> bool:
        """Whether the run is evaluated, or over, before its next step."""
        return self.started in self._evaluations

    def until_evaluation(self) -> int:
        """Steps to the next evaluation; the last one is at the run's last step."""
        return next(step for step in self._evaluations if step > self.started) - self.started


class Member(StepCounter):
    """A claimed run that this process trains. In the end it has a `record` or an `error`."""

    def __init__(
        self, planned: PlannedRun, store: RunStore, claim: Claim, tracker: Tracker, slot: int = 0
    ) -> None:
        super().__init__(planned.spec)
        self.planned, self.store, self.claim, self.slot = planned, store, claim, slot
        self.tracker = tracker
        self.folder = store.run_folder(planned.run_id)
        self.heartbeat = Heartbeat(claim, planned.spec)
        self.saved: Checkpoint | None = None
        self.record: RunRecord | None = None
        self.error: Exception | None = None
        self._tracked: int | None = None
        """The last step whose point the tracker got; None before the tracker is started."""
        self._saving: tuple[int, Future[None]] | None = None
        """The checkpoint that is being written, by its step."""
        self.writer: CheckpointWriter
        self.session: TrainingSession
        self.curve: CurveWriter
        self.divergence: DivergenceDetector

    def find_checkpoint(self, fingerprint: str) -> None:
        """Find the newest intact checkpoint whose part of the curve is intact too; without one the run starts over.

        The checkpoint decides the micro-batch, because memory may have run out since the plan was made.
        """
        planned = self.planned
        saved = load_latest(self.folder / "checkpoint", planned.run_id, planned.execution, fingerprint)
        points = len(self.store.read_curve(planned.run_id))
        if saved is None:
            if points:
                log.warning(
                    "run %s starts over: no intact checkpoint is left; its %d points are recomputed.",
                    planned.run_id, points,
                )  # fmt: skip
            self.saved = self.from_parent(fingerprint)
        elif points < saved.curve_points:
            log.warning(
                "run %s starts over: its curve has %d of the %d points that its checkpoint needs.",
                planned.run_id, points, saved.curve_points,
            )  # fmt: skip
            self.saved = self.from_parent(fingerprint)
        else:
            self.saved = saved

    def from_parent(self, fingerprint: str) -> Checkpoint | None:
        """The parent's checkpoint from which this run starts, with an empty curve; None for a run without a parent.

        Raises ValueError or OSError if the parent's checkpoint is missing or damaged.
        """
        spec = self.spec
        if spec.parent is None:
            return None
        path = kept_path(self.store.run_folder(spec.parent) / "checkpoint", spec.parent_step)
        found = read_checkpoint(path, spec.parent, fingerprint=fingerprint, whole=False)
        return replace(
            found, run_id=self.planned.run_id, curve_points=0, block_losses_nats=(), wall_time_s=0.0
        )

    def begin(self, session: TrainingSession, writer: CheckpointWriter) -> IO[str]:
        """Resume from the checkpoint; returns the curve's file, which the caller closes after the writer of checkpoints."""
        # From here on files are changed: a process that lost its claim while it loaded must not touch them.
        self.claim.check()
        self.session, self.writer, saved = session, writer, self.saved
        clean(self.folder / "checkpoint")
        kept: list[EvalPoint] = []
        if saved is not None:
            kept = self.store.read_curve(self.planned.run_id)[: saved.curve_points]
            self._load(saved)
            self.done = saved.step
            log.info("run %s resumes from step %d of %d.", self.planned.run_id, self.done, self.spec.steps)
        file: IO[str] = self.store.start_curve(self.planned.run_id, kept)
        if saved is not None:
            self.curve = CurveWriter(self.spec, file, kept, saved.block_losses_nats, saved.wall_time_s)
        else:
            self.curve = CurveWriter(self.spec, file)
        self.divergence = DivergenceDetector(self.spec, saved.divergence if saved else None)
        self.saved = None  # its tensors are in the step
        if self._tracked is None:
            self.tracker.start(self.planned, session.fingerprint)
            self._tracked = 0
            for point in kept:  # each attempt sends the whole curve
                self.track(point)
        self.heartbeat.begin(self.done)
        return file

    def add_block(self, metrics: Tensor, micro: int) -> None:
        """Add the metrics (steps, 3) of a block of steps to the curve; evaluate and checkpoint if it is time."""
        self.settle()  # an error in writing the last checkpoint comes out here
        first, self.done = self.done, self.done + len(metrics)
        self.ahead = max(0, self.ahead - len(metrics))
        evaluation = self.session.evaluate() if self.at_evaluation else None
        noise = self.session.measure_noise(self.done, metrics[-1], micro) if self.at_evaluation else None
        scale = noise.scale_tokens if noise else None
        losses: list[float] = metrics[:, LOSS].tolist()
        for point in add_losses(self.curve, first, losses, evaluation, self.divergence, scale):
            self.track(point)
        self.curve.flush()
        if self.divergence.reason:
            self.finish()
            return
        self.heartbeat.progress(self.done, losses[-1], self.session.utilization.mfu)
        if self.done in self.spec.keep_steps:
            self.heartbeat.check()
            self.checkpoint(permanent=True)

    def track(self, point: EvalPoint) -> None:
        """Send a point to the tracker, once: an attempt that ran out of memory may have sent it already."""
        if self._tracked is not None and point.step > self._tracked:
            self.tracker.log(point)
            self._tracked = point.step

    @property
    def ends_with_checkpoint(self) -> bool:
        """Whether a checkpoint of the last step is written: with the optimizer's state, for those who ask for it."""
        return self.planned.execution.keep == "resume"

    def checkpoint(self, *, permanent: bool = False) -> None:
        """Copy the state and let the writer's thread write a checkpoint; `settle` has the outcome. `permanent`: one that is
        kept for runs that continue from it."""
        self.settle(wait=True)
        self.curve.flush()
        path = self.folder / "checkpoint"
        if permanent:
            write: Callable[..., None] = partial(write_checkpoint, kept_path(path, self.done))
        else:
            # A finished run keeps one: its weights, to sample from.
            write = partial(save_checkpoint, path, keep=1 if self.done == self.spec.steps else KEPT)
        files = kept_path(path, self.done) if permanent else path / f"step-{self.done}.pt"
        self._saving = self.done, self.writer.submit(partial(self._copy, files), partial(self._write, write))

    def _load(self, saved: Checkpoint) -> None:
        step: Any = self.session.step
        if saved.shards is None:
            step.load_state(saved.tensors)
        elif step.holds_all_parameters:
            step.load_state(saved.whole())
        else:
            step.load_shards(saved.shards)

    def _copy(self, files: Path) -> Checkpoint:
        step: Any = self.session.step
        whole = step.holds_all_parameters
        return Checkpoint(
            run_id=self.planned.run_id,
            step=self.done,
            curve_points=len(self.curve.points),
            block_losses_nats=self.curve.block_losses_nats,
            wall_time_s=self.curve.wall_time_s,
            execution=self.planned.execution,
            data_fingerprint=self.session.fingerprint,
            tensors=step.host_copy() if whole else {},
            divergence=self.divergence.state(),
            saving=None if whole else step.save_shards(shards_of(files)),
            parameters=tuple(zip(step.layout.names, map(tuple, step.layout.shapes), strict=True)),
        )

    def _write(self, write: Callable[..., None], checkpoint: Checkpoint) -> None:
        self.curve.sync()  # the checkpoint refers to its lines
        write(checkpoint, check=self.claim.check)

    def settle(self, *, wait: bool = False) -> bool:
        """Whether the last checkpoint is on disk, after `wait`ing for it. Raises the error that ended its writing, if it has
        one; an OSError is a warning: the run goes on, and would resume from an older checkpoint."""
        if self._saving is None:
            return True
        step, saving = self._saving
        if not (wait or saving.done()):
            return False
        self._saving = None
        try:
            saving.result()
        except OSError as error:
            log.warning("run %s: no checkpoint at step %d (%s).", self.planned.run_id, step, error)
            return False
        return True

    def finish(self) -> None:
        """Write what the run keeps, then its record, and delete what it keeps no longer. Raises `ClaimLost` if another
        process has the run."""
        self.settle(wait=True)
        record = make_record(
            self.planned, self.session, self.curve, self.divergence.reason, process_retries(self.folder)
        )
        self.heartbeat.check()
        keep = self.planned.execution.keep
        if keep == "weights" and record.status is RunStatus.COMPLETED:
            write_weights(self.folder, self.spec, self.session.step.host_parameters())
            self.heartbeat.check()
        if not self.store.write_record(record):
            raise ClaimLost(f"run {self.planned.run_id} already has a record")
        if keep != "resume":
            remove_checkpoints(self.folder / "checkpoint")
        self.record, self.over = record, True

    def fail(self, error: Exception) -> None:
        """The run ends here, by its own error or because another process took it over; the rest of its stack goes on."""
        self.error, self.over = error, True

    @property
    def micro(self) -> int | None:
        """Sequences per micro-batch; None for the whole batch."""
        return self.planned.execution.micro_batch_sequences

    def set_micro_batch(self, micro_sequences: int | None) -> None:
        """Checkpoints and the record state how the run was really computed, also if memory ran out after planning."""
        execution = replace(self.planned.execution, micro_batch_sequences=micro_sequences)
        self.planned = replace(self.planned, execution=execution)

    def release(self) -> None:
        """Free what a failed attempt held; `begin` will be called again."""
        self.done, self.ahead, self.saved, self._saving = 0, 0, None, None
        self.close()

    def close(self) -> None:
        """Let go of the program, and so of its memory."""
        if hasattr(self, "session"):
            del self.session


def add_losses(
    curve: CurveWriter,
    first: int,
    losses: list[float],
    evaluation: EvaluationResult | None,
    divergence: DivergenceDetector,
    noise_scale_tokens: float | None = None,
) -> Iterator[EvalPoint]:
    """Add a block's losses to the curve, up to the step at which the run diverged; yields the new points."""
    for i, loss in enumerate(losses):
        if divergence.step(loss):
            return
        step = first + i + 1
        if evaluation and i == len(losses) - 1 and not divergence.validation(evaluation.loss_nats):
            point = curve.add(
                step, loss, evaluation.loss_nats, evaluation.sem_nats, noise_scale_tokens, evaluation.others
            )
        else:
            point = curve.add(step, loss)
        if point:
            yield point


def make_record(
    planned: PlannedRun, session: TrainingSession, curve: CurveWriter, reason: str | None, retries: int = 0
) -> RunRecord:
    """The record of a finished run: diverged if there is a reason, otherwise completed."""
    count = planned.spec.count()
    last = curve.points[-1] if curve.points else None
    done = reason is None and last is not None
    return RunRecord(
        run_id=planned.run_id,
        spec=planned.spec,
        execution=planned.execution,
        params=count.params,
        flops=count.flops,
        status=RunStatus.COMPLETED if reason is None else RunStatus.DIVERGED,
        reason=reason,
        final_val_loss_nats=last.val_loss_nats if done and last else None,
        final_val_loss_sem_nats=last.val_loss_sem_nats if done and last else None,
        wall_time_s=round(curve.wall_time_s, 3),
        environment=run_environment(session.device, session.fingerprint),
        curve_points=len(curve.points),
        curve=tuple(curve.points),
        val_floor_nats=session.evaluation.floor_nats,
        metrics=final_metrics(planned.spec, last) if done and last else {},
        mfu=session.utilization.mfu,
        process_retries=retries,
    )


def final_metrics(spec: RunSpec, last: EvalPoint) -> dict[str, float]:
    """Metrics of the final model other than its loss, by the names that the analysis uses."""
    sets = {each.name for each in spec.eval.sets}
    found = {(f"eval.{name}" if name in sets else name): value for name, value in (last.evals or {}).items()}
    bytes_per_token = spec.data.bytes_per_token
    if bytes_per_token and last.val_loss_nats is not None:
        found["bits_per_byte"] = last.val_loss_nats / math.log(2) / bytes_per_token
    return found
