"""The processes that train one run (or stack) together, one per device, led by the first.

The first process does everything that a single process does: it claims runs, writes curves, checkpoints and records, feeds
trackers and answers signals. It broadcasts a command before each operation of the step, and the other processes execute the
same command (`training/run/follower.py`). Nothing has to be agreed on, and everything is counted and logged once.

    ddp    each device has the whole model and a share of each batch's sequences; gradients are summed in one collective per
           step, before clipping (data_parallel.py)
    fsdp   parameters, gradients and moments are sharded over the devices, for models that do not fit on one (sharded.py)

Batches are the same as on one device: the data order does not depend on the number of devices. Checkpoints are the same too:
a run can resume on another number of devices, or with the other strategy.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_lab.core.errors import EXIT_REQUEUE, Interrupted, UserError, unknown
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import state_bytes
from scaling_lab.training.engine.process_errors import is_device_error, note_process_error
from scaling_lab.training.measure.evaluation import ValidationSet

log = logging.getLogger(__name__)

PARALLEL = ("auto", "none", "ddp", "fsdp")
# The other processes wait while the first one evaluates, writes or waits for a claim; if it dies they notice at once.
COMMAND_TIMEOUT = timedelta(days=7)
# If parameters, gradients and moments take more than this share of a device's memory, too little is left for activations.
MAX_STATE_SHARE = 0.6

# Of gloo, NCCL and the store through which processes find each other.
COMMUNICATION_MESSAGES = (
    *("connection", "gloo", "nccl", "timed out", "timeout", "socket", "broken pipe", "peer", "tcpstore"),
    *("read error", "write error", "heartbeat"),
)


class TeamLost(Interrupted):
    """Another process of the team is gone. That is not the run's fault: it resumes later."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.args = (reason,)


@dataclass(frozen=True)
class World:
    """The processes of one run, as torchrun or Slurm started them."""

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def from_environment(parallel: str = "auto") -> World | None:
        """None for a single process. Slurm tasks form a team only if `parallel` says so; otherwise each works on its own.

        Raises `UserError` if `parallel` needs several processes and there are none.
        """
        if parallel not in PARALLEL:
            raise unknown("parallel", parallel, PARALLEL)
        variables = os.environ
        if parallel == "none":
            return None
        if "RANK" in variables and "WORLD_SIZE" in variables:
            local_rank = int(variables.get("LOCAL_RANK", 0))
            found = World(int(variables["RANK"]), int(variables["WORLD_SIZE"]), local_rank)
        elif parallel != "auto" and "SLURM_PROCID" in variables:
            tasks = variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS", "1")
            local_rank = int(variables.get("SLURM_LOCALID", 0))
            found = World(int(variables["SLURM_PROCID"]), int(tasks), local_rank)
            nodes = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
            variables.setdefault("MASTER_ADDR", first_host(nodes))
            variables.setdefault("MASTER_PORT", str(20_000 + int(variables["SLURM_JOB_ID"]) % 10_000))
        elif parallel == "auto":
            return None
        else:
            raise UserError(
                f"parallel={parallel} needs several processes: start it with torchrun --nproc_per_node=N or with srun."
            )
        return found if found.size > 1 or parallel != "auto" else None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `node[003-007,9],other`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")


