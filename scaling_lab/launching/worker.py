"""The worker process: it claims a sweep's pending runs, longest first, and trains them until none is left.

    python -m scaling_lab.worker FOLDER [--run-ids A,B] [--tracker JSON]        (or: scaling-lab worker FOLDER)
    torchrun --nproc_per_node=8 -m scaling_lab.worker FOLDER [--parallel ddp|fsdp]        each run on all processes

Any number of workers may share a folder, on one machine or several: claims assign each run to one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import EXIT_REQUEUE, DiskError, Interrupted, UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Plan, PlannedRun
from scaling_lab.core.storage.claims import Claim, ClaimLost
from scaling_lab.core.storage.files import disk_error
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.preparation import with_corpus
from scaling_lab.planning.replan import plan_command
from scaling_lab.tracking.sink.trackers import make_tracker, mirrors_closed
from scaling_lab.training.engine.devices import cuda_has_bfloat16, cuda_name, resolve_device, run_environment
from scaling_lab.training.engine.process_errors import process_retries
from scaling_lab.training.parallel.team import PARALLEL, TeamLost, joined
from scaling_lab.training.run.checkpoint import kept_path, remove_checkpoints
from scaling_lab.training.run.follower import Follower
from scaling_lab.training.run.loop import CHECKPOINT_EVERY_S, ClaimedRun, train_together
from scaling_lab.training.run.member import Member
from scaling_lab.training.run.stopping import Requests, listen

log = logging.getLogger(__name__)

PARENT_POLL_S = 1.0
EXIT_DISK = 74


def longest_first(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The order in which workers take runs: a long run that started last would delay the end of the sweep."""
    return sorted(runs, key=lambda run: (-run.spec.own_train_flops(), run.run_id))


