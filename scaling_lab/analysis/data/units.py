"""Units of the columns of a table (`units.COLUMN=`) and their conversion factors.

The analysis uses single parameters, tokens and FLOPs, and losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling_lab.core.counts import FLOPS_PER_PETAFLOP_DAY
from scaling_lab.core.errors import UserError, unknown

_COUNT_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_FLOPS_UNITS = {**_COUNT_UNITS, "PF-days": FLOPS_PER_PETAFLOP_DAY}
# 1 bit = ln 2 nats.
_LOSS_UNITS = {"nats": 1.0, "bits": math.log(2.0)}
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

    def __str__(self) -> str:
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
