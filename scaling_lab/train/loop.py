"""Owns training one run: from its spec to its record. Reads like a table of contents; each step of it is elsewhere."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import EvalPoint, RunRecord, RunStatus
from scaling_lab.core.spec import Execution, PlannedRun, RunSpec
from scaling_lab.core.store import Claim, RunStore
from scaling_lab.train.checkpoint import Checkpoint, load_latest, save_checkpoint
from scaling_lab.train.curve import CurveWriter
from scaling_lab.train.data import read_tokens
from scaling_lab.train.devices import apply_execution, environment
from scaling_lab.train.evaluate import ValidationSet, evaluation_steps
from scaling_lab.train.models import build_model
from scaling_lab.train.optim import control_rows
from scaling_lab.train.order import WindowOrder, n_windows
from scaling_lab.train.step import TrainStep
from scaling_lab.train.tracking import NoTracker, Tracker

log = logging.getLogger(__name__)

# Losses are read back from the device, and the claim's heartbeat is checked, after at most this many steps.
BLOCK_STEPS = 64
HEARTBEAT_S = 2.0
# A killed run loses at most this much work; a checkpoint of a tiny model takes milliseconds.
CHECKPOINT_EVERY_S = 30.0
# A run whose training loss, averaged over a block of steps, is this far above a uniform guess will not come back.
DIVERGED_ABOVE_UNIFORM_NATS = 3.0
# Exit status of a worker that was told to stop and can go on later (the BSD sysexits' EX_TEMPFAIL, used for requeueing).
EXIT_REQUEUE = 75


class Interrupted(Exception):
    """The process was told to stop: the run goes on another time."""


@dataclass
class Session:
    """What training one run needs at hand; made by `open_session`."""

    spec: RunSpec
    device: torch.device
    step: TrainStep
    order: WindowOrder
    validation: ValidationSet
    fingerprint: str


def train_run(
    planned: PlannedRun,
    store: RunStore,
    claim: Claim,
    tracker: Tracker | None = None,
    *,
    expected_fingerprint: str | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> RunRecord:
    """Train one claimed run, from its last checkpoint if it has one, and write its record. Divergence is a record.

    Raises `Interrupted` (the claim is released), `ClaimLost` (another process has it) or `UserError` (the data are not
    the plan's); an error of the run itself becomes a record with status FAILED.
    """
    spec, tracker = planned.spec, tracker or NoTracker()
    session = open_session(spec, planned.execution, expected_fingerprint)
    folder = store.run_folder(planned.run_id) / "checkpoint"
    saved = resume(session, planned, store)
    kept = store.read_curve(planned.run_id)[: saved.curve_points] if saved else []
    with store.start_curve(planned.run_id, kept) as file, stop_signals() as stopped:
        curve = open_curve(spec, file, kept, saved)
        tracker.start(planned, session.fingerprint)
        pulse, clock = Pulse(claim, spec), Timer(checkpoint_every_s)
        status, reason = RunStatus.COMPLETED, None
        for first, last in blocks(spec, saved.step if saved else 0):
            losses = train_block(session, first, last)
            validation = validation_loss(session) if last in evaluation_steps(spec) else None
            for point in record_block(curve, first, losses, validation):
                tracker.log(point)
            curve.flush()
            reason = divergence(losses, validation, spec)
            if reason:
                status = RunStatus.DIVERGED
                break
            pulse.beat(last, losses[-1])
            if clock.is_due() or stopped() or last == spec.steps:
                claim.check()
                keep(folder, planned, session, curve, last)
            if stopped() and last < spec.steps:
                claim.release()
                raise Interrupted(planned.run_id)
    record = make_record(planned, session, curve, status, reason)
    claim.check()
    store.write_record(record)
    # A run that is over belongs to nobody: delete its record, and the next sweep takes it at once.
    claim.release()
    tracker.finish(record)
    return record


def resume(session: Session, planned: PlannedRun, store: RunStore) -> Checkpoint | None:
    """Take over the newest whole checkpoint whose part of the curve is there too; None: begin from the beginning."""
    saved = load_latest(store.run_folder(planned.run_id) / "checkpoint", planned.run_id, planned.execution)
    if saved is None:
        return None
    points = len(store.read_curve(planned.run_id))
    if points < saved.curve_points:
        log.warning(
            "run %s begins again: its curve has %d of the %d points that its checkpoint counts on.",
            planned.run_id, points, saved.curve_points,
        )  # fmt: skip
        return None
    session.step.load_state(saved.tensors)
    log.info("run %s goes on from step %d of %d.", planned.run_id, saved.step, planned.spec.steps)
    return saved


def open_curve(spec: RunSpec, file: IO[str], kept: list[EvalPoint], saved: Checkpoint | None) -> CurveWriter:
    if saved is None:
        return CurveWriter(spec, file)
    return CurveWriter(spec, file, kept, saved.block_losses_nats, saved.wall_time_s)


def keep(folder: Path, planned: PlannedRun, session: Session, curve: CurveWriter, step: int) -> None:
    """Checkpoint. A disk that refuses is a warning: the run goes on, and would begin from an older one."""
    try:
        curve.flush(durable=True)
        save_checkpoint(
            folder,
            Checkpoint(
                run_id=planned.run_id,
                step=step,
                curve_points=len(curve.points),
                block_losses_nats=curve.block_losses_nats,
                wall_time_s=curve.wall_time_s,
                execution=planned.execution,
                tensors=session.step.state(),
            ),
        )
    except OSError as error:
        log.warning("run %s: no checkpoint at step %d (%s).", planned.run_id, step, error)


def open_session(spec: RunSpec, execution: Execution, expected_fingerprint: str | None = None) -> Session:
    """Build the model, load the data and check that it is the plan's."""
    device = apply_execution(execution)
    fingerprint = spec.data.fingerprint()
    if expected_fingerprint not in (None, fingerprint):
        raise UserError(
            f"data={spec.data.kind} on this machine (content {fingerprint[:12]}) is not the plan's "
            f"({str(expected_fingerprint)[:12]}): losses would not compare. Use the same Python version and files, "
            "or make a new sweep."
        )
    train = read_tokens(spec.data, "train")
    context = spec.shape.context
    windows = n_windows(train.size, context)
    if windows < 1:
        raise UserError(
            f"data={spec.data.kind} has {train.size} tokens: less than one window of model.context={context}."
        )
    torch.manual_seed(spec.seed_init)
    model = build_model(spec.shape).to(device)
    return Session(
        spec=spec,
        device=device,
        step=TrainStep(model, device_tokens(train, device), spec, execution),
        order=WindowOrder(windows, spec.seed_data),
        validation=ValidationSet(read_tokens(spec.data, "validation"), context, spec.eval, device),
        fingerprint=fingerprint,
    )


def device_tokens(tokens: np.ndarray, device: torch.device) -> Tensor:
    """The corpus on the device, in the smallest torch dtype that holds it (torch cannot index uint16)."""
    small = {1: np.uint8, 2: np.int32, 4: np.int64, 8: np.int64}[tokens.dtype.itemsize]
    if tokens.dtype == np.int32:
        small = np.int32
    return torch.from_numpy(np.array(tokens, dtype=small)).to(device)


def blocks(spec: RunSpec, done: int = 0) -> Iterator[tuple[int, int]]:
    """Stretches of steps (first counted from 0, last counted from 1) after `done`, each ending where validation is due
    at the latest."""
    due = sorted({*evaluation_steps(spec), *range(BLOCK_STEPS, spec.steps, BLOCK_STEPS), spec.steps})
    first = done
    for last in (step for step in due if step > done):
        yield first, last
        first = last


def train_block(session: Session, first: int, last: int) -> list[float]:
    """Steps first .. last - 1 (from 0); the losses come back in one read."""
    spec, count = session.spec, last - first
    windows = session.order.windows(first * spec.batch_sequences, count * spec.batch_sequences)
    starts = torch.from_numpy(windows * spec.shape.context).view(count, -1).to(session.device)
    rates = [spec.learning_rate(step) for step in range(first, last)]
    controls = control_rows(rates, first, spec.optimizer).to(session.device)
    losses = [session.step(starts[i], controls[i]) for i in range(count)]
    out: list[float] = torch.stack(losses).double().tolist()
    return out


def validation_loss(session: Session) -> tuple[float, float]:
    return session.validation.loss(session.step.model, session.step.parameters(), dtype=session.spec.dtype)


def record_block(
    curve: CurveWriter, first: int, losses: list[float], validation: tuple[float, float] | None
) -> Iterator[EvalPoint]:
    """Add a block's losses to the curve, up to the first that is not finite; yields the points made."""
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            return
        at_end = (
            validation
            if i == len(losses) - 1 and validation and math.isfinite(validation[0])
            else (None, None)
        )
        point = curve.add(first + i + 1, loss, *at_end)
        if point:
            yield point


def divergence(losses: list[float], validation: tuple[float, float] | None, spec: RunSpec) -> str | None:
    """Why the run is lost, or None."""
    mean = sum(losses) / len(losses)
    limit = math.log(spec.shape.vocab_size) + DIVERGED_ABOVE_UNIFORM_NATS
    if not math.isfinite(mean):
        return "the training loss is not finite"
    if mean > limit:
        return f"the training loss, {mean:.3g} nats, is far above a uniform guess of {math.log(spec.shape.vocab_size):.3g}"
    if validation and not math.isfinite(validation[0]):
        return "the validation loss is not finite"
    return None


def make_record(
    planned: PlannedRun, session: Session, curve: CurveWriter, status: RunStatus, reason: str | None
) -> RunRecord:
    """The record of a run that is over."""
    count = planned.spec.count()
    last = curve.points[-1] if curve.points else None
    done = status is RunStatus.COMPLETED and last is not None
    return RunRecord(
        run_id=planned.run_id,
        spec=planned.spec,
        execution=planned.execution,
        params=count.params,
        flops=count.flops,
        status=status,
        reason=reason,
        final_val_loss_nats=last.val_loss_nats if done and last else None,
        final_val_loss_sem_nats=last.val_loss_sem_nats if done and last else None,
        wall_time_s=round(curve.wall_time_s, 3),
        environment=environment(session.device, session.fingerprint),
        curve_points=len(curve.points),
        curve=tuple(curve.points),
    )


class Pulse:
    """The run's heartbeat: says every couple of seconds, through the claim, how far it is."""

    def __init__(self, claim: Claim, spec: RunSpec) -> None:
        self._claim, self._spec = claim, spec
        self._last_time = time.monotonic()
        self._last_step = 0

    def beat(self, step: int, train_loss_nats: float) -> None:
        now = time.monotonic()
        if now - self._last_time < HEARTBEAT_S:
            return
        speed = (step - self._last_step) * self._spec.batch_tokens / (now - self._last_time)
        self._claim.heartbeat(step, self._spec.steps, speed, train_loss_nats)
        self._last_time, self._last_step = now, step


class Timer:
    """Says every `every_s` seconds that it is time."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last = every_s, time.monotonic()

    def is_due(self) -> bool:
        if time.monotonic() - self._last < self._every_s:
            return False
        self._last = time.monotonic()
        return True


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM, SIGINT and SIGUSR1 set a flag that the loop reads between blocks of steps."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    kinds = [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)]
    before = {kind: signal.signal(kind, lambda *_: flag.set()) for kind in kinds}
    try:
        yield flag.is_set
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
