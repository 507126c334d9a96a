"""Owns the step of a model that does not fit on one device: FSDP2, with everything spread over the processes.

The ordinary module, forward and backward as torch does them (Zhao et al. 2023, arXiv 2304.11277; `fully_shard`, by parameter):
each block's parameters are gathered for its own forward and backward and let go after; gradients come back as shards.
Clipping and AdamW work on the shards. A state is gathered parameter by parameter into the flat vectors of `TrainStep`, on
the first process's processor, so that checkpoints are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import divisors, next_smaller_micro_batch
from scaling_lab.training.engine.gradient import WithLoss, autocast
from scaling_lab.training.engine.memory import is_out_of_memory, note_smaller_parts
from scaling_lab.training.engine.optimizer import FlatLayout, GroupVectors, adamw_update, clip_scale
from scaling_lab.training.engine.parametrization import parameter_groups
from scaling_lab.training.parallel.distributed import TeamLost, reaching_the_others

if TYPE_CHECKING:
    from scaling_lab.training.parallel.distributed import Team


class ShardedStep:
    """With the face of a `TrainStep` of one run, but for what needs a whole copy of the parameters."""

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
        mine = spec.batch_sequences // size
        wanted = min(mine, execution.micro_batch_sequences or mine)
        self.micro = max(k for k in divisors(mine) if k <= wanted)
        self._mine = slice(team.world.rank * mine, (team.world.rank + 1) * mine)
        self._mesh = init_device_mesh(tokens.device.type, (size,))
        for blocks in [module for module in model.children() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                if execution.compile:
                    block.compile()
                fully_shard(block, mesh=self._mesh)
        # The loss is within what FSDP sees as the forward pass: there the head's weights are whole.
        self._with_loss = WithLoss(model, spec)
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
        """A block of steps of the whole batch, in all processes: (steps, 3), see `step.LOSS`; parts are not measured."""
        self._team.tell("run", starts.cpu(), controls.cpu())
        with self._in_step():
            mine = starts.to(self.tokens.device)[:, self._mine]
            controls = controls.to(self.tokens.device)
            return torch.stack([self._step(mine[i], controls[i]) for i in range(len(mine))])

    def _step(self, starts: Tensor, controls: Tensor) -> Tensor:
        parts = starts.split(self.micro)
        loss = torch.zeros((), device=self.tokens.device)
        for part in parts:
            window = self.tokens[part[:, None] + self._offsets].long()
            with autocast(window, self._spec):
                of_part: Tensor = self._with_loss(window[:, :-1], window[:, 1:]) / len(parts)
            of_part.backward()  # FSDP takes the mean over processes
            loss += of_part.detach()
        gradients = [p.grad.to_local() for p in self._parameters]
        squares = torch.stack([g.square().sum() for g in gradients]).sum()
        told = torch.stack((loss / self._team.world.size, squares))
        dist.all_reduce(told)
        scale, _ = clip_scale(told[1].sqrt()[None], self._spec.optimizer.clip_norm)
        self._update([g * scale for g in gradients], controls)
        return torch.stack((told[0], told[1], told[1]))

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], controls: Tensor) -> None:
        for p, gradient, first, second, group in zip(
            self._parameters, gradients, self._first, self._second, self._groups, strict=True
        ):
            mine = p.to_local().view(-1)
            adamw_update(
                mine,
                gradient.view(-1),
                first.view(-1),
                second.view(-1),
                group,
                self._spec.optimizer,
                controls,
            )
            p.grad = None

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits under the current parameters; in all processes at once."""
        with self._in_step():
            out: Tensor = self._with_loss(tokens)
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, gathered on the first process's processor (empty on the others)."""
        self._team.tell("state")
        out = {}
        with reaching_the_others(), torch.no_grad():
            for name, shards in self._state().items():
                parts = []
                for p, shard in zip(self._parameters, shards, strict=True):
                    like = DTensor.from_local(
                        shard, self._mesh, p.placements, shape=p.shape, stride=p.stride()
                    )
                    whole = like.full_tensor()
                    if self._team.leads:
                        parts.append(whole.reshape(-1).cpu())
                out[name] = torch.cat(parts) if parts else torch.empty(0)
        return out

    def load_state(self, state: dict[str, Tensor] | None = None) -> None:
        """Take over the first process's state, in place. Raises ValueError for tensors of another size."""
        numbers = sum(shape.numel() for shape in self.layout.shapes)
        for name, tensor in (state or {}).items():
            if tensor.numel() != numbers:
                raise ValueError(f"{name} has {tuple(tensor.shape)} elements, this model {numbers}")
        self._team.tell("load_state")
        with reaching_the_others(), torch.no_grad():
            for name, shards in self._state().items():
                wholes = self.layout.views(state[name]) if state else {}
                for key, shape, p, shard in zip(
                    self.layout.names, self.layout.shapes, self._parameters, shards, strict=True
                ):
                    whole = wholes[key].to(shard.device) if state else shard.new_empty(shape)
                    shard.copy_(distribute_tensor(whole, self._mesh, p.placements).to_local())

    def _state(self) -> dict[str, list[Tensor]]:
        flat = [p.to_local() for p in self._parameters]
        return {"flat": flat, "first_moment": self._first, "second_moment": self._second}

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """A process that fails in the midst of a step leaves the others waiting in a collective: the group has to end.

        Where memory ran out, in whichever process, that one notes smaller micro-batches for the next start (the first may hang
        in a collective until it is killed); where a single sequence is too much, no other start helps.
        """
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                smaller = next_smaller_micro_batch(self._mine.stop - self._mine.start, self.micro)
                if smaller is not None and self._team.run_folder is not None:
                    # A disk that refuses it must not keep this process from ending: the others wait for it.
                    with suppress(OSError):
                        note_smaller_parts(self._team.run_folder, smaller)
                    raise TeamLost(
                        f"parallel=fsdp: memory ran out with micro-batches of {self.micro} sequences a process; started "
                        f"again, the run goes on with {smaller}"
                    ) from error
                if self._team.leads:
                    raise UserError(
                        f"parallel=fsdp: memory ran out with micro-batches of {self.micro} sequences a process. Choices: "
                        "more processes, or devices with more memory."
                    ) from error
            raise TeamLost(f"{type(error).__name__} in a step: {str(error).strip()[:300]}") from error
