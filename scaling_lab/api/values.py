"""Numbers with their intervals, as results of the Python API show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling_lab.analysis.estimate import Interval
from scaling_lab.core.errors import UserError


@dataclass(frozen=True, repr=False)
class ScalarEstimate:
    """One number and its interval; a result without the number says why.

    >>> a = analysis.isoflop.exponent
    >>> round(a.estimate, 1), a.interval.lo < a.estimate < a.interval.hi, a.level
    (0.5, True, 0.9)
    """

    estimate: float | None
    """The number; None where there is none (`message` says why)."""
    interval: Interval | None = None
    """Its interval at `level`, with ends `lo` and `hi`; None where there is none."""
    level: float | None = None
    """Of the interval: 0.9 is 90%."""
    standard_error: float | None = None
    """From the same resamples as the interval."""
    message: str | None = None
    """Why the number or its interval is missing."""

    def __float__(self) -> float:
        if self.estimate is None:
            raise UserError(f"there is no estimate: {self.message}")
        return self.estimate

    def __repr__(self) -> str:
        if self.estimate is None:
            return f"not available: {self.message}"
        text = f"{self.estimate:.4g}"
        if self.interval is None:
            return text
        level = "" if self.level is None else f", {self.level:.0%}"
        return f"{text} ({self.interval.lo:.4g} to {self.interval.hi:.4g}{level})"


def interval_of(ends: Sequence[float | None] | None) -> Interval | None:
    """An interval from its two ends as analysis.json has them: null is an end that is not finite."""
    if ends is None:
        return None
    lo, hi = ends
    return Interval(float("-inf") if lo is None else lo, float("inf") if hi is None else hi)


def scalar_of(node: Any, level: float | None, message: str | None = None) -> ScalarEstimate:
    """From `{"estimate": ..., "interval": ...}` of analysis.json; `message` says why there is no estimate."""
    if node is None or node["estimate"] is None:
        return ScalarEstimate(None, message=message)
    return ScalarEstimate(node["estimate"], interval_of(node["interval"]), level)


class NamedScalars(dict[str, ScalarEstimate]):
    """Parameters by name; an unknown name is an error that lists the others."""

    def __init__(self, values: Mapping[str, ScalarEstimate], message: str) -> None:
        super().__init__(values)
        self._message = message

    def __missing__(self, name: str) -> ScalarEstimate:
        choices = ", ".join(self) or f"none: {self._message}"
        raise UserError(f"the law has no parameter {name!r}. Choices: {choices}")
