"""Owns one run (or stack) over several processes, one a device: who is who, and data parallel training.

The first process does everything that a process alone does: it claims, writes the curve, checkpoints and the record, shows
the run elsewhere and answers signals. The others follow: they build the same program and take their part in each of its
operations, so that nothing has to be agreed upon, and whatever is counted or logged is counted once.

    ddp    every device has the whole model and its share of a batch's sequences; gradients are added up in one collective
           a step, before clipping
    fsdp   parameters, gradients and moments are spread over the devices (sharded.py), for models that do not fit on one

Batches are those of a run on one device: the data order knows nothing of devices. A checkpoint is the same too: a run goes
on with another number of devices, or of the other kind.
"""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import divisors, state_bytes
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.run.stopping import EXIT_REQUEUE, Interrupted

if TYPE_CHECKING:
    from scaling_lab.training.measure.evaluation import ValidationSet
    from scaling_lab.training.run.session import Program, Session

log = logging.getLogger(__name__)

PARALLEL = ("auto", "none", "ddp", "fsdp")
# Followers wait for the first process while it evaluates, writes or waits for a claim; if it dies they see it at once.
PATIENCE = timedelta(days=7)
# Above this share of a device's memory, parameters and their companions leave too little for activations.
MAX_STATE_SHARE = 0.6


class TeamLost(Interrupted):
    """Another process of the group is gone: no fault of the run, which goes on another time."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.args = (why,)


@dataclass(frozen=True)
class World:
    """The processes of one run, as torchrun or Slurm started them."""

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def from_environment(parallel: str = "auto") -> World | None:
        """None for a process alone. Slurm's tasks are one run only where `parallel` says so: else each works for itself.

        Raises `UserError` where `parallel` asks for several processes and there are none.
        """
        if parallel not in PARALLEL:
            raise unknown("parallel", parallel, PARALLEL)
        names = os.environ
        if parallel == "none":
            return None
        if "RANK" in names and "WORLD_SIZE" in names:
            found = World(int(names["RANK"]), int(names["WORLD_SIZE"]), int(names.get("LOCAL_RANK", 0)))
        elif parallel != "auto" and "SLURM_PROCID" in names:
            tasks = names.get("SLURM_STEP_NUM_TASKS") or names.get("SLURM_NTASKS", "1")
            found = World(int(names["SLURM_PROCID"]), int(tasks), int(names.get("SLURM_LOCALID", 0)))
            names.setdefault(
                "MASTER_ADDR", first_host(names.get("SLURM_STEP_NODELIST") or names["SLURM_JOB_NODELIST"])
            )
            names.setdefault("MASTER_PORT", str(20_000 + int(names["SLURM_JOB_ID"]) % 10_000))
        elif parallel == "auto":
            return None
        else:
            raise UserError(
                f"parallel={parallel} needs several processes: start it with torchrun --nproc_per_node=N, or with srun."
            )
        return found if found.size > 1 or parallel != "auto" else None


def first_host(nodes: str) -> str:
    """The first of Slurm's `node[003-007,9],other`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")


def share(sequences: int, world: World) -> tuple[int, int]:
    """First and last + 1 of a batch's sequences that this rank computes: shares differ by one where they must."""
    if sequences < world.size:
        raise UserError(
            f"a batch of {sequences} sequences cannot be shared by {world.size} processes: use at most {sequences}, "
            "or raise batch_tokens."
        )
    each, more = divmod(sequences, world.size)
    first = world.rank * each + min(world.rank, more)
    return first, first + each + (world.rank < more)


