"""Owns one run under way, alone or in a stack: its place in time, its claim, curve, checkpoints, mirror and record."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from torch import Tensor

from scaling_lab.core.record import EvalPoint, RunRecord, RunStatus
from scaling_lab.core.spec import PlannedRun, RunSpec
from scaling_lab.core.storage.claims import Claim, ClaimLost
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.sink.trackers import Tracker
from scaling_lab.training.engine.devices import environment
from scaling_lab.training.engine.step import LOSS
from scaling_lab.training.measure.divergence import Divergence
from scaling_lab.training.measure.evaluation import Visit, evaluation_steps
from scaling_lab.training.run.checkpoint import (
    KEPT,
    Checkpoint,
    clean,
    kept_path,
    load_latest,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from scaling_lab.training.run.curve import CurveWriter
from scaling_lab.training.run.pulse import Pulse
from scaling_lab.training.run.session import Session

log = logging.getLogger(__name__)


class Progress:
    """Where a run is."""

    def __init__(self, spec: RunSpec, done: int = 0) -> None:
        self.spec = spec
        self.done = done
        """Steps."""
        self.over = False
        self._visits = evaluation_steps(spec)

    @property
    def visits_now(self) -> bool:
        """Whether the validation set is visited at this step."""
        return self.done in self._visits

    def until_visit(self) -> int:
        """Steps to the next visit; the last one is at the run's last step."""
        return next(step for step in self._visits if step > self.done) - self.done


class Member(Progress):
    """A claimed run that this process trains. `record`, or `error`, says how it ended."""

    def __init__(
        self, planned: PlannedRun, store: RunStore, claim: Claim, tracker: Tracker, slot: int = 0
    ) -> None:
        super().__init__(planned.spec)
        self.planned, self.store, self.claim, self.slot = planned, store, claim, slot
        self.tracker = tracker
        self.folder = store.run_folder(planned.run_id)
        self.pulse = Pulse(claim, planned.spec)
        self.saved: Checkpoint | None = None
        self.record: RunRecord | None = None
        self.error: Exception | None = None
        self._mirrored: int | None = None
        """The last step whose point was shown; None before the mirror is opened."""
        self.session: Session
        self.curve: CurveWriter
        self.watch: Divergence

    def look_back(self, fingerprint: str) -> None:
        """Find the newest whole checkpoint whose part of the curve is there too; without one it begins from the start.

        The checkpoint decides the micro-batch: memory may have run out since the plan was made.
        """
        planned = self.planned
        saved = load_latest(self.folder / "checkpoint", planned.run_id, planned.execution, fingerprint)
        if saved is None:
            if lost := len(self.store.read_curve(planned.run_id)):
                log.warning(
                    "run %s begins again: no whole checkpoint is left; its %d points are computed anew.",
                    planned.run_id, lost,
                )  # fmt: skip
            self.saved = self.of_parent(fingerprint)
            return
        points = len(self.store.read_curve(planned.run_id))
        if points < saved.curve_points:
            log.warning(
                "run %s begins again: its curve has %d of the %d points that its checkpoint counts on.",
                planned.run_id, points, saved.curve_points,
            )  # fmt: skip
            self.saved = self.of_parent(fingerprint)
            return
        self.saved = saved

    def of_parent(self, fingerprint: str) -> Checkpoint | None:
        """Where this run leaves its parent, as the beginning of its own curve; None for a run without a parent.

        Raises ValueError or OSError where the parent's checkpoint is not there or damaged.
        """
        spec = self.spec
        if spec.parent is None:
            return None
        path = kept_path(self.store.run_folder(spec.parent) / "checkpoint", spec.parent_step)
        found = read_checkpoint(path, spec.parent, fingerprint=fingerprint)
        return replace(
            found, run_id=self.planned.run_id, curve_points=0, block_losses_nats=(), wall_time_s=0.0
        )

    def begin(self, session: Session) -> IO[str]:
        """Take up where the checkpoint left off; returns the curve's file, to be closed by the caller."""
        # From here on files are changed: whoever was superseded while it loaded must not touch them.
        self.claim.check()
        self.session, saved = session, self.saved
        clean(self.folder / "checkpoint")
        kept: list[EvalPoint] = []
        if saved is not None:
            kept = self.store.read_curve(self.planned.run_id)[: saved.curve_points]
            session.step.load_state(saved.tensors)
            self.done = saved.step
            log.info("run %s goes on from step %d of %d.", self.planned.run_id, self.done, self.spec.steps)
        file: IO[str] = self.store.start_curve(self.planned.run_id, kept)
        if saved is not None:
            self.curve = CurveWriter(self.spec, file, kept, saved.block_losses_nats, saved.wall_time_s)
        else:
            self.curve = CurveWriter(self.spec, file)
        self.watch = Divergence(self.spec, saved.divergence if saved else None)
        self.saved = None  # its tensors are in the step
        if self._mirrored is None:
            self.tracker.start(self.planned, session.fingerprint)
            self._mirrored = 0
            for point in kept:  # each attempt's mirror is whole in itself
                self.mirror(point)
        self.pulse.begin(self.done)
        return file

    def take(self, told: Tensor, micro: int) -> None:
        """Take what a block of steps told, (steps, 3): validate if it is time, and add to the curve."""
        first, self.done = self.done, self.done + len(told)
        validation = self.session.visit() if self.visits_now else None
        measured = self.session.noise_at(self.done, told[-1], micro) if self.visits_now else None
        scale = measured.scale_tokens if measured else None
        losses: list[float] = told[:, LOSS].tolist()
        for point in record_block(self.curve, first, losses, validation, self.watch, scale):
            self.mirror(point)
        self.curve.flush()
        if self.watch.reason:
            self.finish()
            return
        self.pulse.progress(self.done, losses[-1])
        if self.done in self.spec.keep_steps:
            self.pulse.check()
            keep(
                self.folder / "checkpoint", self.planned, self.session, self.curve, self.watch, self.done,
                for_others=True,
            )  # fmt: skip

    def mirror(self, point: EvalPoint) -> None:
        """Show a point elsewhere, once: an attempt that ran out of memory may have shown it."""
        if self._mirrored is not None and point.step > self._mirrored:
            self.tracker.log(point)
            self._mirrored = point.step

    def finish(self) -> None:
        """Write the record. Raises `ClaimLost` where another process has the run."""
        record = make_record(self.planned, self.session, self.curve, self.watch.reason)
        self.pulse.check()
        if not self.store.write_record(record):
            raise ClaimLost(f"run {self.planned.run_id} already has a record")
        self.record, self.over = record, True

    def drop(self, error: Exception) -> None:
        """It ended here by an error of its own, or another process has it; others of its stack go on."""
        self.error, self.over = error, True

    @property
    def micro(self) -> int | None:
        """Sequences that are computed at once, where not the whole batch is."""
        return self.planned.execution.micro_batch_sequences

    def compute_in_parts_of(self, micro_sequences: int | None) -> None:
        """Checkpoints and the record say how a run was computed, also where memory ran out since it was planned."""
        execution = replace(self.planned.execution, micro_batch_sequences=micro_sequences)
        self.planned = replace(self.planned, execution=execution)

    def let_go(self) -> None:
        """Free what an attempt that failed held; `begin` is to come again."""
        self.done, self.saved = 0, None
        if hasattr(self, "session"):
            del self.session


