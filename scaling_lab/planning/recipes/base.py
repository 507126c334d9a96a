"""The `Recipe` protocol: a pure function from (shape, horizon, the sweep's horizons) to all tuned hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from scaling_lab.core.errors import UserError
from scaling_lab.core.parametrization import Parametrization
from scaling_lab.core.spec import OptimizerSpec, RunSpec


@dataclass(frozen=True)
class Hyperparameters:
    """A recipe's decision for one run."""

    batch_tokens: int
    optimizer: OptimizerSpec
    warmup_fraction: float
    """Fraction of the run's own horizon."""
    notes: tuple[str, ...] = ()
    """Roundings and warnings, for the plan."""
    rule_batch_tokens: float | None = None
    """The batch before rounding; None if it was given."""
    schedule: Any = None
    """The recipe's own schedule; None: use the sweep's."""
    final_fraction: float | None = None
    """Final LR over peak LR of the sweep's cosine, unless the user changed it; None: the schedule's own."""
    warmup_in_tokens: bool = False
    """Whether the warmup is a fixed number of tokens instead of a fraction of the horizon."""


@dataclass(frozen=True)
class SweepHorizons:
    """What a recipe may know about the other runs of its sweep, in tokens; for a single run, both are its own horizon."""

    smallest_budget_tokens: float
    """Geometric mean over the runs of the smallest budget."""
    longest_tokens: float
    device: str = "cpu"
    """Where the runs are computed: cpu, cuda or mps."""


@dataclass(frozen=True)
class RuleOverrides:
    """Values that a user may fix in every published recipe; None: the recipe's rule decides."""

    peak_lr: float | None = None
    batch_tokens: int | None = None
    warmup_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.peak_lr is not None and not self.peak_lr > 0:
            raise UserError(f"recipe.peak_lr={self.peak_lr!r} must be positive.")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"recipe.warmup_fraction={self.warmup_fraction!r} must be in [0, 1].")

    def overview(self, specs: Sequence[RunSpec]) -> tuple[str, ...]:
        """No notes beyond those of single runs."""
        return ()

    def resolve_batch(self, rule_tokens: float, context: int) -> tuple[int, float | None]:
        """(batch in tokens, the rule's batch before rounding or None if the batch is fixed). Raises `UserError` if a fixed
        batch is not a multiple of the context."""
        if self.batch_tokens is None:
            return round_batch(rule_tokens, context), rule_tokens
        return check_batch(self.batch_tokens, context), None

    def resolve_warmup(
        self, peak_lr: float, warmup_tokens: float, train_tokens: float
    ) -> tuple[float, float, tuple[str, ...]]:
        """(peak LR, warmup as a fraction of the run, notes). If the warmup is longer than the run, the whole run is warmup
        and the peak LR is the LR reached at its end."""
        peak_lr = peak_lr if self.peak_lr is None else self.peak_lr
        if self.warmup_fraction is not None:
            return peak_lr, self.warmup_fraction, ()
        fraction = warmup_tokens / train_tokens
        if fraction <= 1:
            return peak_lr, fraction, ()
        note = (
            f"a run of {train_tokens:,.0f} tokens ends during the recipe's warmup of {warmup_tokens:,.0f} tokens, at "
            f"{1 / fraction:.0%} of its peak LR."
        )
        return peak_lr / fraction, 1.0, (note,)


class Recipe(Protocol):
    """A frozen dataclass with a `kind`, its short name."""

    def decide(self, shape: Any, train_tokens: float, sweep: SweepHorizons) -> Hyperparameters: ...

    def overview(self, specs: Sequence[RunSpec]) -> tuple[str, ...]:
        """Notes on the plan as a whole."""
        ...


def decide(
    recipe: Recipe, parametrization: Parametrization, shape: Any, train_tokens: float, sweep: SweepHorizons
) -> Hyperparameters:
    """The decision of `recipe` for a run of `shape` under a parametrization.

    LR and weight decay are the recipe's values for the parametrization's base shape at the run's own horizon; training then
    scales them to the run's shape. Batch, warmup, betas and clipping are the recipe's values for the run's own shape. Under
    `standard` every shape is its own base shape, so the recipe alone decides.
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
    """`tokens` rounded to whole sequences with four significant bits, at least one: within 7% from 8 sequences on.

    Powers of two would be off by up to 41% and differ by a factor of 2 between adjacent sizes: a step in every valley.
    """
    sequences = max(1.0, tokens / context)
    quantum = 2.0 ** max(0, math.floor(math.log2(sequences)) - 3)
    return round(round(sequences / quantum) * quantum) * context


def check_batch(batch_tokens: int, context: int) -> int:
    """Raise `UserError` unless the batch is a whole number of sequences."""
    if batch_tokens < context or batch_tokens % context:
        raise UserError(
            f"recipe.batch_tokens={batch_tokens} must be a positive multiple of model.context={context}."
        )
    return batch_tokens


def extrapolation_note(kind: str, what: str, value: float, low: float, high: float) -> tuple[str, ...]:
    """A note if a recipe is used outside the range it was fitted in (by a factor of 2); the same for all such runs."""
    if low / 2 <= value <= high * 2:
        return ()
    return (
        f"recipe={kind} was fitted at {low:.2g} to {high:.2g} {what}, but this plan has runs outside that range: check the "
        "learning rate with design=learning_rate.",
    )
