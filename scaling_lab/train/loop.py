"""Owns training one run: from its spec to its record. Reads like a table of contents; each step of it is elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from scaling_lab.core.claims import Claim, ClaimLost
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import EvalPoint, RunRecord, RunStatus
from scaling_lab.core.spec import Execution, PlannedRun, RunSpec
from scaling_lab.core.store import RunStore
from scaling_lab.train.checkpoint import KEPT, Checkpoint, clean, load_latest, save_checkpoint
from scaling_lab.train.curve import CurveWriter
from scaling_lab.train.data import read_tokens
from scaling_lab.train.devices import apply_execution, environment
from scaling_lab.train.divergence import Divergence
from scaling_lab.train.evaluate import ValidationSet, evaluation_steps
from scaling_lab.train.models import build_model
from scaling_lab.train.optim import control_rows
from scaling_lab.train.order import WindowOrder, n_windows
from scaling_lab.train.step import LOSS, TrainStep
from scaling_lab.train.stopping import listen
from scaling_lab.train.tracking import NoTracker, Tracker

log = logging.getLogger(__name__)

# Losses are read back from the device, and signals looked at, after about this time and at most this many steps.
BLOCK_S = 0.5
BLOCK_STEPS = 64
HEARTBEAT_S = 2.0
# A killed run loses at most this much work; a checkpoint of a tiny model takes milliseconds.
CHECKPOINT_EVERY_S = 30.0


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

    Raises `stopping.Interrupted` (the claim is released), `ClaimLost` (another process has it) or `UserError` (the data
    are not the plan's); an error of the run itself becomes a record with status FAILED.
    """
    spec, tracker = planned.spec, tracker or NoTracker()
    folder = store.run_folder(planned.run_id)
    with Pulse(claim, spec) as pulse, listen() as asked:
        with asked.nothing_to_save():
            session = open_session(spec, planned.execution, expected_fingerprint)
        # From here on files are changed: whoever was superseded while it loaded must not touch them.
        claim.check()
        clean(folder / "checkpoint")
        saved = resume(session, planned, store)
        kept = store.read_curve(planned.run_id)[: saved.curve_points] if saved else []
        with store.start_curve(planned.run_id, kept) as file:
            curve = open_curve(spec, file, kept, saved)
            tracker.start(planned, session.fingerprint)
            for point in kept:  # each attempt's mirror is whole in itself
                tracker.log(point)
            done = saved.step if saved else 0
            pulse.begin(done)
            clock, watch = Timer(checkpoint_every_s), Divergence(spec, saved.divergence if saved else None)
            for first, last in blocks(spec, done):
                # The first block is one step, and compiles it.
                with asked.nothing_to_save(first == done):
                    losses = train_block(session, first, last)
                validation = validation_loss(session) if last in evaluation_steps(spec) else None
                for point in record_block(curve, first, losses, validation, watch):
                    tracker.log(point)
                curve.flush()
                if watch.reason:
                    break
                pulse.progress(last, losses[-1])
                if clock.is_due() or asked() or last == spec.steps:
                    pulse.check()
                    if keep(folder / "checkpoint", planned, session, curve, watch, last):
                        asked.saved()
                if last < spec.steps:
                    asked.answer()
        record = make_record(planned, session, curve, watch.reason)
        pulse.check()
        if not store.write_record(record):
            raise ClaimLost(f"run {planned.run_id} already has a record")
    tracker.finish(record)
    return record


def resume(session: Session, planned: PlannedRun, store: RunStore) -> Checkpoint | None:
    """Take over the newest whole checkpoint whose part of the curve is there too; None: begin from the beginning."""
    folder = store.run_folder(planned.run_id) / "checkpoint"
    saved = load_latest(folder, planned.run_id, planned.execution, session.fingerprint)
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


def keep(
    folder: Path, planned: PlannedRun, session: Session, curve: CurveWriter, watch: Divergence, step: int
) -> bool:
    """Checkpoint; says whether it is on the disk. A disk that refuses is a warning: the run goes on, and would begin
    from an older one."""
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
                data_fingerprint=session.fingerprint,
                tensors=session.step.state(),
                divergence=watch.state(),
            ),
            # A run that is over needs one: its weights, to sample from.
            keep=1 if step == planned.spec.steps else KEPT,
        )
    except OSError as error:
        log.warning("run %s: no checkpoint at step %d (%s).", planned.run_id, step, error)
        return False
    return True