class Team:
    """This process's place among the processes of a run. The leader tells, all do, and all settle whether it worked."""

    def __init__(self, world: World, parallel: str) -> None:
        self.world, self.parallel = world, parallel
        self.program: Program | None = None
        self.run_folder: Path | None = None
        """Of the run that is opened next, or of the first of a stack; on all processes once it is open."""
        # Orders and small answers go between processors, whatever the devices are.
        self._control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def leads(self) -> bool:
        return self.world.rank == 0

    # -- orders
    def tell(self, order: str, *arguments: Any) -> None:
        """The leader's: all other processes do `order` now, at the same time as it does."""
        if self.leads:
            with reaching_the_others():
                dist.broadcast_object_list([(order, arguments)], src=0, group=self._control)

    def follow(self) -> int:
        """The others': do what the leader tells until it ends; returns the exit status that it ends with."""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # the leader answers them
        while True:
            box: list[Any] = [None]
            try:
                with reaching_the_others():
                    dist.broadcast_object_list(box, src=0, group=self._control)
                order, arguments = box[0]
                if order == "end":
                    return int(arguments[0])
                self._obey(order, arguments)
            except TeamLost as stop:
                log.warning("process %d: %s.", self.world.rank, stop)
                return EXIT_REQUEUE

    def _obey(self, order: str, arguments: Sequence[Any]) -> None:
        if order == "open":
            with suppress(Exception):  # the leader raises it
                self._open(*arguments)
            return
        assert self.program is not None
        if order == "load":
            with suppress(Exception):
                self.program.sessions[0].feed.starts(*arguments)
            return
        if order == "validate":
            slot, name = arguments
            with suppress(Exception):
                self.validation_loss(self.program.sessions[slot], slot, name)
            return
        with suppress(Exception):
            getattr(self.program.step, order)(*arguments)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within it all processes do the same; if it fails in any of them, it fails in all.

        The leader raises its own error, or one of the same kind with the others' words.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        told: list[Any] = [None] * self.world.size
        with reaching_the_others():
            dist.all_gather_object(told, None if mine is None else (type(mine), str(mine)), self._control)
        if mine is not None:
            raise mine
        for rank, problem in enumerate(told):
            if problem is not None:
                kind, text = problem
                known = kind if kind in (UserError, torch.OutOfMemoryError) else RuntimeError
                raise known(text if kind is UserError else f"process {rank}: {kind.__name__}: {text}")

    # -- what a program is asked for
    def open(
        self, specs: Sequence[RunSpec], execution: Execution, fingerprint: str | None, stacked: bool
    ) -> Program:
        """Build the program in every process; see `session.open_program`."""
        kind = self._kind(specs[0], execution, stacked)
        self.tell("open", specs, execution, fingerprint, stacked, kind, self.run_folder)
        return self._open(specs, execution, fingerprint, stacked, kind, self.run_folder)

    def _open(
        self,
        specs: Sequence[RunSpec],
        execution: Execution,
        fingerprint: str | None,
        stacked: bool,
        kind: str,
        run_folder: Path | None,
    ) -> Program:
        from scaling_lab.training.parallel.sharded import ShardedStep
        from scaling_lab.training.run.session import build_program

        step_class: Any = ShardedStep if kind == "fsdp" else ParallelStep
        self.program, self.run_folder = None, run_folder
        with self.settled():
            self.program = build_program(
                specs, execution, fingerprint, stacked=stacked,
                make_step=partial(step_class, team=self), whole_models=kind != "fsdp",
            )  # fmt: skip
        assert self.program is not None
        return self.program

    def _kind(self, spec: RunSpec, execution: Execution, stacked: bool) -> str:
        """ddp or fsdp; `auto` spreads what leaves too little room on one device."""
        if self.parallel == "fsdp" and stacked:
            raise UserError(
                "parallel=fsdp trains one run at a time: plan with stack=false, or use parallel=ddp."
            )
        if self.parallel != "auto" or execution.device != "cuda" or stacked:
            return "fsdp" if self.parallel == "fsdp" else "ddp"
        room = torch.cuda.get_device_properties(0).total_memory
        return "fsdp" if state_bytes(spec.shape) > MAX_STATE_SHARE * room else "ddp"

    def validation_loss(
        self, session: Session, slot: int, name: str | None = None
    ) -> tuple[float, float | None]:
        """Loss of a slot's run on the validation set, or another one by name (leader: the numbers; others: nothing of use),
        its windows shared out."""
        self.tell("validate", slot, name)
        which = session.evaluation.set(name)
        chunks: list[Any] = [None] * self.world.size
        with self.settled():
            mine = self._validation_chunks(session, which)
        with reaching_the_others():
            dist.gather_object(mine, chunks if self.leads else None, 0, self._control)
        if not self.leads:
            return 0.0, None
        found = {k: losses for part in chunks for k, losses in part.items()}
        return which.summary(torch.cat([found[k] for k in sorted(found)]))

    def _validation_chunks(self, session: Session, which: ValidationSet) -> dict[int, Tensor]:
        """Losses of this rank's parts of the windows, by number; all ranks compute equally many (FSDP needs it)."""
        spec, step, done = session.spec, session.step, {}
        parts = which.chunks(spec.shape.vocab_size)
        for first in range(0, len(parts), self.world.size):
            k = first + self.world.rank
            losses = which.window_losses(step.logits, parts[k if k < len(parts) else 0], spec.dtype)
            if k < len(parts):
                done[k] = losses.cpu()
        return done