def train_pending(
    store: RunStore,
    plan: Plan,
    run_ids: Sequence[str] | None = None,
    tracker: dict[str, Any] | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> list[RunRecord]:
    """Train every run that has not finished and that no other process trains; returns the records made here.

    Raises:
        Interrupted: this process was asked to stop.
        DiskError: the folder cannot be written.
        UserError: the data differ from the plan's.
    """
    wanted = None if run_ids is None else set(run_ids)
    for device in {run.execution.device for run in plan.runs}:
        resolve_device(device)
    plan = with_corpus(plan, store.folder)
    made: list[RunRecord] = []
    if wanted is not None:
        # A branch starts from its trunk, which is trained here unless another process trains it.
        wanted |= {r.spec.parent for r in plan.runs if r.run_id in wanted and r.spec.parent is not None}
    pending = longest_first([r for r in plan.runs if wanted is None or r.run_id in wanted])
    refuse_missing_bfloat16(pending, plan, store)
    with mirrors_closed(), listen() as requests:
        for group in ready_first(store, list(training_groups(pending, plan)), wanted, requests):
            # A request to stop that came as the previous run ended: no other run is started.
            requests.handle()
            mine = [r for r in group if (wanted is None or r.run_id in wanted) and is_ready(store, r)]
            try:
                claims = {planned.run_id: store.claim(planned.spec) for planned in mine}
            except OSError as error:
                raise disk_error(error, store.folder) or error from error
            claimed = {run_id: claim for run_id, claim in claims.items() if claim is not None}
            if claimed:
                ended = train_group(group, claimed, store, plan.data_fingerprint, tracker, checkpoint_every_s)
                release_kept_checkpoints(store, ended)
                made += ended
    return made


def refuse_missing_bfloat16(runs: Iterable[PlannedRun], plan: Plan, store: RunStore) -> None:
    """Raise `UserError` if runs are planned in bfloat16, which this GPU lacks: it would be emulated, slowly."""
    needed = any(run.spec.dtype == "bfloat16" and run.execution.device == "cuda" for run in runs)
    if needed and cuda_has_bfloat16() is False:
        line = plan_command(plan, store.folder, dtype="float32", sweep=f"{plan.sweep}-float32")
        raise UserError(
            f"sweep {plan.sweep} is planned with dtype=bfloat16, which this GPU ({cuda_name()}) does not have. Plan it in "
            f"float32: {line}"
        )


def release_kept_checkpoints(store: RunStore, ended: Sequence[RunRecord]) -> None:
    """Delete the checkpoints that a parent kept for its children once it and all of them are completed."""
    related = {r.spec.parent or r.run_id for r in ended if r.spec.parent is not None or r.spec.keep_steps}
    for parent in sorted(related):
        family = store.family(parent)
        if family and all(store.state(run_id).state == RunStatus.COMPLETED for run_id in family):
            remove_checkpoints(store.run_folder(parent) / "checkpoint", "kept-*")


def training_groups(runs: Iterable[PlannedRun], plan: Plan) -> Iterator[list[PlannedRun]]:
    """Runs that are trained as one program: single runs, and stacks, in the plan's order, at their first member's turn."""
    seen = set()
    for run in runs:
        stack = run.execution.stack
        if stack is None:
            yield [run]
        elif stack not in seen:
            seen.add(stack)
            yield [member for member in plan.runs if member.execution.stack == stack]


def ready_first(
    store: RunStore, waiting: list[list[PlannedRun]], wanted: set[str] | None, requests: Requests
) -> Iterator[list[PlannedRun]]:
    """The groups in order; runs that start from a parent's checkpoint come once the checkpoint exists.

    While another process trains the remaining parents this one waits, and takes them over if that process dies. A run
    whose parent finished without the checkpoint is recorded as failed.
    """
    all_groups = list(waiting)
    while waiting:
        later = []
        for group in waiting:
            mine = [r for r in group if wanted is None or r.run_id in wanted]
            unready = [r for r in mine if not is_ready(store, r)]
            for run in [r for r in unready if has_finished(store, r.spec.parent)]:
                # Checked again: the parent may have written its checkpoint and its record in between.
                if not is_ready(store, run):
                    fail_orphan(store, run)
            unready = [r for r in unready if not has_finished(store, r.run_id)]
            if len(unready) < len(mine):
                yield group
            if unready:
                later.append(group)
        if later and len(later) == len(waiting):
            requests.handle()
            time.sleep(PARENT_POLL_S)
            # The process that trains them may have died: they are offered again.
            parents = {r.spec.parent for group in later for r in group if not is_ready(store, r)}
            yield from (group for group in all_groups if any(r.run_id in parents for r in group))
        waiting = later


def is_ready(store: RunStore, run: PlannedRun) -> bool:
    """Whether the checkpoint that the run starts from, if any, exists."""
    spec = run.spec
    if spec.parent is None:
        return True
    kept = kept_path(store.run_folder(spec.parent) / "checkpoint", spec.parent_step)
    return kept.with_suffix(".json").exists()


def has_finished(store: RunStore, run_id: str | None) -> bool:
    return run_id is not None and (store.run_folder(run_id) / "record.json").exists()


def fail_orphan(store: RunStore, run: PlannedRun) -> None:
    """Record that the run cannot be trained: its parent finished without a checkpoint at that step."""
    claim = store.claim(run.spec)
    if claim is None:
        return
    why = f"parent run {run.spec.parent} finished without a checkpoint at step {run.spec.parent_step}"
    store.write_record(failed_record(run, store, "", why))
    claim.release()


def train_claimed(
    planned: PlannedRun,
    store: RunStore,
    claim: Claim,
    fingerprint: str | None,
    tracker: dict[str, Any] | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> RunRecord | None:
    """Train one claimed run; its errors become a FAILED record and do not stop the sweep."""
    claims = {planned.run_id: claim}
    records = train_group([planned], claims, store, fingerprint, tracker, checkpoint_every_s)
    return records[0] if records else None


def train_group(
    group: Sequence[PlannedRun],
    claims: Mapping[str, Claim],
    store: RunStore,
    fingerprint: str | None,
    tracker: dict[str, Any] | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> list[RunRecord]:
    """Train the claimed runs of a group; returns the records made.

    An error becomes a FAILED record: of one member if it is that member's own, otherwise of every unfinished member.
    """
    claimed = {
        run_id: ClaimedRun(claim, make_tracker(tracker, store.folder)) for run_id, claim in claims.items()
    }
    try:
        members = train_together(
            group,
            claimed,
            store,
            expected_fingerprint=fingerprint,
            checkpoint_every_s=checkpoint_every_s,
        )
    except BaseException:
        for one in claimed.values():
            one.tracker.abandon()
        raise
    records = [member.record or record_failure(member, store, fingerprint) for member in members]
    return [record for record in records if record is not None]


def record_failure(member: Member, store: RunStore, fingerprint: str | None) -> RunRecord | None:
    """Record that a run failed. None if another process has taken it over: then the error is not the run's.

    Raises `DiskError` if the disk caused the error: then no run failed.
    """
    planned, error = member.planned, member.error
    assert error is not None
    full_disk = disk_error(error, store.folder) if isinstance(error, OSError) else None
    if full_disk is not None:
        member.tracker.abandon()
        raise full_disk from error
    if isinstance(error, ClaimLost):
        log.warning("run %s was taken over by another process.", planned.run_id)
    else:
        log.error("run %s failed:\n%s", planned.run_id, "".join(traceback.format_exception(error)))
        record = failed_record(planned, store, fingerprint or "", f"{type(error).__name__}: {error}")
        try:
            member.claim.check()
            if store.write_record(record):
                member.tracker.finish(record)
                return record
        except ClaimLost:
            pass
    member.tracker.abandon()
    return None


def failed_record(planned: PlannedRun, store: RunStore, fingerprint: str, reason: str) -> RunRecord:
    """The record of a run that an error ended."""
    count = planned.spec.count()
    curve = tuple(store.read_curve(planned.run_id))
    return RunRecord(
        run_id=planned.run_id,
        spec=planned.spec,
        execution=planned.execution,
        params=count.params,
        flops=count.flops,
        status=RunStatus.FAILED,
        reason=" ".join(reason.split())[:500],
        final_val_loss_nats=None,
        final_val_loss_sem_nats=None,
        wall_time_s=curve[-1].wall_time_s if curve else 0.0,
        environment=run_environment(None, fingerprint, planned.execution.device),
        curve_points=len(curve),
        process_retries=process_retries(store.run_folder(planned.run_id)),
        curve=curve,
    )


def stop_with_parent(parent: int) -> None:
    """Stop this process, with a checkpoint, once its parent is gone: a killed launcher cannot stop it."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    log.warning("the launcher is gone: stopping after a checkpoint.")
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class WorkerOptions:
    """What one worker process trains, and how."""

    folder: Path
    """The sweep's folder."""
    run_ids: tuple[str, ...] | None = None
    """None: every run of the plan."""
    tracker: dict[str, Any] | None = None
    """`kind` and the tracker's options."""
    parallel: str = "auto"
    checkpoint_every_s: float = CHECKPOINT_EVERY_S


def run_worker(options: WorkerOptions) -> int:
    """Train until no run is left for this process; returns its exit status, 0.

    Under torchrun or srun all processes train each run together, and this one may be led by another. Raises `UserError`,
    and `Interrupted` when told to stop.
    """
    store = RunStore(options.folder)
    with joined(options.parallel) as team, listen():
        if team is not None and not team.leads:
            return Follower(team).serve()
        run_ids = options.run_ids
        train_pending(store, store.read_plan(run_ids), run_ids, options.tracker, options.checkpoint_every_s)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when nothing is left to train, 2 for bad input, 74 if the disk cannot be written, 75 when told to stop."""
    parser = argparse.ArgumentParser(prog="python -m scaling_lab.worker", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run-ids", default=None)
    parser.add_argument("--stop-with", type=int, default=None, help="pid of the parent: stop when it is gone")
    parser.add_argument("--checkpoint-every-s", type=float, default=CHECKPOINT_EVERY_S)
    parser.add_argument("--tracker", default=None, help="JSON: kind and options")
    parser.add_argument("--parallel", default="auto", help=f"under torchrun or srun: {', '.join(PARALLEL)}")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if given.stop_with is not None:
        threading.Thread(target=stop_with_parent, args=(given.stop_with,), daemon=True).start()
    options = WorkerOptions(
        given.folder,
        tuple(given.run_ids.split(",")) if given.run_ids else None,
        json.loads(given.tracker) if given.tracker else None,
        given.parallel,
        given.checkpoint_every_s,
    )
    try:
        return run_worker(options)
    except UserError as error:
        # On a full disk the message may not reach the log: the exit status carries it too.
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_DISK if isinstance(error, DiskError) else 2
    except (Interrupted, KeyboardInterrupt) as stop:
        if isinstance(stop, TeamLost):
            log.warning("%s: stopping; the runs go on another time.", stop)
        return EXIT_REQUEUE
