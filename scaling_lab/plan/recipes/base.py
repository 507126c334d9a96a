"""Owns what a recipe is: a pure function from (shape, horizon, the sweep's horizons) to everything that is tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from scaling_lab.core.parametrization import Parametrization
from scaling_lab.core.spec import OptimizerSpec


@dataclass(frozen=True)
class Hyperparameters:
    """What a recipe decides for one run."""

    batch_tokens: int
    optimizer: OptimizerSpec
    warmup_fraction: float
    """Of the run's own horizon."""
    notes: tuple[str, ...] = ()
    """Roundings and warnings, for the plan."""
    schedule: Any = None
    """A schedule that belongs to the recipe; None: the sweep's own."""


@dataclass(frozen=True)
class SweepHorizons:
    """What a recipe may know of the other runs of its sweep, in tokens. A run alone has its own horizon in both."""

    smallest_budget_tokens: float
    """Geometric mean over the runs of the smallest budget."""
    longest_tokens: float


class Recipe(Protocol):
    """A frozen dataclass with a `kind`, its short name."""

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters: ...


def decide(
    recipe: Recipe, parametrization: Parametrization, shape: Any, train_tokens: float, sweep: SweepHorizons
) -> Hyperparameters:
    """What `recipe` decides for a run of `shape` under a parametrisation.

    LR and weight decay are the recipe's for the parametrisation's base shape at the run's own horizon: from there on the
    parametrisation scales them, once. Batch, warm-up, betas and clipping are the recipe's for the run's own shape. Under
    `standard` every shape is its own base, and the recipe alone decides.
    """
    chosen = recipe.decide(shape, train_tokens, sweep)
    base = parametrization.base_shape(shape)
    if base == shape:
        return chosen
    at_base = recipe.decide(base, train_tokens, sweep)
    optimizer = replace(
        chosen.optimizer,
        peak_lr=at_base.optimizer.peak_lr,
        weight_decay=at_base.optimizer.weight_decay,
    )
    return replace(chosen, optimizer=optimizer, notes=tuple(dict.fromkeys((*at_base.notes, *chosen.notes))))


def round_batch(tokens: float, context: int) -> int:
    """`tokens` as whole sequences of four significant bits, at least one: within 7% of what was wanted from 8 on.

    Powers of two would be off by up to 41%, and neighbouring sizes by a factor of 2: a step in every valley.
    """
    sequences = max(1.0, tokens / context)
    quantum = 2.0 ** max(0, math.floor(math.log2(sequences)) - 3)
    return round(round(sequences / quantum) * quantum) * context