class ParallelStep(TrainStep):
    """A `TrainStep` whose every process takes its share of a batch's sequences (data parallel).

    Gradient, loss and noise are weighted by the share and added up in one collective; then every process makes the same
    update of its own copy.
    """

    def __init__(self, models: Any, tokens: Tensor, specs: Any, execution: Execution, team: Team) -> None:
        spec = specs if isinstance(specs, RunSpec) else specs[0]
        self._team = team
        self._first, self._last = share(spec.batch_sequences, team.world)
        mine = self._last - self._first
        wanted = min(mine, execution.micro_batch_sequences or mine)
        micro = max(size for size in divisors(mine) if size <= wanted)
        super().__init__(
            models, tokens, specs, replace(execution, micro_batch_sequences=micro), sequences=mine
        )
        self._use_graph = False  # the collective is between its two programs
        self._weight = mine / spec.batch_sequences
        self._numbers = self.flat.numel()
        members = self._numbers // self.flat.shape[-1]
        self._sum = self.flat.new_zeros(self._numbers + 2 * members)
        self._total = self._sum[: self._numbers].view(self.flat.shape)
        self._told = self._sum[self._numbers :].view(*self.flat.shape[:-1], 2)
        self._together = False
        self._error: Exception | None = None

    def run(self, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps of the whole batch, in all processes."""
        self._team.tell("run", starts.cpu(), controls.cpu())
        with self._team.settled():
            self._error = None
            if not self._together:  # what the leader loaded or initialised
                for tensor in self.state().values():
                    with reaching_the_others():
                        dist.broadcast(tensor, 0)
                self._together = True
            mine = starts.to(self.flat.device)[..., self._first : self._last].contiguous()
            controls = controls.to(self.flat.device)
            told = torch.stack([self(mine[i], controls[i]) for i in range(len(mine))])
            if self._error is not None:
                raise self._error
        return told

    def __call__(self, starts: Tensor, controls: Tensor) -> Tensor:
        """One step on this process's share. One that fails goes on adding nothing, so that no other waits for it."""
        self._sum.zero_()
        square = self._sum.new_zeros(self._told.shape[:-1])
        if self._error is None:
            try:
                parts = starts.split(self.micro, dim=-1)
                told = [self._accumulate(p.contiguous(), self.flat, self._total, self.tokens) for p in parts]
                self._told.copy_(torch.stack(told).mean(0))
                self._sum.mul_(self._weight)
            except Exception as error:
                self._error = error
                self._sum.zero_()
        with reaching_the_others():
            dist.all_reduce(self._sum)
        if self._error is None:
            try:
                square = self._update(self._total, controls, *self.state().values())
            except Exception as error:
                self._error = error
        return torch.cat((self._told, square[..., None]), -1)


@contextmanager
def reaching_the_others() -> Iterator[None]:
    """Within it are collectives: an error means that somebody is gone."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # dist.DistBackendError is a RuntimeError
        raise TeamLost(f"another process of this run is gone ({str(error).strip()[:200]})") from error


_team: list[Team] = []


def current_team() -> Team | None:
    """The team that this process belongs to; None for a process alone."""
    return _team[-1] if _team else None


@contextmanager
def joined(parallel: str = "auto", device: str = "auto") -> Iterator[Team | None]:
    """Join the other processes of this run, if there are any; None for a process alone. The leader's end is everybody's."""
    world = World.from_environment(parallel)
    if world is None or _team:
        yield None
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size)
    team = Team(world, parallel)
    _team.append(team)
    status = 1
    try:
        yield team
        status = 0
    except UserError:
        status = 2
        raise
    except KeyboardInterrupt:
        status = EXIT_REQUEUE
        raise
    finally:
        _team.pop()
        with suppress(TeamLost):
            team.tell("end", status)
        with suppress(Exception):
            dist.destroy_process_group()
