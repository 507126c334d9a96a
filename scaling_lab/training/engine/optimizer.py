"""AdamW and gradient clipping as pure tensor arithmetic on one flat vector: the part of the step after the gradient.

It does not use `torch.optim` so that forward, backward, clipping and update compile into one program, and the LR is a
tensor: a new LR needs neither recompilation nor a round trip to the host. With one flat vector for all parameters the
update is a handful of kernels instead of a handful per matrix (half the compile time of a tiny model), and a checkpoint
is three vectors. Tested against `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaling_lab.core.parametrization import STANDARD, Parametrization, Role, role_of
from scaling_lab.core.spec import OptimizerSpec


@dataclass(frozen=True)
class FlatLayout:
    """The position of each parameter in the flat vector, in the order of `named_parameters`."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(model: nn.Module) -> FlatLayout:
        named = list(model.named_parameters())
        return FlatLayout(tuple(name for name, _ in named), tuple(p.shape for _, p in named))

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """Concatenate the tensors with this layout's names into one vector."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def gather(self, model: nn.Module, flat: Tensor) -> None:
        """Copy the parameters of a model into `flat` (n,)."""
        views = self.views(flat)
        for name, parameter in model.named_parameters():
            views[name].copy_(parameter.detach())

    def share(self, model: nn.Module, flat: Tensor) -> None:
        """Make the parameters of a model views of `flat`, which frees their own memory."""
        views = self.views(flat)
        for name, parameter in model.named_parameters():
            parameter.data = views[name]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters by name, as views of the flat vector."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {
            name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


@dataclass(frozen=True)
class ParameterGroup:
    """Optimizer settings of one parameter."""

    lr_ratio: float
    """Relative to the schedule's LR."""
    weight_decay: float
    eps: float


def parameter_groups(
    named_shapes: Iterable[tuple[str, torch.Size]],
    optimizer: OptimizerSpec,
    parametrization: Parametrization,
    shape: Any,
) -> list[ParameterGroup]:
    """One group per parameter of a model of `shape`. Matrices have weight decay, the embedding and the head included;
    vectors (gains, biases) have none. Raises ValueError for a matrix without a role (see `role_of`)."""
    ratios = {Role.INPUT: optimizer.embedding_lr_ratio, Role.OUTPUT: optimizer.head_lr_ratio}
    groups = []
    for name, size in named_shapes:
        role = role_of(name, len(size))
        factors = parametrization.factors(role, shape)
        decay = optimizer.weight_decay if len(size) >= 2 else 0.0
        groups.append(
            ParameterGroup(
                lr_ratio=ratios.get(role, 1.0) * factors.lr,
                weight_decay=decay * factors.weight_decay,
                eps=optimizer.eps * factors.eps,
            )
        )
    return groups


class GroupVectors(NamedTuple):
    """Optimizer settings of all parameters: each a flat vector (n,), or a single number if it is the same for all of them. In
    a stack a vector is (K, n), or (1, n) if all members have the same one."""

    lr_ratio: Tensor | float
    weight_decay: Tensor | float
    eps: Tensor | float

    def to(self, target: torch.device | torch.dtype) -> GroupVectors:
        return GroupVectors(*(v.to(target) if isinstance(v, Tensor) else v for v in self))

    def part(self, columns: slice) -> GroupVectors:
        """The settings of some of the parameters."""
        return GroupVectors(*(v[..., columns] if isinstance(v, Tensor) else v for v in self))


def group_vectors(
    layout: FlatLayout,
    optimizer: OptimizerSpec | Sequence[OptimizerSpec],
    parametrization: Parametrization = STANDARD,
    shape: Any = None,
) -> GroupVectors:
    """`parameter_groups` of a model of `shape` as vectors, or of a stack of models with several optimizers; only the standard
    parametrization needs no shape."""
    stacked = not isinstance(optimizer, OptimizerSpec)
    optimizers = optimizer if not isinstance(optimizer, OptimizerSpec) else [optimizer]
    named = list(zip(layout.names, layout.shapes, strict=True))
    members = [parameter_groups(named, each, parametrization, shape) for each in optimizers]

    def flat(name: str) -> Tensor | float:
        rows = [[float(getattr(group, name)) for group in groups] for groups in members]
        if len(distinct := {value for row in rows for value in row}) == 1:
            return distinct.pop()
        rows = rows[:1] if all(row == rows[0] for row in rows) else rows
        vectors = torch.empty(len(rows), sum(size.numel() for size in layout.shapes))
        for row, vector in zip(rows, vectors, strict=True):
            for value, view in zip(row, layout.views(vector).values(), strict=True):
                view.fill_(value)
        return vectors if stacked else vectors[0]

    return GroupVectors(flat("lr_ratio"), flat("weight_decay"), flat("eps"))


def clip_scale(gradient: Tensor, max_norm: float | Tensor) -> tuple[Tensor, Tensor]:
    """The factor (..., 1) that reduces the norm over the last dimension to at most `max_norm`, and the norm before
    clipping (as in `clip_grad_norm_`)."""
    norm = gradient.square().sum(-1, keepdim=True).sqrt()
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0), norm


def adamw_update(
    parameters: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    groups: GroupVectors,
    optimizer: OptimizerSpec,
    controls: Tensor,
) -> None:
    """One step, in place, on flat vectors (n,), or (K, n) for K runs. `controls` is (3,) or (K, 3): LR, 1 - beta1^t and
    1 - beta2^t.

    Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, with decoupled decay multiplied by the LR as in
    `torch.optim.AdamW`.
    """
    lr, correction1, correction2 = controls.split(1, dim=-1)
    first_moment.lerp_(gradient, 1 - optimizer.beta1)
    second_moment.lerp_(gradient.square(), 1 - optimizer.beta2)
    rate = lr * groups.lr_ratio
    # In place: an eager step holds two temporary vectors instead of seven.
    update = first_moment / correction1
    update.div_((second_moment / correction2).sqrt_().add_(groups.eps)).mul_(rate)
    parameters.mul_(1 - rate * groups.weight_decay).sub_(update)


def control_rows(learning_rates: Sequence[float], first_step: int, optimizer: OptimizerSpec) -> Tensor:
    """The `controls` of consecutive steps, (n, 3) float32; `first_step` counts from 0."""
    rows = [
        (lr, 1 - optimizer.beta1 ** (first_step + i + 1), 1 - optimizer.beta2 ** (first_step + i + 1))
        for i, lr in enumerate(learning_rates)
    ]
    return torch.tensor(rows, dtype=torch.float64).float()
