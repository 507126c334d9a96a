"""Owns what a recipe is: a pure function from (shape, horizon) to everything that is tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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


class Recipe(Protocol):
    """A frozen dataclass with a `kind`, its short name."""

    def decide(self, shape: Any, train_tokens: float) -> Hyperparameters: ...


def power_of_two_batch(tokens: float, context: int) -> int:
    """The whole power-of-two number of sequences nearest in ratio to `tokens`, as tokens; at least one sequence."""
    sequences = max(1.0, tokens / context)
    low = 1 << (int(sequences).bit_length() - 1)
    return int((low if sequences / low < 2 * low / sequences else 2 * low) * context)