def open_session(spec: RunSpec, execution: Execution, expected_fingerprint: str | None = None) -> Session:
    """Build the model, load the data and check that it is the plan's."""
    device = apply_execution(execution, spec.dtype)
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
    model = build_model(spec.shape, spec.parametrization).to(device)
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
    """Stretches of steps (first counted from 0, last counted from 1) after `done`: about `BLOCK_S` seconds each as far
    as steps allow, ending where validation is due at the latest. What is computed does not depend on them."""
    due = [step for step in evaluation_steps(spec) if step > done]
    size, first = 1, done
    while first < spec.steps:
        began = time.monotonic()
        last = min(first + size, next(step for step in due if step > first))
        yield first, last
        elapsed = time.monotonic() - began
        if elapsed < BLOCK_S / 2:
            size = min(2 * size, BLOCK_STEPS)
        elif elapsed > 2 * BLOCK_S:
            size = max(1, size // 2)
        first = last


def train_block(session: Session, first: int, last: int) -> list[float]:
    """Steps first .. last - 1 (from 0); the losses come back in one read."""
    spec, count = session.spec, last - first
    windows = session.order.windows(first * spec.batch_sequences, count * spec.batch_sequences)
    starts = torch.from_numpy(windows * spec.shape.context).view(count, -1).to(session.device)
    rates = [spec.learning_rate(step) for step in range(first, last)]
    controls = control_rows(rates, first, spec.optimizer).to(session.device)
    # Read back first: not every device has float64 (MPS).
    out: list[float] = session.step.run(starts, controls)[:, LOSS].cpu().double().tolist()
    return out


def validation_loss(session: Session) -> tuple[float, float | None]:
    spec, step = session.spec, session.step
    return session.validation.loss(
        step.model, step.parameters(), dtype=spec.dtype, vocab_size=spec.shape.vocab_size
    )


def record_block(
    curve: CurveWriter,
    first: int,
    losses: list[float],
    validation: tuple[float, float | None] | None,
    watch: Divergence,
) -> Iterator[EvalPoint]:
    """Add a block's losses to the curve, up to the step at which the run diverged; yields the points made."""
    for i, loss in enumerate(losses):
        if watch.step(loss):
            return
        at_end: tuple[float | None, float | None] = (None, None)
        if validation and i == len(losses) - 1 and not watch.validation(validation[0]):
            at_end = validation
        point = curve.add(first + i + 1, loss, *at_end)
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
    )


class Pulse:
    """The claim's heartbeat, from a thread: compiling, evaluating or a slow step must not look like a dead process.

    The claim is released at the end, however the run ended. `check` raises `ClaimLost` if somebody took the run over.
    """

    def __init__(self, claim: Claim, spec: RunSpec) -> None:
        self._claim, self._spec = claim, spec
        self._stop, self._lost = threading.Event(), threading.Event()
        self._done = self._began_at = 0
        self._loss: float | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True, name="heartbeat")

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._claim.release()
        except OSError as problem:
            log.warning("the claim could not be released (%s): it ends with this process.", problem)

    def begin(self, step: int) -> None:
        """Training begins after `step`: speed is counted from here."""
        self._done = self._began_at = step
        self._began = time.monotonic()

    def progress(self, step: int, train_loss_nats: float) -> None:
        """Say how far the run is; raises `ClaimLost`."""
        self._done, self._loss = step, train_loss_nats
        if self._lost.is_set():
            self._claim.check()

    def check(self) -> None:
        self._claim.check()

    def _work(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            elapsed = time.monotonic() - self._began
            speed = (self._done - self._began_at) * self._spec.batch_tokens / elapsed
            try:
                self._claim.heartbeat(self._done, self._spec.steps, speed or None, self._loss)
            except ClaimLost:
                self._lost.set()
                return
            except OSError as problem:
                log.warning("run %s: no heartbeat (%s).", self._spec.run_id(), problem)


class Timer:
    """Says every `every_s` seconds that it is time."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._last = every_s, time.monotonic()

    def is_due(self) -> bool:
        if time.monotonic() - self._last < self._every_s:
            return False
        self._last = time.monotonic()
        return True