def keep(
    folder: Path,
    planned: PlannedRun,
    session: Session,
    curve: CurveWriter,
    watch: Divergence,
    step: int,
    *,
    for_others: bool = False,
) -> bool:
    """Checkpoint; says whether it is on the disk. A disk that refuses is a warning: the run goes on, and would begin
    from an older one. `for_others`: one that is kept for runs that continue from it."""
    try:
        curve.flush(durable=True)
        checkpoint = Checkpoint(
            run_id=planned.run_id,
            step=step,
            curve_points=len(curve.points),
            block_losses_nats=curve.block_losses_nats,
            wall_time_s=curve.wall_time_s,
            execution=planned.execution,
            data_fingerprint=session.fingerprint,
            tensors=session.step.state(),
            divergence=watch.state(),
        )
        if for_others:
            write_checkpoint(kept_path(folder, step), checkpoint)
        else:
            # A run that is over needs one: its weights, to sample from.
            save_checkpoint(folder, checkpoint, keep=1 if step == planned.spec.steps else KEPT)
    except OSError as error:
        log.warning("run %s: no checkpoint at step %d (%s).", planned.run_id, step, error)
        return False
    return True


def record_block(
    curve: CurveWriter,
    first: int,
    losses: list[float],
    validation: Visit | None,
    watch: Divergence,
    noise_scale_tokens: float | None = None,
) -> Iterator[EvalPoint]:
    """Add a block's losses to the curve, up to the step at which the run diverged; yields the points made."""
    for i, loss in enumerate(losses):
        if watch.step(loss):
            return
        step = first + i + 1
        if validation and i == len(losses) - 1 and not watch.validation(validation.loss_nats):
            point = curve.add(
                step, loss, validation.loss_nats, validation.sem_nats, noise_scale_tokens, validation.others
            )
        else:
            point = curve.add(step, loss)
        if point:
            yield point


def make_record(planned: PlannedRun, session: Session, curve: CurveWriter, reason: str | None) -> RunRecord:
    """The record of a run that is over: diverged where there is a reason, else completed."""
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
        environment=environment(session.device, session.fingerprint),
        curve_points=len(curve.points),
        curve=tuple(curve.points),
        val_floor_nats=session.evaluation.floor_nats,
        metrics=final_metrics(planned.spec, last) if done and last else {},
    )


def final_metrics(spec: RunSpec, last: EvalPoint) -> dict[str, float]:
    """What is known of the final model beside its loss, by the names under which it is analysed."""
    sets = {each.name for each in spec.eval.sets}
    found = {(f"eval.{name}" if name in sets else name): value for name, value in (last.evals or {}).items()}
    bytes_per_token = spec.data.bytes_per_token
    if bytes_per_token and last.val_loss_nats is not None:
        found["bits_per_byte"] = last.val_loss_nats / math.log(2) / bytes_per_token
    return found
