"""Data parallelism: each process computes its share of a batch's sequences with a copy of the whole model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import divisors
from scaling_lab.training.engine.memory import is_out_of_memory
from scaling_lab.training.engine.process_errors import is_device_error
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.parallel.overlap import OverlappedGradient
from scaling_lab.training.parallel.team import Team, World, collective_guard

log = logging.getLogger(__name__)

# Devices on which the gradients of a run that is not in a stack are summed during the backward pass. On a CPU nothing is gained.
OVERLAP_DEVICES = ("cuda",)


def batch_share(sequences: int, world: World) -> tuple[int, int]:
    """First and last + 1 of the batch's sequences that this process computes; shares differ by at most one sequence."""
    if sequences < world.size:
        raise UserError(
            f"a batch of {sequences} sequences cannot be shared by {world.size} processes: use at most {sequences}, "
            "or raise batch_tokens."
        )
    each, rest = divmod(sequences, world.size)
    first = world.rank * each + min(world.rank, rest)
    return first, first + each + (world.rank < rest)


class DataParallelStep(TrainStep):
    """A `TrainStep` in which each process computes its share of a batch's sequences.

    Gradient, loss and squared norm are weighted by the share and summed, once a step: in one collective, or, on CUDA, bucket
    by bucket while the backward pass is running (`OverlappedGradient`). Then each process makes the same update to its own copy.
    """

    def __init__(self, models: Any, tokens: Tensor, specs: Any, execution: Execution, team: Team) -> None:
        spec = specs if isinstance(specs, RunSpec) else specs[0]
        self._team = team
        self._first, self._last = batch_share(spec.batch_sequences, team.world)
        own = self._last - self._first
        wanted = min(own, execution.micro_batch_sequences or own)
        micro = max(size for size in divisors(own) if size <= wanted)
        super().__init__(
            models, tokens, specs, replace(execution, micro_batch_sequences=micro), sequences=own
        )
        self._use_graph = False  # the collective runs between its two programs
        self._weight = own / spec.batch_sequences
        size = self.flat.numel()
        members = size // self.flat.shape[-1]
        self._sum = self.flat.new_zeros(size + 2 * members)
        """Gradients, then losses and squared norms: one tensor for one collective."""
        self._gradient_sum = self._sum[:size].view(self.flat.shape)
        self._metrics_sum = self._sum[size:].view(*self.flat.shape[:-1], 2)
        self._synchronized = False
        self._error: Exception | None = None
        self._overlapped: OverlappedGradient | None = None
        self._tried_overlap = not self.may_overlap()
        self._spec, self._compiled = spec, execution.compile

    def may_overlap(self) -> bool:
        """Whether gradients are to be summed during the backward pass."""
        return not self.stacked and self.tokens.device.type in OVERLAP_DEVICES

    @property
    def overlaps(self) -> bool:
        """Whether it does so; decided at the first step."""
        return self._overlapped is not None

    def run(self, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps of the whole batch, in all processes."""
        self._team.broadcast_command("run", starts.cpu(), controls.cpu())
        with self._team.shared_errors():
            self._error = None
            if not self._synchronized:  # to the state that the first process loaded or initialized
                for tensor in self.state().values():
                    with collective_guard():
                        dist.broadcast(tensor, 0)
                self._synchronized = True
            own = starts.to(self.flat.device)[..., self._first : self._last].contiguous()
            controls = controls.to(self.flat.device)
            if not self._tried_overlap:
                self._try_overlap(own[0])
            metrics = torch.stack([self(own[i], controls[i]) for i in range(len(own))])
            if self._error is not None:
                raise self._error
        return metrics

    def __call__(self, starts: Tensor, controls: Tensor) -> Tensor:
        """One step on this process's share. After an error it goes on adding zeros, so that no other process waits."""
        self._sum.zero_()
        square = self._sum.new_zeros(self._metrics_sum.shape[:-1])
        if self._error is None:
            try:
                self._gradient(starts)
            except Exception as error:
                self._error = error
                self._unsummed().zero_()
        elif self._overlapped is not None:
            self._overlapped.send_zeros()
        with collective_guard():
            dist.all_reduce(self._unsummed())
        if self._error is None:
            try:
                square = self._update(self._gradient_sum, controls, *self.state().values())
            except Exception as error:
                self._error = error
        return torch.cat((self._metrics_sum, square[..., None]), -1)

    def _gradient(self, starts: Tensor) -> None:
        """This process's weighted gradient and metrics into `_sum`; overlapped, the gradient is then summed already."""
        if self._overlapped is not None:
            metrics = torch.stack(self._overlapped.compute(starts, self.micro, self.tokens, self._weight))
            self._metrics_sum.copy_(metrics * self._weight)
            return
        parts = starts.split(self.micro, dim=-1)
        each = [
            self._accumulate(part.contiguous(), self.flat, self._gradient_sum, self.tokens) for part in parts
        ]
        self._metrics_sum.copy_(torch.stack(each).mean(0))
        self._sum.mul_(self._weight)

    def _unsummed(self) -> Tensor:
        """The part of `_sum` that is summed at the end of a step."""
        return self._sum if self._overlapped is None else self._sum[self.flat.numel() :]

    def _try_overlap(self, starts: Tensor) -> None:
        """Compute one gradient with overlap, in all processes. If it fails in any, all go on without, with a warning."""
        self._tried_overlap = True
        error: Exception | None = None
        try:
            self._overlapped = OverlappedGradient(
                self.model, self.layout, self.flat, self._gradient_sum, self._spec, compiled=self._compiled
            )
            self._overlapped.compute(starts, self.micro, self.tokens, self._weight)
        except Exception as caught:
            error = caught
        if error is not None and (is_out_of_memory(error) or is_device_error(error)):
            # Raised at the end of the block: smaller micro-batches, or a fresh process, may help.
            self._error, error = error, None
        if any(self._team.gather(error is not None)):
            self._overlapped = None
            if error is not None:
                log.warning(
                    "gradients are summed after the backward pass, not during it: %s.",
                    str(error).strip().partition("\n")[0],
                )
