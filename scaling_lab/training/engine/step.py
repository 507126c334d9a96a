"""One optimization step, from forward to update, as one program for a run or for a stack of runs with the same shape.

A stack is `torch.func.vmap` over the same step: the same ordinary module, with a leading dimension of members everywhere.
Members share nothing but the corpus: each has its own windows, learning rate, clipping norm and end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import loss_chunks
from scaling_lab.training.engine.attention_rules import register_attention_rules
from scaling_lab.training.engine.cuda_graph import BlockGraph
from scaling_lab.training.engine.gradient import make_gradient
from scaling_lab.training.engine.optimizer import (
    FlatLayout,
    GroupVectors,
    adamw_update,
    clip_scale,
    group_vectors,
)
from scaling_lab.training.engine.shared_programs import (
    as_tensors,
    shared_program,
    shares_programs,
    without_weights,
)
from scaling_lab.training.engine.step_library import can_use_library, step_from_library, torch_compiled

# Columns of the step metrics: the mean loss before the update, the mean squared norm of the micro-batches' gradients, and
# the squared norm of the whole batch's gradient. The last two give the noise scale; they are equal for one micro-batch.
LOSS, MICRO_GRADIENT_SQUARE, GRADIENT_SQUARE = range(3)
# An eager update works on so many numbers at a time, so that its temporaries are small. Compiled, they do not exist.
UPDATE_AT_ONCE = 2**22


class TrainStep:
    """Parameters and optimizer state as flat vectors (n,), and the step that updates them; (K, n) for K runs.

    `run(starts, controls)` executes a block of steps on the windows of `tokens` that begin at `starts` (steps, batch), with
    the `controls` (steps, 3) of `adamw_update`. For a stack these are (steps, K, batch) and (steps, K, 3), and a row of zeros
    leaves a member unchanged. It returns the step metrics, (steps, 3) or (steps, K, 3), on the device (see `LOSS`).
    """

    holds_all_parameters = True

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module],
        tokens: Tensor,
        spec: RunSpec | Sequence[RunSpec],
        execution: Execution,
        sequences: int | None = None,
    ) -> None:
        """The models of a stack may be a generator: none is needed once its parameters are copied, except for the first, whose
        own parameters become views of the state. `sequences` of each batch are computed here; None: all of them (see
        `DataParallelStep`)."""
        self.stacked = not isinstance(spec, RunSpec)
        specs: tuple[RunSpec, ...] = (spec,) if isinstance(spec, RunSpec) else tuple(spec)
        self.tokens = tokens
        self._gather([model] if isinstance(model, nn.Module) else model, len(specs))
        self.first_moment = torch.zeros_like(self.flat)
        self.second_moment = torch.zeros_like(self.flat)
        self.batch = sequences or specs[0].batch_sequences
        self.micro = execution.micro_batch_sequences or self.batch
        if self.batch % self.micro:
            raise ValueError(f"micro-batches of {self.micro} sequences do not divide a batch of {self.batch}")
        self._build(specs, execution, sequences)
        self._graph: BlockGraph | None = None
        self._use_graph = tokens.device.type == "cuda"

    def _gather(self, models: Iterable[nn.Module], members: int) -> None:
        """Copy the parameters of all models into the flat state."""
        for k, model in enumerate(models):
            if k == 0:
                self.model: nn.Module = model
                self.layout = FlatLayout.of(model)
                size = sum(shape.numel() for shape in self.layout.shapes)
                first = next(model.parameters()).detach()
                self.flat = first.new_empty((members, size) if self.stacked else size)
                rows = self.flat.view(members, size)
            self.layout.gather(model, rows[k])
        self.layout.share(self.model, rows[0])

    def _build(self, specs: tuple[RunSpec, ...], execution: Execution, sequences: int | None) -> None:
        """Make the programs: the whole step as one, and its parts for a step with several micro-batches."""
        spec, parts, stacked = specs[0], self.batch // self.micro, self.stacked
        shared = execution.compile and shares_programs(self.flat.device)
        model = without_weights(self.model) if shared else self.model
        gradient_of = make_gradient(model, self.layout, spec, self.micro, execution.compile)
        if stacked:
            register_attention_rules()
            gradient_of = torch.func.vmap(gradient_of, in_dims=(0, 0, None))
        optimizers = [s.optimizer for s in specs] if stacked else spec.optimizer
        groups = group_vectors(self.layout, optimizers, spec.parametrization, spec.shape).to(self.flat.device)
        columns = [slice(None)] if execution.compile else update_parts(self.flat)
        clip_norm: Any = spec.optimizer.clip_norm
        if stacked:
            norms = [s.optimizer.clip_norm for s in specs]
            clip_norm = torch.tensor(norms, device=self.flat.device)[:, None]
        # A shared program takes these as inputs, so it must not hold them.
        settings, share = (groups, clip_norm), 1 / parts

        def accumulate(starts: Tensor, flat: Tensor, total: Tensor, data: Tensor, share: Any) -> Tensor:
            gradient, loss = gradient_of(flat, starts, data)
            if isinstance(share, Tensor):
                total.add_(gradient * share)
            else:
                total.add_(gradient, alpha=share)
            return torch.stack((loss, gradient.square().sum(-1)), -1)

        def update(
            gradient: Tensor, controls: Tensor, flat: Tensor, first: Tensor, second: Tensor,
            groups: GroupVectors, clip_norm: Any,
        ) -> Tensor:  # fmt: skip
            scale, norm = clip_scale(gradient, clip_norm)
            for part in columns:
                state = (flat[..., part], first[..., part], second[..., part])
                new = tuple(t.clone() for t in state) if stacked else state
                own = gradient[..., part] * scale
                adamw_update(new[0], own, new[1], new[2], groups.part(part), spec.optimizer, controls)
                if stacked:
                    active = (controls != 0).any(-1, keepdim=True)
                    for old, changed in zip(state, new, strict=True):
                        old.copy_(torch.where(active, changed, old))
            return norm.squeeze(-1).square()

        def whole(
            starts: Tensor, controls: Tensor, flat: Tensor, first: Tensor, second: Tensor, data: Tensor,
            groups: GroupVectors, clip_norm: Any,
        ) -> Tensor:  # fmt: skip
            gradient, loss = gradient_of(flat, starts, data)
            square = update(gradient, controls, flat, first, second, groups, clip_norm)
            return torch.stack((loss, square, square), -1)

        self._total = torch.zeros_like(self.flat) if parts > 1 else None
        if shared:
            program = partial(shared_program, self._program_key(spec))
            settings, share = as_tensors((settings, share), self.flat.device)
            # The positions of the starts and of the corpus. The batch of a stack is a constant (see `_program_key`).
            self._accumulate = program(accumulate, (share,), (3,) if stacked else (0, 3))
            self._update = program(update, settings, ())
            self._whole = program(whole, settings, (5,) if stacked else (0, 5))
            return

        def bind(function: Any, *values: Any) -> Any:
            return lambda *inputs: function(*inputs, *values)

        wrap = torch_compiled if execution.compile else _eager
        self._accumulate, self._update = wrap(bind(accumulate, share)), wrap(bind(update, *settings))
        # With several processes the gradient and the update are separate programs.
        single_program = sequences is None and parts == 1
        if execution.compile and single_program and can_use_library(spec, self.batch, self.flat, stacked):
            whole_step = bind(whole, *settings)
            self._whole = step_from_library(whole_step, self.model, spec, groups, self.batch, self.tokens)
        else:
            self._whole = wrap(bind(whole, *settings))

    def _program_key(self, spec: RunSpec) -> Any:
        """What a shared program depends on, apart from its inputs."""
        chunked = (
            loss_chunks(self.micro * spec.shape.context, spec.shape.vocab_size, self.flat.device.type) > 1
        )
        # torch's own batching rules (of torch.cat, for one) make constants of sizes; the compiler does of a batch of 1.
        batch = self.micro if self.stacked else self.micro == 1
        return (
            type(self.model), spec.shape, spec.parametrization, spec.dtype, spec.optimizer.beta1, spec.optimizer.beta2,
            self.flat.shape, self.flat.device, self.tokens.dtype, batch, chunked,
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    def __call__(self, starts: Tensor, controls: Tensor) -> Tensor:
        """One step; returns its metrics."""
        state = (self.flat, self.first_moment, self.second_moment)
        if self._total is None:
            metrics: Tensor = self._whole(starts, controls, *state, self.tokens)
            return metrics
        self._total.zero_()
        means = torch.stack(
            [
                self._accumulate(part.contiguous(), self.flat, self._total, self.tokens)
                for part in starts.split(self.micro, dim=-1)
            ]
        ).mean(0)
        square = self._update(self._total, controls, *state)
        return torch.cat((means, square[..., None]), -1)

    def run(self, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps; returns their metrics."""
        if self._use_graph:
            if self._graph is None:
                self._graph = BlockGraph(self, self.state(), starts[0], controls[0])
            return self._graph.run(self, starts, controls)
        return torch.stack([self(starts[i], controls[i]) for i in range(len(starts))])

    def parameters(self) -> dict[str, Tensor]:
        """The current parameters by name, as views of the flat vector."""
        return self.layout.views(self.flat)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits under the current parameters, for a step that is not stacked."""
        out: Tensor = torch.func.functional_call(self.model, self.parameters(), (tokens,))
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; the tensors themselves, not copies."""
        return {"flat": self.flat, "first_moment": self.first_moment, "second_moment": self.second_moment}

    def host_copy(self) -> dict[str, Tensor]:
        """A copy of the state in host memory, which the next steps do not change."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state().items()}

    def host_parameters(self) -> dict[str, Tensor]:
        """A copy of the parameters by name in host memory."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.parameters().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load a saved state in place. Raises ValueError for tensors of another size."""
        load_into(self.state(), state)


