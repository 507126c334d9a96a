"""The step of a model that does not fit on one device: FSDP2, with parameters, gradients and moments sharded.

It uses the ordinary module and autograd (Zhao et al. 2023, arXiv 2304.11277; `fully_shard`, which shards per parameter):
each block's parameters are gathered for its forward and backward pass and freed afterwards; gradients arrive as shards.
Clipping and AdamW work on the shards. To save a state it is gathered parameter by parameter into the flat vectors of
`TrainStep`, on the CPU of the first process, so that checkpoints have the same format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution, OptimizerSpec, RunSpec
from scaling_lab.planning.memory import divisors, next_smaller_micro_batch
from scaling_lab.training.engine.gradient import ModelWithLoss, autocast
from scaling_lab.training.engine.memory import is_out_of_memory, save_micro_batch_hint
from scaling_lab.training.engine.optimizer import FlatLayout, ParameterGroup, clip_scale, parameter_groups
from scaling_lab.training.engine.process_errors import note_process_error
from scaling_lab.training.parallel.shards import load_shards, write_shards
from scaling_lab.training.parallel.team import Team, TeamLost, collective_guard, is_communication_error

# Gradients are summed over the processes once a step, for which each process holds them whole, unless they take more than
# this share of its device; then once a micro-batch.
MAX_GRADIENT_SHARE = 0.15


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
        on_host = tokens.device.type == "cpu"
        self._host_mesh = self._mesh if on_host else init_device_mesh("cpu", (size,))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._saving: Future[dict[str, str]] | None = None
        for blocks in [module for module in model.children() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                if execution.compile:
                    block.compile()
                fully_shard(block, mesh=self._mesh, mp_policy=block_precision(spec.dtype))
        # The loss is part of FSDP's forward pass, because only there are the head's weights gathered.
        self._with_loss = ModelWithLoss(model, spec)
        fully_shard(self._with_loss, mesh=self._mesh)
        self._parameters: list[Any] = [p for _, p in model.named_parameters()]
        self._first = [torch.zeros_like(p.to_local()) for p in self._parameters]
        self._second = [torch.zeros_like(p.to_local()) for p in self._parameters]
        groups = parameter_groups(
            zip(self.layout.names, self.layout.shapes), spec.optimizer, spec.parametrization, spec.shape
        )
        self._groups = groups
        self._once_a_step = self._gradients_fit()
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
        for k, part in enumerate(parts):
            if self._once_a_step:
                self._with_loss.set_requires_gradient_sync(k == len(parts) - 1)  # type: ignore[operator]
            window = self.tokens[part[:, None] + self._offsets].long()
            with autocast(window, self._spec):
                part_loss: Tensor = self._with_loss(window[:, :-1], window[:, 1:]) / len(parts)
            part_loss.backward()  # FSDP averages over the processes, in float32
            loss += part_loss.detach()
        gradients = [p.grad.to_local() for p in self._parameters]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        sums = torch.stack((loss / self._team.world.size, squares))
        dist.all_reduce(sums)
        scale, _ = clip_scale(sums[1].sqrt()[None], self._spec.optimizer.clip_norm)
        torch._foreach_mul_(gradients, scale.squeeze())
        with torch.no_grad():
            parameters = [p.to_local() for p in self._parameters]
            foreach_adamw_update(
                parameters, gradients, self._first, self._second, self._groups, self._spec.optimizer, controls
            )
        for p in self._parameters:
            p.grad = None
        return torch.stack((sums[0], sums[1], sums[1]))

    def _gradients_fit(self) -> bool:
        if self.tokens.device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(self.tokens.device).total_memory
        return 4 * sum(shape.numel() for shape in self.layout.shapes) <= MAX_GRADIENT_SHARE * total

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits under the current parameters; to be called in all processes at once."""
        with self._end_team_on_error():
            out: Tensor = self._with_loss(tokens)
        return out

    def state(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Everything that a step changes, or `names` of it, gathered on the CPU of the first process (empty in the others)."""
        self._team.broadcast_command("state", names)
        out = {}
        with collective_guard(), torch.no_grad():
            for name, shards in self._shards().items():
                if names is not None and name not in names:
                    continue
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

    def save_shards(self, folder: Path) -> Future[dict[str, str]]:
        """In all processes: copy the shards to the host, and write them in a thread of each process. The result has the
        checksums of all files, in the first process."""
        self._team.broadcast_command("save_shards", folder)
        with self._end_team_on_error():
            copies = self._named_shards(copy=True)
        if self._saving is not None:
            self._saving.exception()
        self._saving = self._pool.submit(write_shards, folder, copies, self._team.checkpoints)
        return self._saving

    def load_shards(self, folder: Path) -> None:
        """Load what `save_shards` wrote with any number of processes: each process reads its own shards."""
        self._team.broadcast_command("load_shards", folder)
        load_shards(folder, self._named_shards(copy=False), self._team.checkpoints)

    def _named_shards(self, copy: bool) -> dict[str, DTensor]:
        """The shards as parts of whole tensors: the shards themselves, or copies on the host."""
        mesh = self._host_mesh if copy else self._mesh
        return {
            f"{kind}.{name}": DTensor.from_local(
                shard.detach().to("cpu", copy=True) if copy else shard.detach(),
                mesh, p.placements, shape=p.shape, stride=p.stride(),
            )
            for kind, shards in self._shards().items()
            for name, p, shard in zip(self.layout.names, self._parameters, shards, strict=True)
        }  # fmt: skip

    def host_parameters(self) -> dict[str, Tensor]:
        """The parameters by name, gathered in host memory."""
        return self.layout.views(self.state(("flat",))["flat"])

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
        process may hang in a collective until it is killed). If a single sequence was too much, restarting does not help. An
        error that is not about communication is noted in the run, which is retried once.
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
            if self._team.run_folder is not None and not is_communication_error(error):
                note_process_error(self._team.run_folder, error, self._team.world.rank)
            raise TeamLost(f"{type(error).__name__} in a step: {str(error).strip()[:300]}") from error


def block_precision(dtype: str) -> MixedPrecisionPolicy:
    """How a block is gathered and its gradients are summed: bfloat16 weights, half the bytes, and float32 sums.

    Its matrix products are in bfloat16 anyway, by autocast, and the residual stream stays float32. Embedding and head, a small
    part of a model that needs sharding, are gathered in float32.
    """
    if dtype != "bfloat16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def foreach_adamw_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    groups: Sequence[ParameterGroup],
    optimizer: OptimizerSpec,
    controls: Tensor,
) -> None:
    """`adamw_update` for a list of tensors, with a few kernels for all of them together."""
    lr, correction1, correction2 = controls.unbind(-1)
    torch._foreach_lerp_(first, gradients, 1 - optimizer.beta1)
    torch._foreach_mul_(second, optimizer.beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - optimizer.beta2)
    denominators = torch._foreach_div(second, correction2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, [group.eps for group in groups])
    updates = torch._foreach_div(first, correction1)
    torch._foreach_div_(updates, denominators)
    del denominators
    torch._foreach_add_(updates, torch._foreach_mul(parameters, [group.weight_decay for group in groups]))
    torch._foreach_mul_(updates, [group.lr_ratio for group in groups])
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(parameters, updates)
