"""Numbers as people write them in cells: `22.0M`, `21,961,153`, `21.961.153` with a decimal comma, `1 000 000`.

Only cells that `float` does not understand come here. What has two readings in a column (`7,589` alone) is refused, not guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scaling_lab.analysis.data.tables.units import unit_in_words
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

DECIMALS = ("point", "comma")
_SPACES = re.compile(r"[\s\u00a0\u202f'_]")
_NUMBER = re.compile(r"^(?P<digits>[+-]?[\d.,]*\d)(?P<power>e[+-]?\d+)?\s*(?P<unit>[^\d.,]*)$", re.IGNORECASE)
_GROUPS = {mark: re.compile(rf"^[+-]?\d{{1,3}}(?:{re.escape(mark)}\d{{3}})+$") for mark in ",."}
_ONE_GROUP = {mark: re.compile(rf"^[+-]?\d{{1,3}}{re.escape(mark)}\d{{3}}$") for mark in ",."}


@dataclass(frozen=True)
class Cells:
    """A column of text as numbers."""

    values: Array
    """(rows,) NaN for cells that are not numbers."""
    notes: tuple[str, ...] = ()
    has_units: bool = False
    """Whether cells carry units of their own, so that the column needs no other."""


def numbers_in_cells(column: pd.Series, name: str, decimal: str | None) -> Cells:
    """The numbers of a column whose cells are text.

    Args:
        name: our name of the column; its units are those that `units.NAME=` takes.
        decimal: "point" or "comma", as the user said; None decides by the column.

    Raises:
        UserError: cells that have two readings; the message says how to choose.
    """
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan).copy()
    at = [i for i in np.flatnonzero(np.isnan(values)).tolist() if isinstance(column.iloc[i], str)]
    found = {i: m for i in at if (m := _NUMBER.match(_SPACES.sub("", column.iloc[i]))) is not None}
    plain = [str(cell) for cell in column[~np.isnan(values)]] if found else []
    if not found:
        return Cells(values)
    mark = _decimal_mark(name, [m["digits"] for m in found.values()] + plain, decimal)
    thousands = "," if mark == "." else "."
    grouped, with_unit = 0, 0
    for i, match in found.items():
        unit = unit_in_words(name, match["unit"]) if match["unit"].strip() else None
        digits = match["digits"]
        whole, _, decimals = digits.partition(mark)
        if match["unit"].strip() and unit is None:
            continue  # a word that we do not know
        if (decimals and not decimals.isdigit()) or (
            thousands in whole and not _GROUPS[thousands].match(whole)
        ):
            continue  # marks that do not separate thousands
        number = float(digits.replace(thousands, "").replace(mark, ".") + (match["power"] or ""))
        values[i] = number if unit is None else number * unit.factor
        grouped += thousands in digits
        with_unit += unit is not None
    notes = []
    if grouped:
        notes.append(f"{name}: {thousands!r} separates thousands in {grouped} cell(s).")
    if mark == ",":
        notes.append(f"{name}: numbers are read with a decimal comma.")
    if with_unit:
        example = next(column.iloc[i] for i, m in found.items() if m["unit"].strip())
        notes.append(f"{name}: {with_unit} cell(s) carry their unit, such as {example!r}.")
    return Cells(values, tuple(notes), with_unit > 0)


def _decimal_mark(name: str, texts: list[str], decimal: str | None) -> str:
    """The character before the decimals. Raises `UserError` where a column has two readings."""
    if decimal is not None:
        return "," if decimal == "comma" else "."
    comma = any(_is_decimal(text, ",") for text in texts)
    point = any(_is_decimal(text, ".") for text in texts)
    if comma != point:
        return "," if comma else "."
    # A mark that appears twice in one number separates thousands.
    if any(text.count(",") > 1 for text in texts):
        return "."
    if any(text.count(".") > 1 for text in texts):
        return ","
    unclear = next((text for text in texts if any(p.match(text) for p in _ONE_GROUP.values())), None)
    if unclear is None or (comma and point):
        return "."
    if "," not in "".join(texts):
        return "."
    number = unclear.replace(",", "").replace(".", "")
    raise UserError(
        f"{name}: {unclear!r} can be {number} or {unclear.replace(',', '.')}. Say decimal=point if the comma separates "
        "thousands, or decimal=comma if it is a decimal mark."
    )


def _is_decimal(text: str, mark: str) -> bool:
    """Whether a number can only be read with `mark` before its decimals."""
    other = "." if mark == "," else ","
    return text.count(mark) == 1 and (
        not _ONE_GROUP[mark].match(text) or (other in text and text.index(other) < text.index(mark))
    )
