"""Owns what a recipe is: a pure function from (shape, horizon, the sweep's horizons) to everything that is tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from scaling_lab.core.errors import UserError
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
    rule_batch_tokens: float | None = None
    """The batch before it was rounded; None where it was given."""
    schedule: Any = None
    """A schedule that belongs to the recipe; None: the sweep's own."""
    warmup_in_tokens: bool = False
    """Whether the warm-up is the same number of tokens at every horizon, and no share of it."""


@dataclass(frozen=True)
class SweepHorizons:
    """What a recipe may know of the other runs of its sweep, in tokens. A run alone has its own horizon in both."""

    smallest_budget_tokens: float
    """Geometric mean over the runs of the smallest budget."""
    longest_tokens: float


@dataclass(frozen=True)
class FieldsThatReplaceRules:
    """What a user may fix in every published recipe; None leaves it to the rule."""

    peak_lr: float | None = None
    batch_tokens: int | None = None
    warmup_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.peak_lr is not None and not self.peak_lr > 0:
            raise UserError(f"recipe.peak_lr={self.peak_lr!r} must be positive.")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"recipe.warmup_fraction={self.warmup_fraction!r} must be in [0, 1].")

    def batch(self, rule_tokens: float, context: int) -> tuple[int, float | None]:
        """(the fixed batch or the rule's in whole sequences, the rule's before). Raises `UserError` where the context does
        not divide it."""
        if self.batch_tokens is None:
            return round_batch(rule_tokens, context), rule_tokens
        return check_batch(self.batch_tokens, context), None

    def warmed_up(
        self, peak_lr: float, warmup_tokens: float, train_tokens: float
    ) -> tuple[float, float, tuple[str, ...]]:
        """(peak LR, warm-up as a share of the run, notes). A warm-up longer than the run ends below the peak: the run
        is all warm-up, to the LR that it has reached at its end."""
        peak_lr = peak_lr if self.peak_lr is None else self.peak_lr
        if self.warmup_fraction is not None:
            return peak_lr, self.warmup_fraction, ()
        share = warmup_tokens / train_tokens
        if share <= 1:
            return peak_lr, share, ()
        note = (
            f"a run of {train_tokens:,.0f} tokens ends within the recipe's warm-up of {warmup_tokens:,.0f} tokens, at "
            f"{1 / share:.0%} of its peak LR."
        )
        return peak_lr / share, 1.0, (note,)


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


def check_batch(batch_tokens: int, context: int) -> int:
    """Raises `UserError` unless the batch is a whole number of sequences."""
    if batch_tokens < context or batch_tokens % context:
        raise UserError(
            f"recipe.batch_tokens={batch_tokens} must be a positive multiple of model.context={context}."
        )
    return batch_tokens


def outside(kind: str, what: str, value: float, low: float, high: float) -> tuple[str, ...]:
    """The note that a recipe is used outside of where it was fitted (to a factor of 2); the same for all such runs."""
    if low / 2 <= value <= high * 2:
        return ()
    return (
        f"recipe={kind} was fitted at {low:.2g} to {high:.2g} {what}, and this plan has runs outside of that: check its "
        "learning rate with design=learning_rate.",
    )
