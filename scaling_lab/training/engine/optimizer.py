"""Owns AdamW as pure tensor arithmetic over one flat vector, and clipping: the part of the step after the gradient.

Written out rather than taken from `torch.optim` so that forward, backward, clipping and update compile into one program
and the LR is a tensor: no recompilation and no host round trip as it changes. One flat vector for all parameters makes
the update a handful of kernels instead of a handful per matrix (half the compile time of a tiny model), and a
checkpoint three vectors. Tested against `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaling_lab.core.parametrization import STANDARD, Parametrization
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.training.engine.parametrization import parameter_groups


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter lies in the flat vector, in the order of `named_parameters`."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(model: nn.Module) -> FlatLayout:
        named = list(model.named_parameters())
        return FlatLayout(tuple(name for name, _ in named), tuple(p.shape for _, p in named))

    def flatten(self, tensors: dict[str, Tensor]) -> Tensor:
        """All tensors, by this layout's names, as one vector."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The flat vector's parts under their names and shapes; they share its memory."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return {
            name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


class GroupVectors(NamedTuple):
    """What the optimiser does with every parameter, flat (n,)."""

    lr_ratio: Tensor
    weight_decay: Tensor
    eps: Tensor | float
    """One number where all parameters have the same."""

    def to(self, target: torch.device | torch.dtype) -> GroupVectors:
        eps = self.eps.to(target) if isinstance(self.eps, Tensor) else self.eps
        return GroupVectors(self.lr_ratio.to(target), self.weight_decay.to(target), eps)


def group_vectors(
    layout: FlatLayout,
    optimizer: OptimizerSpec,
    parametrization: Parametrization = STANDARD,
    shape: Any = None,
) -> GroupVectors:
    """The groups of a model of `shape` (which only `standard` can do without), see `parameter_groups`."""
    groups = parameter_groups(zip(layout.names, layout.shapes), optimizer, parametrization, shape)

    def flat(values: Sequence[float]) -> Tensor:
        return torch.cat(
            [torch.full((size.numel(),), value) for value, size in zip(values, layout.shapes, strict=True)]
        )

    eps = [group.eps for group in groups]
    return GroupVectors(
        lr_ratio=flat([group.lr_ratio for group in groups]),
        weight_decay=flat([group.weight_decay for group in groups]),
        eps=eps[0] if len(set(eps)) == 1 else flat(eps),
    )


def clip_scale(gradient: Tensor, max_norm: float | Tensor) -> tuple[Tensor, Tensor]:
    """The factor (..., 1) that brings the norm over the last dimension to at most `max_norm`, and the norm before (as
    `clip_grad_norm_`)."""
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
    """One step in place on flat vectors (n,), or (K, n) for K runs. `controls` is (3,) or (K, 3): LR, 1 - beta1^t and
    1 - beta2^t.

    Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, decay decoupled and multiplied by the LR as in
    `torch.optim.AdamW`.
    """
    lr, correction1, correction2 = controls.split(1, dim=-1)
    first_moment.lerp_(gradient, 1 - optimizer.beta1)
    second_moment.lerp_(gradient.square(), 1 - optimizer.beta2)
    rate = lr * groups.lr_ratio
    update = (first_moment / correction1) / ((second_moment / correction2).sqrt() + groups.eps)
    parameters.mul_(1 - rate * groups.weight_decay).sub_(rate * update)


def control_rows(learning_rates: Sequence[float], first_step: int, optimizer: OptimizerSpec) -> Tensor:
    """The `controls` of consecutive steps, (n, 3) float32; `first_step` counts from 0."""
    rows = [
        (lr, 1 - optimizer.beta1 ** (first_step + i + 1), 1 - optimizer.beta2 ** (first_step + i + 1))
        for i, lr in enumerate(learning_rates)
    ]
    return torch.tensor(rows, dtype=torch.float64).float()
