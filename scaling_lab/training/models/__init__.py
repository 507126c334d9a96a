"""Model families as torch modules, one file each, found by the family's short name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scaling_lab.core.parametrization import STANDARD, Parametrization
from scaling_lab.core.registry import member


def build_model(shape: Any, parametrization: Parametrization = STANDARD) -> nn.Module:
    """The module of a shape's family, initialized from torch's global generator: logits (B, T, V) of tokens (B, T)."""
    module: nn.Module = member("scaling_lab.training.models", "model", shape.kind)(shape, parametrization)
    return module


def scaled(x: Tensor, factor: float) -> Tensor:
    """`x * factor`, for the multipliers of a parametrization. For 1 it is `x` itself: no cost, and no bit changes."""
    return x if factor == 1.0 else x * factor
