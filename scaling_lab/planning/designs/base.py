"""Owns what a design is: which runs it asks for, before a recipe decides how each is trained and steps are rounded."""

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
    """How runs of one size share a constant-LR trunk."""

    horizons_tokens: tuple[float, ...]
    """Of all runs of the size, ascending, not yet rounded."""
    decay_fraction: float
    """Share of a run that its cooldown takes."""
    shape: str
    """sqrt or linear."""


@dataclass(frozen=True)
class RunRequest:
    """One run that a design asks for: a shape and what it may spend, as a budget or as a horizon."""

    shape: Any
    budget_flops: float | None = None
    """Under the plan's convention. Exactly one of this and `train_tokens` is given."""
    train_tokens: float | None = None
    """A horizon; the run's budget is then what it spends."""
    role: str = "isoflop"
    seed: int = 0
    """Added to the plan's seed."""
    lr_multiplier: float = 1.0
    """Times the recipe's peak LR."""
    batch_multiplier: float = 1.0
    """Times the recipe's batch, then rounded as the recipe rounds."""
    cooldown: Cooldown | None = None
    """A trunk (role "trunk") or a branch of one; the recipe decides once for all runs of the size."""

    def __post_init__(self) -> None:
        if (self.budget_flops is None) == (self.train_tokens is None):
            raise ValueError("a run is asked for by its budget or by its horizon, one of the two")

    def tokens(self, convention: Convention) -> float:
        """The horizon in tokens, not yet rounded to whole steps."""
        if self.train_tokens is not None:
            return float(self.train_tokens)
        assert self.budget_flops is not None
        return tokens_for_budget(self.budget_flops, self.shape.count().flops_per_token(convention))

    @property
    def label(self) -> str:
        """What the run may spend, in words."""
        if self.budget_flops is not None:
            return f"{self.budget_flops:.3g} FLOPs"
        return f"{self.train_tokens:,.0f} tokens"


class ShapeMaker(Protocol):
    """Sizes as shapes of the plan's family, vocabulary and context."""

    convention: Convention

    def shape(self, width: int, depth: int) -> Any: ...
    def ladder(self, sizes: SizeLadder) -> list[Any]: ...


class Design(Protocol):
    """A frozen dataclass with a `kind`, its short name, whose fields are the design's options."""

    kind: ClassVar[str]

    def requests(self, shapes: ShapeMaker) -> Iterable[RunRequest]:
        """Every run, in the plan's order: runs that may spend the same stand together, ascending."""
        ...

    def sweep(self, shapes: ShapeMaker) -> Iterable[RunRequest]:
        """The runs that recipes take for their sweep (shortest and longest horizon): all runs, unless the design belongs
        to another's sweep."""
        ...

    def remark(self, label: str, planned: int, kept: int) -> str | None:
        """What it means that of `planned` sizes that may spend `label` only `kept` are planned, if that needs saying."""
        ...


def check_budgets(option: str, values: Sequence[float], unit: str) -> None:
    """Raises `UserError` unless `values` are distinct and positive, and there are some."""
    if not values or any(not (v > 0 and math.isfinite(v)) for v in values) or len(set(values)) < len(values):
        raise UserError(f"{option}={list(values)} must be distinct positive numbers of {unit}.")
