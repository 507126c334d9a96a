"""Owns how a parametrisation reaches a module and its optimiser: multipliers of activations, and each parameter's LR ratio,
weight decay and epsilon. The rules themselves are in core/parametrization.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaling_lab.core.parametrization import Parametrization, Role, role_of
from scaling_lab.core.spec import OptimizerSpec


def scaled(x: Tensor, factor: float) -> Tensor:
    """`x * factor`; at 1 it is `x` itself, so that the standard parametrisation costs nothing and changes no bit."""
    return x if factor == 1.0 else x * factor


@dataclass(frozen=True)
class ParameterGroup:
    """What the optimiser does with one parameter."""

    lr_ratio: float
    """Of the schedule's LR."""
    weight_decay: float
    eps: float


def parameter_groups(
    named_shapes: Iterable[tuple[str, torch.Size]],
    optimizer: OptimizerSpec,
    parametrization: Parametrization,
    shape: Any,
) -> list[ParameterGroup]:
    """One group for each parameter of a model of `shape`. Matrices decay, the embedding and head among them; vectors
    (gains, biases) do not. Raises ValueError for a matrix without a role (see `role_of`)."""
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
