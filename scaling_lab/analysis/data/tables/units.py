"""Units of the columns of a table (`units.COLUMN=`) and their conversion factors.

The analysis uses single parameters, tokens and FLOPs, and losses in nats per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.core.counts import FLOPS_PER_PETAFLOP_DAY
from scaling_lab.core.errors import UserError, unknown

_COUNT_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_FLOPS_UNITS = {**_COUNT_UNITS, "PF-days": FLOPS_PER_PETAFLOP_DAY}
PERPLEXITY = "perplexity"
BITS_PER_BYTE = "bits_per_byte"
# 1 bit = ln 2 nats. A perplexity is the exponential of a loss, so that it has no factor.
_LOSS_UNITS = {"nats": 1.0, "bits": math.log(2.0), PERPLEXITY: 1.0}
# Words and prefixes that headers and cells use, in lower case.
_WORDS = {
    "k": 1e3, "thousand": 1e3, "thousands": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6, "millions": 1e6, "b": 1e9, "bn": 1e9,
    "g": 1e9, "billion": 1e9, "billions": 1e9, "t": 1e12, "trillion": 1e12, "trillions": 1e12,
}  # fmt: skip
_FLOPS_WORDS = {**_WORDS, "p": 1e15, "e": 1e18, "z": 1e21}
_POWER = re.compile(
    r"^[x\u00d7*]?\s*(?:10\s*(?:\^|\*\*)\s*(?P<exponent>\d+)|1e\+?(?P<e>\d+))$", re.IGNORECASE
)
_COUNTS = {
    "params": _COUNT_UNITS,
    "tokens": _COUNT_UNITS,
    "flops": _FLOPS_UNITS,
    "budget_flops": _FLOPS_UNITS,
    "unique_tokens": _COUNT_UNITS,
}
_LOSSES = ("loss", "loss_sem")
# Without a unit of its own, a column has the unit of the column it is compared with.
_FOLLOWS = {"budget_flops": "flops", "unique_tokens": "tokens", "loss_sem": "loss"}


@dataclass(frozen=True)
class Unit:
    """A unit as given, and the factor by which numbers are multiplied."""

    name: str
    factor: float

    def convert(self, values: Array) -> Array:
        """Numbers in this unit as single parameters, tokens or FLOPs, or nats per token."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return np.log(values) if self.name == PERPLEXITY else values * self.factor

    def __str__(self) -> str:
        if self.name == PERPLEXITY:
            return "perplexity (its logarithm is the loss in nats)"
        if self.name in _LOSS_UNITS:
            return f"{self.name} per token"
        return self.name if self.name == f"{self.factor:g}" else f"{self.name} ({self.factor:g})"


def read_units(given: Mapping[str, Any], metrics: Sequence[str] = ()) -> dict[str, Unit]:
    """Read the option `units.`.

    Args:
        given: column -> unit: a number, K, M, B or T for counts and FLOPs (also PF-days for FLOPs); nats or bits (per token)
            for losses.
        metrics: loss columns other than `loss` and `loss_sem`.

    Raises:
        UserError: a column that cannot have a unit, or an invalid unit.
    """
    known = dict.fromkeys((*_COUNTS, *_LOSSES, *metrics))
    found = {}
    for column, value in given.items():
        if column not in known:
            raise unknown("units.", column, known)
        found[column] = _read(column, value)
    return found


def loss_unit(name: str) -> Unit:
    """The unit of a loss called `name`."""
    return Unit(name, _LOSS_UNITS.get(name, math.nan))


def unit_in_words(column: str, text: str) -> Unit | None:
    """The unit that a header or cell names for one of our columns (`M`, `billions`, `1e18`, `GFLOPs`); None for other words."""
    word = text.strip().lower()
    if column in _LOSSES:
        return loss_unit(word) if word in ("nats", "bits") else None
    if column not in _COUNTS:
        return None
    is_flops = _COUNTS[column] is _FLOPS_UNITS
    if is_flops:
        if re.fullmatch(r"(?:pf|pflops?|petaflops?)(?:/s)?[\s_-]*days?", word):
            return Unit("PF-days", FLOPS_PER_PETAFLOP_DAY)
        word = re.sub(r"\s*flops?$", "", word) or word
    word = re.sub(r"\s*(?:tokens?|params?|parameters?)$", "", re.sub(r"^in\s+", "", word)) or word
    power = _POWER.match(word)
    if power:
        factor = 10.0 ** int(power["exponent"] or power["e"])
    else:
        found = (_FLOPS_WORDS if is_flops else _WORDS).get(word)
        if found is None:
            return None
        factor = found
    return next((Unit(n, f) for n, f in _COUNT_UNITS.items() if f == factor), Unit(f"{factor:g}", factor))


def _read(column: str, value: Any) -> Unit:
    units = _COUNTS.get(column, _LOSS_UNITS)
    for name, factor in units.items():
        if isinstance(value, str) and value.strip().lower() == name.lower():
            return Unit(name, factor)
    number = _number(value)
    if units is not _LOSS_UNITS and number is not None:
        return Unit(f"{number:g}" if float(f"{number:g}") == number else repr(number), number)
    choices = ", ".join(units)
    if units is _LOSS_UNITS:
        raise UserError(f"units.{column}={value!s} is not a unit of a loss per token. Choices: {choices}.")
    raise UserError(
        f"units.{column}={value!s} is not a unit. Choices: {choices}, or a positive number such as 1e6."
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def units_of_columns(
    given: Mapping[str, Unit], names: Sequence[str], metric: str | None = None, metrics: Sequence[str] = ()
) -> dict[str, Unit]:
    """The unit of each column of a table that has one.

    Without a unit of its own, budget_flops has that of flops, unique_tokens that of tokens, and loss_sem and the metrics
    that of loss.

    Args:
        names: the columns of the table.
        metric: the column used instead of `loss`.
        metrics: other loss columns; without `loss` the first is used as loss.
    """
    losses = (*_LOSSES, *([] if metric is None else [metric]), *metrics)
    found = {}
    for name in dict.fromkeys((*_COUNTS, *losses)):
        unit = given.get(name) or given.get(_FOLLOWS.get(name, "loss" if name in losses else ""))
        if unit is not None and name in names:
            found[name] = unit
    stands = metric or (metrics[0] if metrics and "loss" not in names else None)
    if stands in found:
        found["loss"] = found[stands]
    return found


def units_sentence(units: Mapping[str, Unit]) -> str:
    """A sentence that lists the units."""
    return "units: " + ", ".join(f"{column} in {unit}" for column, unit in units.items()) + "."
