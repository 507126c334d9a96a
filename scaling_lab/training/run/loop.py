"""The training loop, from claimed runs to their records. It reads like a table of contents: each step is defined elsewhere.

A single run and a stack of runs are trained the same way: a stack is several members that share one program. Members may be
at different steps; one that is over, lost or failed leaves its slot idle, and the others continue as before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from scaling_lab.core.errors import DeviceLost, UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.claims import Claim
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.cost import CHECKPOINT_BYTES_PER_PARAM
from scaling_lab.planning.memory import (
    BLOCK_STEPS,
    activation_bytes,
    next_smaller_micro_batch,
    state_bytes,
)
from scaling_lab.tracking.sink.trackers import NoTracker, Tracker
from scaling_lab.training.engine.memory import (
    collect_garbage,
    garbage_frozen,
    is_out_of_memory,
    load_micro_batch_hint,
    release_memory,
)
from scaling_lab.training.engine.process_errors import (
    is_device_error,
    note_process_error,
    refuse_repeated_errors,
)
from scaling_lab.training.parallel.team import current_team
from scaling_lab.training.run.checkpoint_writer import CheckpointWriter
from scaling_lab.training.run.member import Member, StepCounter
from scaling_lab.training.run.session import Program, check_data, open_program
from scaling_lab.training.run.stopping import Requests, listen

log = logging.getLogger(__name__)

# Losses are read back from the device, and requests handled, after about this time or BLOCK_STEPS steps.
BLOCK_S = 0.5
# A killed run loses at most this much work, or more where checkpoints are slow (`CheckpointWriter`).
CHECKPOINT_EVERY_S = 30.0


@dataclass(frozen=True)
class ClaimedRun:
    """A run that this process may train, and its tracker."""

    claim: Claim
    tracker: Tracker = field(default_factory=NoTracker)


@dataclass(frozen=True)
class Part:
    """What one program trains: a slot for each run of `group`, and the runs among them that are claimed."""

    group: tuple[PlannedRun, ...]
    members: list[Member]

    @staticmethod
    def of(members: Sequence[Member]) -> Part:
        """A program for these members only."""
        for slot, member in enumerate(members):
            member.slot = slot
        return Part(tuple(member.planned for member in members), list(members))


def train_run(
    planned: PlannedRun,
    store: RunStore,
    claim: Claim,
    tracker: Tracker | None = None,
    *,
    expected_fingerprint: str | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> RunRecord:
    """Train one claimed run, from its last checkpoint if it has one, and write its record. Divergence is a record too.

    Raises `Interrupted` (the claim is released), `ClaimLost` (another process has the run), `UserError` (the data are not
    the plan's), or the run's own error.
    """
    (member,) = train_together(
        [planned],
        {planned.run_id: ClaimedRun(claim, tracker or NoTracker())},
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
    claimed: Mapping[str, ClaimedRun],
    store: RunStore,
    *,
    expected_fingerprint: str | None = None,
    checkpoint_every_s: float = CHECKPOINT_EVERY_S,
) -> list[Member]:
    """Train the claimed runs of `group`: a single run, or all runs of a stack, whose program has a slot for each of them.

    If memory runs out, it resumes from the last checkpoints with half the micro-batch, or half the stack. Raises `Interrupted` or `UserError`;
    other errors are stored in the members: a member's own error, or the program's in all members that were not over.
    """
    members = [
        Member(planned, store, claimed[planned.run_id].claim, claimed[planned.run_id].tracker, slot)
        for slot, planned in enumerate(group)
        if planned.run_id in claimed
    ]
    parts = [Part(tuple(group), members)]
    try:
        with ExitStack() as heartbeats, listen() as requests:
            for member in members:
                heartbeats.enter_context(member.heartbeat)
            while parts:
                part = parts.pop(0)
                with fail_all_on_error(part, parts):
                    train_members(part, requests, expected_fingerprint, checkpoint_every_s)
                # Only if memory ran out. The failed attempt's traceback, which held its tensors, is gone by now.
                if running(part.members):
                    release_memory()
    finally:
        for member in members:
            member.close()
            if member.record is not None:
                member.tracker.finish(member.record)
        collect_garbage(group[0].execution.device)
    return members


def train_members(
    part: Part, requests: Requests, expected_fingerprint: str | None, checkpoint_every_s: float
) -> None:
    """Train from the last checkpoints to the records."""
    members = part.members
    with ExitStack() as resources:
        with requests.handled_at_once():
            program = prepare(part.group, members, expected_fingerprint)
        writer = CheckpointWriter(checkpoint_every_s, saved_bytes(members))
        for member in running(members):
            with fail_on_error(member):
                resources.enter_context(member.begin(program.sessions[member.slot], writer))
        resources.enter_context(writer)  # left before the curves are closed
        finish(members)  # those that were killed between their last checkpoint and their record
        records, compiled = BlockRecords(program), False
        for count in blocks(members, program.max_block_steps):
            live = running(members)
            # The first block is a single step, which compiles the program.
            with requests.handled_at_once(not compiled):
                records.run(live, count)
            if not compiled:
                resources.enter_context(garbage_frozen())
                compiled = True
            due = writer.is_due() or requests.checkpoint
            if program.overlaps and not due and not any(member.pauses for member in live):
                continue  # the block is recorded while the next one is computed
            records.write()
            save(live, requests, writer, everyone=due or requests.checkpoint)
            finish(live)
            if running(members):
                requests.handle()


class BlockRecords:
    """Runs blocks of steps and adds their metrics to the curves: on a GPU while the next block is computed, if it is not to
    be saved or evaluated before. Inputs of the next block are made then, too."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._waiting: list[tuple[list[Member], Tensor]] = []

    def run(self, live: list[Member], count: int) -> None:
        """Run a block of the members that are `live`; its metrics wait for `write`."""
        program, first_steps = self._program, {member.slot: member.started for member in live}
        for member in live:
            member.ahead += count
        if program.overlaps:
            metrics = program.run_block(first_steps, count, partial(self._use_time, live))
        else:
            metrics = program.run_block(first_steps, count)
        self._waiting.append((live, metrics))

    def write(self) -> None:
        """Add what waits to the curves. A member whose run is over (diverged, say) may have computed one block too many."""
        waiting, self._waiting = self._waiting, []
        for live, metrics in waiting:
            for member in running(live):
                with fail_on_error(member):
                    member.add_block(metrics[:, member.slot], self._program.step.micro)

    def _use_time(self, live: list[Member]) -> None:
        self.write()
        going = [member for member in running(live) if member.started < member.spec.steps]
        if going:
            most = min(self._program.max_block_steps, *(member.until_evaluation() for member in going))
            self._program.prepare_block({member.slot: member.started for member in going}, most)


def prepare(
    group: Sequence[PlannedRun], members: Sequence[Member], expected_fingerprint: str | None
) -> Program:
    """Find the checkpoints, then build the program, with the smallest micro-batch of the plan, checkpoints and hints."""
    fingerprint = check_data(group[0].spec, expected_fingerprint)
    if team := current_team():
        team.run_folder = members[0].folder
    sizes = []
    for member in running(members):
        refuse_repeated_errors(member.folder)
        member.find_checkpoint(fingerprint)
        written = member.saved.execution if member.saved else member.planned.execution
        known = (written.micro_batch_sequences, member.micro, load_micro_batch_hint(member.folder))
        sizes += [size for size in known if size is not None]
    execution = replace(group[0].execution, micro_batch_sequences=min(sizes, default=None))
    for member in running(members):
        member.set_micro_batch(execution.micro_batch_sequences)
    stacked = execution.stack is not None
    return open_program([planned.spec for planned in group], execution, fingerprint, stacked=stacked)


def running(members: Sequence[Member]) -> list[Member]:
    return [member for member in members if not member.over]


def blocks(members: Sequence[StepCounter], most: int = BLOCK_STEPS) -> Iterator[int]:
    """Sizes of the blocks of steps until all members are over: about `BLOCK_S` seconds each, at most `most` steps, and no
    longer than to the next evaluation of any member. The block sizes do not affect what is computed."""
    size = 1
    while live := [member for member in members if not member.over]:
        began = time.monotonic()
        yield min(size, *(member.until_evaluation() for member in live))
        elapsed = time.monotonic() - began
        if elapsed < BLOCK_S / 2:
            size = min(2 * size, most)
        elif elapsed > 2 * BLOCK_S:
            size = max(1, size // 2)


def finish(members: Sequence[Member]) -> None:
    """Write the records of the members that are at their last step."""
    for member in running(members):
        if member.done == member.spec.steps:
            with fail_on_error(member):
                member.finish()


def saved_bytes(members: Sequence[Member]) -> float:
    """Size of one checkpoint of every member."""
    return sum(CHECKPOINT_BYTES_PER_PARAM * member.spec.count().params.total for member in members)


def save(members: Sequence[Member], requests: Requests, writer: CheckpointWriter, everyone: bool) -> None:
    """Checkpoint the members that are at their last step, or `everyone`; if it was requested, wait for the files."""
    requested = requests.checkpoint
    due = [
        m
        for m in running(members)
        if everyone or requested or (m.done == m.spec.steps and m.ends_with_checkpoint)
    ]
    if due:
        writer.begin()
    for member in due:
        with fail_on_error(member):
            member.heartbeat.check()
            member.checkpoint()
    if requested:
        written = []
        for member in running(due):
            with fail_on_error(member):
                written.append(member.settle(wait=True))
        if written and all(written):
            requests.notify_saved()


@contextmanager
def fail_all_on_error(part: Part, parts: list[Part]) -> Iterator[None]:
    """An error ends all members that are not over, unless they may go on with less memory: then that is added to `parts`. An
    error of the device ends none of them, but this process: it raises `DeviceLost`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error) and (smaller := smaller_parts(part)):
            parts[:0] = smaller
            return
        if is_device_error(error):
            raise lost_device(part.members, error) from error
        for member in running(part.members):
            member.fail(error)


@contextmanager
def fail_on_error(member: Member) -> Iterator[None]:
    """An error ends this member only; the others of its stack continue."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or is_device_error(error):
            raise
        member.fail(error)


def lost_device(members: Sequence[Member], error: Exception) -> DeviceLost:
    """Note the error in the runs that it stopped, so that they are not retried for ever."""
    for member in running(members):
        note_process_error(member.folder, error)
    text = " ".join(str(error).split())[:300]
    log.error("the device reported an error, and this process ends (its runs go on in a fresh one): %s", text)
    return DeviceLost(f"the device reported an error: {text}")


def smaller_parts(part: Part) -> list[Part]:
    """What to train in place of `part`, for which memory was too small: the same runs with half the micro-batch, or the two
    halves of a stack one after the other. Empty if it is a single run with micro-batches of one sequence."""
    members = running(part.members)
    spec, micro = members[0].spec, members[0].micro
    smaller = next_smaller_micro_batch(spec.batch_sequences, micro)
    tokens = (micro or spec.batch_sequences) * spec.shape.context
    # Smaller micro-batches reduce activations only.
    execution = members[0].planned.execution
    activations = activation_bytes(
        spec.shape, tokens, spec.dtype, device=execution.device, compiled=execution.compile
    )
    mostly_state = state_bytes(spec.shape) > activations
    if len(members) > 1 and (smaller is None or mostly_state):
        half = (len(members) + 1) // 2
        log.warning("out of memory; continuing with a stack of %d of its %d runs.", half, len(members))
        for member in members:
            member.release()
        return [Part.of(members[:half]), Part.of(members[half:])]
    if smaller is None:
        return []
    for member in members:
        log.warning(
            "run %s: out of memory; continuing with micro-batches of %d of its %d sequences.",
            member.planned.run_id, smaller, spec.batch_sequences,
        )  # fmt: skip
        member.set_micro_batch(smaller)
        member.release()
    return [part]