class Team:
    """This process's place among the processes of a run, and how they communicate."""

    def __init__(self, world: World, parallel: str) -> None:
        self.world, self.parallel = world, parallel
        self.run_folder: Path | None = None
        """Folder of the run that is opened next (of a stack's first run); known to all processes once it is open."""
        # Commands and small answers go between CPUs, whatever the devices are.
        self._control: Any = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
        # The threads that write checkpoints agree among themselves.
        self.checkpoints: Any = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)

    @property
    def leads(self) -> bool:
        return self.world.rank == 0

    def broadcast_command(self, command: str, *arguments: Any) -> None:
        """In the first process: make all others execute `command` together with it. In the others it does nothing."""
        if self.leads:
            with collective_guard():
                dist.broadcast_object_list([(command, arguments)], src=0, group=self._control)

    def receive_command(self) -> tuple[str, Sequence[Any]]:
        """In the other processes: the next command and its arguments."""
        box: list[Any] = [None]
        with collective_guard():
            dist.broadcast_object_list(box, src=0, group=self._control)
        command, arguments = box[0]
        return command, arguments

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """For code that all processes execute: if it fails in one process, it fails in all of them.

        A process raises its own error, or else one of the same kind with the other process's message.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        outcomes: list[Any] = [None] * self.world.size
        with collective_guard():
            dist.all_gather_object(outcomes, None if own is None else (type(own), str(own)), self._control)
        if own is not None:
            raise own
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                kind, text = outcome
                known = kind if kind in (UserError, torch.OutOfMemoryError) else RuntimeError
                raise known(text if kind is UserError else f"process {rank}: {kind.__name__}: {text}")

    def gather(self, value: Any) -> list[Any]:
        """The `value` of each process, in all of them; all processes call this together."""
        values: list[Any] = [None] * self.world.size
        with collective_guard():
            dist.all_gather_object(values, value, self._control)
        return values

    def strategy(self, spec: RunSpec, execution: Execution, stacked: bool) -> str:
        """ddp or fsdp; with parallel=auto, fsdp if the model leaves too little memory on one device."""
        if self.parallel == "fsdp" and stacked:
            raise UserError(
                "parallel=fsdp trains one run at a time: plan with stack=false, or use parallel=ddp."
            )
        if self.parallel != "auto" or execution.device != "cuda" or stacked:
            return "fsdp" if self.parallel == "fsdp" else "ddp"
        total = torch.cuda.get_device_properties(0).total_memory
        return "fsdp" if state_bytes(spec.shape) > MAX_STATE_SHARE * total else "ddp"

    def window_losses(
        self, windows: ValidationSet, forward: Callable[[Tensor], Tensor], spec: RunSpec
    ) -> Tensor | None:
        """Loss of each window, computed by all processes together; None in all but the first."""
        gathered: list[Any] = [None] * self.world.size
        with self.shared_errors():
            own = self._own_chunks(windows, forward, spec)
        with collective_guard():
            dist.gather_object(own, gathered if self.leads else None, 0, self._control)
        if not self.leads:
            return None
        found = {k: losses for chunks in gathered for k, losses in chunks.items()}
        return torch.cat([found[k] for k in sorted(found)])

    def _own_chunks(
        self, windows: ValidationSet, forward: Callable[[Tensor], Tensor], spec: RunSpec
    ) -> dict[int, Tensor]:
        """This process's chunks of the windows, by number. All processes compute equally many, as FSDP requires."""
        chunks, own = windows.chunks(spec.shape.vocab_size), {}
        for first in range(0, len(chunks), self.world.size):
            k = first + self.world.rank
            losses = windows.window_losses(forward, chunks[k if k < len(chunks) else 0], spec.dtype)
            if k < len(chunks):
                own[k] = losses.cpu()
        return own


def is_communication_error(error: BaseException) -> bool:
    """Whether an error of a collective says that another process cannot be reached. gloo raises plain RuntimeErrors."""
    if isinstance(error, (OSError, getattr(dist, "DistError", ()))):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in COMMUNICATION_MESSAGES)


@contextmanager
def collective_guard() -> Iterator[None]:
    """Turns an error of a collective that is about communication into `TeamLost`: another process is gone. So does an error of
    the device, which is noted in the run: it would happen again and again. Other errors are raised as they are."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        team = current_team()
        if is_device_error(error) and team is not None and team.run_folder is not None:
            note_process_error(team.run_folder, error, team.world.rank)
        elif not is_communication_error(error):
            raise
        raise TeamLost(f"another process of this run is gone ({str(error).strip()[:200]})") from error


_current: list[Team] = []


def current_team() -> Team | None:
    """The team that this process belongs to; None for a single process."""
    return _current[-1] if _current else None


def gpu_place() -> tuple[str, str] | None:
    """The host and the identity of this process's GPU; None if this version of torch does not know it."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return None if uuid is None else (socket.gethostname(), str(uuid))


def check_places(places: Sequence[tuple[str, str] | None]) -> None:
    """Raise `UserError` if two processes have the same GPU: NCCL would fail or wait for ever."""
    known = [place for place in places if place is not None]
    if len(set(known)) < len(known):
        host = next(place[0] for place in known if known.count(place) > 1)
        raise UserError(
            f"{len(places)} processes, but two of them have the same GPU on {host}: start one process per GPU that sees all "
            "GPUs of its node (srun --ntasks-per-node=N --gpus-per-node=N --gpu-bind=none, or torchrun --nproc_per_node=N)."
        )


@contextmanager
def joined(parallel: str = "auto", device: str = "auto") -> Iterator[Team | None]:
    """Join the other processes of this run; None for a single process. When the first process ends, all of them do."""
    world = World.from_environment(parallel)
    if world is None or _current:
        yield None
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    # Tensors of both kinds of device are sent: states are gathered to the host.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size
    )
    team = Team(world, parallel)
    if on_gpu:
        check_places(team.gather(gpu_place()))
    _current.append(team)
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
        _current.pop()
        with suppress(TeamLost):
            team.broadcast_command("end", status)
        with suppress(Exception):
            dist.destroy_process_group()
