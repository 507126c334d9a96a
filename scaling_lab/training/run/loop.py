"""Owns training: from claimed runs to their records. Reads like a table of contents; each step of it is elsewhere.

A run alone and a stack of runs take the same way: a stack is several members on one program. Members are at their own
steps; one that is over, lost or in error leaves its slot at rest, and the others go on as if nothing had happened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.claims import Claim
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.memory import next_smaller_micro_batch
from scaling_lab.tracking.sink.trackers import NoTracker, Tracker
from scaling_lab.training.data.feed import BLOCK_STEPS
from scaling_lab.training.engine.memory import is_out_of_memory, noted_parts, release_memory
from scaling_lab.training.parallel.distributed import current_team
from scaling_lab.training.run.member import Member, Progress, keep
from scaling_lab.training.run.pulse import Timer
from scaling_lab.training.run.session import Program, check_data, open_program, open_session, train_block
from scaling_lab.training.run.stopping import Requests, listen

__all__ = ["open_session", "train_block", "train_run", "train_together"]

log = logging.getLogger(__name__)

# Losses are read back from the device, and signals looked at, after about this time and at most this many steps.
BLOCK_S = 0.5
# A killed run loses at most this much work; a checkpoint of a tiny model takes milliseconds.
CHECKPOINT_EVERY_S = 30.0


@dataclass(frozen=True)
class Claimed:
    """A run that this process may train, and where it is mirrored."""

    claim: Claim
    tracker: Tracker = field(default_factory=NoTracker)


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

    Raises `stopping.Interrupted` (the claim is released), `ClaimLost` (another process has it), `UserError` (the data are
    not the plan's), or the run's own error.
    """
    (member,) = train_together(
        [planned],
        {planned.run_id: Claimed(claim, tracker or NoTracker())},
        store,
        expected_fingerprint=expected_fingerprint,
        checkpoint_every_s=checkpoint_every_s,
    )
    if member.error is not None:
        raise member.error
    assert member.record is not None
    return member.record


def train_together(
    group: Sequence[PlannedRun],
    claimed: Mapping[str, Claimed],
    store: RunStore,
    *,
    expected_fingerprint: str | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> list[Member]:
    """Train the claimed runs of `group`: one run, or all of a stack, whose program has a slot for every one of them.

    Where memory runs out it begins again from the last checkpoints, the micro-batch halved. Raises `Interrupted` or
    `UserError`; any other error is in the members: one member's own, or the program's in all that were not over.
    """
    members = [
        Member(planned, store, claimed[planned.run_id].claim, claimed[planned.run_id].tracker, slot)
        for slot, planned in enumerate(group)
        if planned.run_id in claimed
    ]
    try:
        with ExitStack() as pulses, listen() as asked:
            for member in members:
                pulses.enter_context(member.pulse)
            while running(members):
                with together(members):
                    train_members(group, members, asked, expected_fingerprint, checkpoint_every_s)
                # Nothing but after memory ran out; the failed attempt's traceback, which held its tensors, is gone.
                if running(members):
                    release_memory()
    finally:
        for member in members:
            if member.record is not None:
                member.tracker.finish(member.record)
    return members


def train_members(
    group: Sequence[PlannedRun],
    members: Sequence[Member],
    asked: Requests,
    expected_fingerprint: str | None,
    checkpoint_every_s: float,
) -> None:
    """From the last checkpoints to the records."""
    with ExitStack() as curves:
        with asked.nothing_to_save():
            program = prepare(group, members, expected_fingerprint)
        for member in running(members):
            with separately(member):
                curves.enter_context(member.begin(program.sessions[member.slot]))
        finish(members)  # killed between its last checkpoint and its record
        clock, fresh = Timer(checkpoint_every_s), True
        for count in blocks(members, program.max_block_steps):
            live = running(members)
            # The first block is one step, and compiles it.
            with asked.nothing_to_save(fresh):
                told = program.run_block({member.slot: member.done for member in live}, count)
            fresh = False
            for member in live:
                with separately(member):
                    member.take(told[:, member.slot], program.step.micro)
            save(live, asked, everybody=clock.is_due() or asked())
            finish(live)
            if running(members):
                asked.answer()


def prepare(
    group: Sequence[PlannedRun], members: Sequence[Member], expected_fingerprint: str | None
) -> Program:
    """Look for checkpoints, then build the program; the smallest micro-batch that a checkpoint or a note knows is taken."""
    fingerprint = check_data(group[0].spec, expected_fingerprint)
    if team := current_team():
        team.run_folder = members[0].folder
    sizes = []
    for member in running(members):
        member.look_back(fingerprint)
        written = member.saved.execution if member.saved else member.planned.execution
        known = (written.micro_batch_sequences, member.micro, noted_parts(member.folder))
        sizes += [size for size in known if size is not None]
    execution = replace(group[0].execution, micro_batch_sequences=min(sizes, default=None))
    for member in running(members):
        member.compute_in_parts_of(execution.micro_batch_sequences)
    stacked = execution.stack is not None
    return open_program([planned.spec for planned in group], execution, fingerprint, stacked=stacked)


def running(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if not member.over]


def blocks(members: Sequence[Progress], most: int = BLOCK_STEPS) -> Iterator[int]:
    """Numbers of steps to do next, until all members are over: about `BLOCK_S` seconds each as far as steps allow, ending
    where any member's validation is due at the latest. What is computed does not depend on them."""
    size = 1
    while live := [member for member in members if not member.over]:
        began = time.monotonic()
        yield min(size, *(member.until_visit() for member in live))
        elapsed = time.monotonic() - began
        if elapsed < BLOCK_S / 2:
            size = min(2 * size, most)
        elif elapsed > 2 * BLOCK_S:
            size = max(1, size // 2)


def finish(members: Sequence[Member]) -> None:
    """Write the records of those at their last step."""
    for member in running(members):
        if member.done == member.spec.steps:
            with separately(member):
                member.finish()


def save(members: Sequence[Member], asked: Requests, everybody: bool) -> None:
    """Checkpoint `everybody`, or who is at the end."""
    written = []
    for member in running(members):
        if everybody or member.done == member.spec.steps:
            with separately(member):
                member.pulse.check()
                folder = member.folder / "checkpoint"
                written.append(
                    keep(folder, member.planned, member.session, member.curve, member.watch, member.done)
                )
    if written and all(written):
        asked.saved()


@contextmanager
def together(members: Sequence[Member]) -> Iterator[None]:
    """An error within it ends all members that are not over, except where smaller parts may help against it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error) and take_smaller_parts(members):
            return
        for member in running(members):
            member.drop(error)


@contextmanager
def separately(member: Member) -> Iterator[None]:
    """An error within it is this member's alone, and the others of its stack go on."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        member.drop(error)


def take_smaller_parts(members: Sequence[Member]) -> bool:
    """Halve the micro-batch of those that are not over; False where it is a single sequence already."""
    for member in running(members):
        smaller = next_smaller_micro_batch(member.spec.batch_sequences, member.micro)
        if smaller is None:
            return False
        log.warning(
            "run %s: out of memory; it goes on with micro-batches of %d of its %d sequences.",
            member.planned.run_id, smaller, member.spec.batch_sequences,
        )  # fmt: skip
        member.compute_in_parts_of(smaller)
        member.let_go()
    return True
