"""`EvalSpec`: which token sets a run is evaluated on, and when."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources import parse_source

EVAL_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class EvalSet:
    """An additional evaluation set: the validation split of another source (Kaplan et al. 2020, figure 8)."""

    name: str
    source: Any

    def __post_init__(self) -> None:
        if not EVAL_SET_NAME.fullmatch(self.name):
            raise UserError(
                f"eval.sets: the name {self.name!r} may only contain letters, digits, '_' and '-'."
            )

    @staticmethod
    def parse(value: Any) -> EvalSet:
        """From a source's name, from `{name: NAME, kind: KIND, option: value}`, or from its JSON form."""
        if isinstance(value, EvalSet):
            return value
        if isinstance(value, Mapping) and isinstance(value.get("source"), Mapping):
            return EvalSet(str(value["name"]), parse_source("eval.sets", value["source"]))
        options = {"kind": value} if isinstance(value, str) else dict(value)
        name = str(options.pop("name", options.get("kind", "")))
        return EvalSet(name, parse_source("eval.sets", options))


@dataclass(frozen=True)
class EvalSpec:
    """The validation set, the same for every model size, and how often it is evaluated."""

    tokens: int = 32_768
    """Size of the validation set in tokens: windows spread evenly over the validation split (fewer if it is smaller)."""
    points: int = 8
    """Maximum number of evaluations per run, spaced by a factor of sqrt(2) in steps and ending at the last step."""
    max_cost_fraction: float = 0.25
    """Evaluations before the last are dropped if together they would cost more than this fraction of the training FLOPs."""
    sets: tuple[Any, ...] = ()
    """Additional sources to evaluate on: [NAME,{name: NAME, kind: KIND, option: value}]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(EvalSet.parse(value) for value in self.sets))
        names = [s.name for s in self.sets]
        if len(set(names)) < len(names):
            raise UserError(
                f"eval.sets: the names {', '.join(names)} must be distinct; give each its own name: NAME."
            )
        if self.max_cost_fraction < 0:
            raise UserError(f"eval.max_cost_fraction={self.max_cost_fraction!r} must not be negative.")
        if self.tokens < 1:
            raise UserError(f"eval.tokens={self.tokens!r} must be at least 1.")
        if self.points < 1:
            raise UserError(
                f"eval.points={self.points!r} must be at least 1: a run without a final loss cannot be analyzed."
            )