class StackSlot:
    """One member of a stack, with the interface of a `TrainStep` of its own: its state is one row of the stack's."""

    holds_all_parameters = True

    def __init__(self, stack: TrainStep, index: int) -> None:
        self.stack, self.index = stack, index
        self.model, self.layout, self.tokens = stack.model, stack.layout, stack.tokens
        self.flat = stack.flat[index]

    def parameters(self) -> dict[str, Tensor]:
        return self.layout.views(self.flat)

    def logits(self, tokens: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.model, self.parameters(), (tokens,))
        return out

    def state(self) -> dict[str, Tensor]:
        return {name: tensor[self.index] for name, tensor in self.stack.state().items()}

    def host_copy(self) -> dict[str, Tensor]:
        # Copies: a row saved as a view would save the storage of the whole stack with it.
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.state().items()}

    def host_parameters(self) -> dict[str, Tensor]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.parameters().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        load_into(self.state(), state)


def update_parts(flat: Tensor) -> list[slice]:
    """The columns of the state (n,) or (K, n) in parts of about `UPDATE_AT_ONCE` numbers."""
    columns = flat.shape[-1]
    each = max(1, UPDATE_AT_ONCE * columns // flat.numel())
    return [slice(None)] if each >= columns else [slice(k, k + each) for k in range(0, columns, each)]


def load_into(target: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy a saved state into tensors of the same names. Raises ValueError for tensors of another size."""
    for name, tensor in target.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, this model needs {tuple(tensor.shape)}"
            )
        tensor.copy_(state[name])


def _eager(function: Any) -> Any:
    return function
