"""The coordinate check: the size of activations, and how much a few steps change them, at several widths and depths.

A parametrization is correct if the size of single coordinates does not depend on the width (muP) and the depth (CompleteP):
Yang et al. 2022 (arXiv 2203.03466, appendix D.1), Dey et al. 2025 (arXiv 2505.01618, figure 5). Sizes are root mean squares
over tokens, coordinates and seeds. The models, the step and the optimizer are those of ordinary sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scaling_lab.core.parametrization import Parametrization
from scaling_lab.core.schedules import Constant
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import Execution, OptimizerSpec, RunSpec
from scaling_lab.training.engine.optimizer import control_rows
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.models import build_model

# The measured quantities, computed from the modules that every family has.
STREAM, BRANCHES, LOGITS = "residual stream", "residual branches", "logits"
QUANTITIES = (STREAM, BRANCHES, LOGITS)
BATCH_SEQUENCES = 8
# Enough steps for Adam's momentum to build up, and few enough that the models have not learned different things.
STEPS = 8


@dataclass(frozen=True)
class Coordinates:
    """The coordinate sizes of one model: quantity -> root mean square over tokens, coordinates and seeds."""

    parametrization: Parametrization
    width: int
    depth: int
    size: dict[str, float]
    """Activations after the steps."""
    change: dict[str, float]
    """Changes of the activations since initialization, on the same tokens."""


def measure(
    shape: Any,
    parametrization: Parametrization,
    tokens: np.ndarray,
    *,
    peak_lr: float,
    steps: int = STEPS,
    seeds: Sequence[int] = (0, 1),
) -> Coordinates:
    """Train a model of `shape` for a few steps with a constant LR, and compare its activations before and after.

    Args:
        tokens: (n,) a text; the model is trained on its first windows and probed on its last ones.
        peak_lr: the LR at the parametrization's base shape.

    Raises ValueError for a text that is too short.
    """
    squares: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    changes: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    for seed in seeds:
        before, after = _before_and_after(shape, parametrization, tokens, peak_lr, steps, seed)
        for name in QUANTITIES:
            squares[name].append(float(after[name].square().mean()))
            changes[name].append(float((after[name] - before[name]).square().mean()))
    return Coordinates(
        parametrization,
        shape.width,
        shape.depth,
        {name: math.sqrt(np.mean(values)) for name, values in squares.items()},
        {name: math.sqrt(np.mean(values)) for name, values in changes.items()},
    )


def _before_and_after(
    shape: Any, parametrization: Parametrization, tokens: np.ndarray, peak_lr: float, steps: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    context, batch = shape.context, BATCH_SEQUENCES
    if tokens.size < 2 * batch * context + 1:
        raise ValueError(f"{tokens.size} tokens are too few: a batch and a probe need {batch} windows each")
    data = torch.from_numpy(tokens.astype(np.int64))
    probe = data[-batch * context :].view(batch, context)
    optimizer = OptimizerSpec(peak_lr=peak_lr)
    spec = RunSpec(
        sweep="coordinates", role="single", budget_flops=1.0, shape=shape, data=PySource(), schedule=Constant(0.0),
        optimizer=optimizer, batch_tokens=batch * context, train_tokens=batch * context * steps,
        parametrization=parametrization,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = build_model(shape, parametrization)
    step = TrainStep(model, data, spec, Execution())
    before = activations(model, step.parameters(), probe)
    windows = (data.numel() - 1) // context - batch
    starts = torch.from_numpy(np.random.default_rng(seed).integers(0, windows, (steps, batch)) * context)
    step.run(starts, control_rows([peak_lr] * steps, 0, optimizer))
    return before, activations(model, step.parameters(), probe)


def activations(model: nn.Module, parameters: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """`QUANTITIES` of a model with these `parameters`: the residual stream after the last block, what all blocks together
    have added to it, and the logits."""
    seen: dict[str, Tensor] = {}
    blocks: Any = model.blocks

    def first(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["begin"] = inputs[0]

    def last(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[STREAM] = output

    hooks = [blocks[0].register_forward_pre_hook(first), blocks[-1].register_forward_hook(last)]
    try:
        with torch.no_grad():
            logits: Tensor = torch.func.functional_call(model, parameters, (tokens,))
    finally:
        for hook in hooks:
            hook.remove()
    # Copies, because the next step changes the parameters, and what refers to them, in place.
    return {
        STREAM: seen[STREAM].clone(),
        BRANCHES: seen[STREAM] - seen["begin"],
        LOGITS: logits.clone(),
    }


def growth(points: Sequence[Coordinates], by: str, value: Callable[[Coordinates], float]) -> float:
    """The exponent of `value` in the width or the depth (`by`), by least squares on logarithms; 0 means flat."""
    x = np.log([getattr(point, by) for point in points])
    y = np.log([value(point) for point in points])
    return float(np.polyfit(x, y, 1)[0])


def shapes_along(
    shape: Any, *, widths: Sequence[int] = (), depths: Sequence[int] = (), head_dim: int = 16
) -> list[Any]:
    """`shape` with each of `widths`, or each of `depths`; the number of heads follows the width, with a fixed head size."""
    return [replace(shape, width=w, heads=w // head_dim) for w in widths] + [
        replace(shape, depth=d) for d in depths
    ]
