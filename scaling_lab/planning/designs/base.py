"""The `Design` protocol: a design requests runs; the recipe then sets their hyperparameters, and steps are rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from scaling_lab.core.counts import Convention, tokens_for_budget
from scaling_lab.core.errors import UserError
from scaling_lab.planning.sizes import SizeLadder


@dataclass(frozen=True)
class Cooldown:
    """How the runs of one size share a constant-LR trunk."""

    horizons_tokens: tuple[float, ...]
    """Horizons of all runs of the size, ascending, not yet rounded."""
    decay_fraction: float
    """Fraction of a run taken by its cooldown."""
    shape: str
    """sqrt or linear."""


@dataclass(frozen=True)
class RunRequest:
    """One run requested by a design: a shape with either a budget or a horizon."""

    shape: Any
    budget_flops: float | None = None
    """Under the plan's convention. Exactly one of this and `train_tokens` is given."""
    train_tokens: float | None = None
    """A horizon; the run's budget is then the FLOPs that it spends."""
    role: str = "isoflop"
    seed: int = 0
    """Added to the plan's seed."""
    lr_multiplier: float = 1.0
    """Multiplies the recipe's peak LR."""
    batch_multiplier: float = 1.0
    """Multiplies the recipe's batch, before rounding."""
    cooldown: Cooldown | None = None
    """Set for a trunk (role "trunk") and its branches, for which the recipe decides once per size."""

    def __post_init__(self) -> None:
        if (self.budget_flops is None) == (self.train_tokens is None):
            raise ValueError("a run request needs exactly one of budget_flops and train_tokens")

    def tokens(self, convention: Convention) -> float:
        """The horizon in tokens, not yet rounded to whole steps."""
        if self.train_tokens is not None:
            return float(self.train_tokens)
        assert self.budget_flops is not None
        return tokens_for_budget(self.budget_flops, self.shape.count().flops_per_token(convention))

    @property
    def label(self) -> str:
        """The run's budget or horizon as text."""
        if self.budget_flops is not None:
            return f"{self.budget_flops:.3g} FLOPs"
        return f"{self.train_tokens:,.0f} tokens"


class ShapeMaker(Protocol):
    """Makes shapes with the plan's model family, vocabulary and context from sizes."""

    convention: Convention

    def shape(self, width: int, depth: int) -> Any: ...

    def candidates(self, sizes: SizeLadder) -> list[Any]:
        """Allowed shapes, ascending in N."""
        ...

    def geometric(self, sizes: SizeLadder) -> list[Any]:
        """The shapes of `sizes.width_ratio`, ascending in N."""
        ...

    def max_error(self, sizes: SizeLadder) -> float:
        """Largest |ln N - target| of a size."""
        ...

    def note(self, text: str) -> None:
        """Adds a note to the plan, once."""
        ...


class Design(Protocol):
    """A frozen dataclass with a `kind`, its short name, whose fields are the design's options."""

    kind: ClassVar[str]

    def requests(self, shapes: ShapeMaker) -> Iterable[RunRequest]:
        """All runs in the plan's order: ascending by budget or horizon, equal ones contiguous."""
        ...

    def sweep(self, shapes: ShapeMaker) -> Iterable[RunRequest]:
        """The runs that define the sweep's shortest and longest horizon for recipes: all runs, unless this design tunes
        the recipe of another sweep."""
        ...

    def remark(self, label: str, planned: int, kept: int) -> str | None:
        """A note on the consequences if only `kept` of `planned` sizes remain at the budget or horizon `label`."""
        ...


def check_budgets(option: str, values: Sequence[float], unit: str) -> None:
    """Raise `UserError` unless `values` are distinct, positive and not empty."""
    if not values or any(not (v > 0 and math.isfinite(v)) for v in values) or len(set(values)) < len(values):
        raise UserError(f"{option}={list(values)} must be a list of distinct positive numbers of {unit}.")
