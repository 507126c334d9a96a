"""The step of a model that does not fit on one device: FSDP2, with parameters, gradients and moments sharded.

It uses the ordinary module and autograd (Zhao et al. 2023, arXiv 2304.11277; `fully_shard`, which shards per parameter):
each block's parameters are gathered for its forward and backward pass and freed afterwards; gradients arrive as shards.
Clipping and AdamW work on the shards. To save a state it is gathered parameter by parameter into the flat vectors of
`TrainStep`, on the CPU of the first process, so that checkpoints have the same format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import divisors, next_smaller_micro_batch
from scaling_lab.training.engine.gradient import ModelWithLoss, autocast
from scaling_lab.training.engine.memory import is_out_of_memory, save_micro_batch_hint
from scaling_lab.training.engine.optimizer import (
    FlatLayout,
    GroupVectors,
    adamw_update,
    clip_scale,
    parameter_groups,
)
from scaling_lab.training.parallel.team import Team, TeamLost, collective_guard


class ShardedStep:
    """The interface of a `TrainStep` for one run, except for what needs a full copy of the parameters."""

    stacked = False
    holds_all_parameters = False

    def __init__(
        self, model: nn.Module, tokens: Tensor, spec: RunSpec, execution: Execution, team: Team
    ) -> None:
        size = team.world.size
        if spec.batch_sequences % size:
            raise UserError(
                f"parallel=fsdp needs equal shares: a batch of {spec.batch_sequences} sequences is not a multiple of "
                f"{size} processes. Choices: {', '.join(str(k) for k in divisors(spec.batch_sequences))} processes, or "
                "parallel=ddp."
            )
        self._team, self._spec, self.model, self.tokens = team, spec, model, tokens
        self.layout = FlatLayout.of(model)
        own = spec.batch_sequences // size
        wanted = min(own, execution.micro_batch_sequences or own)
        self.micro = max(k for k in divisors(own) if k <= wanted)
        self._own = slice(team.world.rank * own, (team.world.rank + 1) * own)
        self._mesh = init_device_mesh(tokens.device.type, (size,))
        for blocks in [module for module in model.children() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                if execution.compile:
                    block.compile()
                fully_shard(block, mesh=self._mesh)
        # The loss is part of FSDP's forward pass, because only there are the head's weights gathered.
        self._with_loss = ModelWithLoss(model, spec)
        fully_shard(self._with_loss, mesh=self._mesh)
        self._parameters: list[Any] = [p for _, p in model.named_parameters()]
        self._first = [torch.zeros_like(p.to_local()) for p in self._parameters]
        self._second = [torch.zeros_like(p.to_local()) for p in self._parameters]
        groups = parameter_groups(
            zip(self.layout.names, self.layout.shapes), spec.optimizer, spec.parametrization, spec.shape
        )
        one = torch.ones(1, device=tokens.device)
        self._groups = [GroupVectors(g.lr_ratio * one, g.weight_decay * one, g.eps) for g in groups]
        self._offsets = torch.arange(spec.shape.context + 1, device=tokens.device)

    def run(self, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps of the whole batch, in all processes; returns the step metrics (steps, 3), see `step.LOSS`.
        The norms of micro-batches are not measured: the batch's is returned in their place."""
        self._team.broadcast_command("run", starts.cpu(), controls.cpu())
        with self._end_team_on_error():
            own = starts.to(self.tokens.device)[:, self._own]
            controls = controls.to(self.tokens.device)
            return torch.stack([self._step(own[i], controls[i]) for i in range(len(own))])

    def _step(self, starts: Tensor, controls: Tensor) -> Tensor:
        parts = starts.split(self.micro)
        loss = torch.zeros((), device=self.tokens.device)
        for part in parts:
            window = self.tokens[part[:, None] + self._offsets].long()
            with autocast(window, self._spec):
                part_loss: Tensor = self._with_loss(window[:, :-1], window[:, 1:]) / len(parts)
            part_loss.backward()  # FSDP averages over the processes
            loss += part_loss.detach()
        gradients = [p.grad.to_local() for p in self._parameters]
        squares = torch.stack([g.square().sum() for g in gradients]).sum()
        sums = torch.stack((loss / self._team.world.size, squares))
        dist.all_reduce(sums)
        scale, _ = clip_scale(sums[1].sqrt()[None], self._spec.optimizer.clip_norm)
        self._update([g * scale for g in gradients], controls)
        return torch.stack((sums[0], sums[1], sums[1]))

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], controls: Tensor) -> None:
        for p, gradient, first, second, group in zip(
            self._parameters, gradients, self._first, self._second, self._groups, strict=True
        ):
            adamw_update(
                p.to_local().view(-1),
                gradient.view(-1),
                first.view(-1),
                second.view(-1),
                group,
                self._spec.optimizer,
                controls,
            )
            p.grad = None

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits under the current parameters; to be called in all processes at once."""
        with self._end_team_on_error():
            out: Tensor = self._with_loss(tokens)
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, gathered on the CPU of the first process (empty in the others)."""
        self._team.broadcast_command("state")
        out = {}
        with collective_guard(), torch.no_grad():
            for name, shards in self._shards().items():
                parts = []
                for p, shard in zip(self._parameters, shards, strict=True):
                    sharded = DTensor.from_local(
                        shard, self._mesh, p.placements, shape=p.shape, stride=p.stride()
                    )
                    whole = sharded.full_tensor()
                    if self._team.leads:
                        parts.append(whole.reshape(-1).cpu())
                out[name] = torch.cat(parts) if parts else torch.empty(0)
        return out

    def load_state(self, state: dict[str, Tensor] | None = None) -> None:
        """Load the state of the first process, in place. Raises ValueError for tensors of another size."""
        size = sum(shape.numel() for shape in self.layout.shapes)
        for name, tensor in (state or {}).items():
            if tensor.numel() != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this model needs {(size,)}")
        self._team.broadcast_command("load_state")
        with collective_guard(), torch.no_grad():
            for name, shards in self._shards().items():
                wholes = self.layout.views(state[name]) if state else {}
                for key, shape, p, shard in zip(
                    self.layout.names, self.layout.shapes, self._parameters, shards, strict=True
                ):
                    whole = wholes[key].to(shard.device) if state else shard.new_empty(shape)
                    shard.copy_(distribute_tensor(whole, self._mesh, p.placements).to_local())

    def _shards(self) -> dict[str, list[Tensor]]:
        flat = [p.to_local() for p in self._parameters]
        return {"flat": flat, "first_moment": self._first, "second_moment": self._second}

    @contextmanager
    def _end_team_on_error(self) -> Iterator[None]:
        """A process that fails within a step leaves the others waiting in a collective, so the whole team has to end.

        If memory ran out, the process where it did saves a hint, and the next start uses smaller micro-batches (the first
        process may hang in a collective until it is killed). If a single sequence was too much, restarting does not help.
        """
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                smaller = next_smaller_micro_batch(self._own.stop - self._own.start, self.micro)
                if smaller is not None and self._team.run_folder is not None:
                    # A failed write must not keep this process from ending: the others wait for that.
                    with suppress(OSError):
                        save_micro_batch_hint(self._team.run_folder, smaller)
                    raise TeamLost(
                        f"parallel=fsdp: out of memory with micro-batches of {self.micro} sequences per process; when "
                        f"started again, the run resumes with {smaller}"
                    ) from error
                if self._team.leads:
                    raise UserError(
                        f"parallel=fsdp: out of memory with micro-batches of {self.micro} sequences per process. Choices: "
                        "more processes, or devices with more memory."
                    ) from error
            raise TeamLost(f"{type(error).__name__} in a step: {str(error).strip()[:300]}") from error
