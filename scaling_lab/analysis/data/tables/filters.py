"""`where.COLUMN=VALUE`: the rows of a table that match."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.tables.names import listed, nearest_column
from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def matching_rows(
    frame: pd.DataFrame, renames: Mapping[str, str], where: Mapping[str, Any], source: str, notes: list[str]
) -> tuple[pd.DataFrame, NDArray[np.int64], list[str]]:
    """The rows that match, and their numbers in the file."""
    row = np.arange(1, len(frame) + 1, dtype=np.int64)
    keep = np.ones(len(frame), dtype=bool)
    for key, value in where.items():
        keep &= _matches(frame, renames, key, value, source)
    if keep.all():
        return frame, row, notes
    if len(frame) and not keep.any():
        wanted = " ".join(f"where.{k}={v}" for k, v in where.items())
        raise UserError(
            f"{source}: no row matches {wanted} ({len(frame)} rows read).{_values_there(frame, where)}"
        )
    notes.append(f"where: {int(keep.sum())} of {keep.size} rows match.")
    return frame.loc[keep].reset_index(drop=True), row[keep], notes


def _values_there(frame: pd.DataFrame, where: Mapping[str, Any]) -> str:
    """The values of the columns that a filter asked for."""
    said = []
    for column in where:
        if column in frame:
            values = [str(v) for v in frame[column].dropna().unique()]
            said.append(f"{column} is {listed(values, 10)}")
    return f" There {'; '.join(said)}." if said else ""


def _matches(
    frame: pd.DataFrame, renames: Mapping[str, str], key: str, value: Any, source: str
) -> NDArray[np.bool_]:
    import pandas as pd

    names = list(frame.columns)
    column, bound = key, ""
    if key not in names and key.rpartition(".")[2] in ("min", "max") and key.rpartition(".")[0] in names:
        column, _, bound = key.rpartition(".")
    if column not in names:
        end = next((e for e in (".min", ".max") if column.endswith(e)), "")
        near = nearest_column(column.removesuffix(".min").removesuffix(".max"), names)
        hint = f" Did you mean {shlex.quote(f'where.{near}{end}={value}')}?" if near else ""
        raise UserError(
            f"where.{key}={value}: {source} has no such column; its columns are {listed(names)}.{hint}"
        )
    cells = frame[column]
    if bound:
        numbers = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        limit = _number(value)
        if limit is None:
            raise UserError(f"where.{key}={value}: a bound must be a number.")
        with np.errstate(invalid="ignore"):
            return numbers >= limit if bound == "min" else numbers <= limit
    if pd.api.types.is_bool_dtype(cells):
        return (cells.astype(str).str.lower() == str(value).lower()).to_numpy(dtype=bool)
    wanted = _listed_values(cells, value)
    return np.logical_or.reduce([_equals(cells, one, f"where.{key}={value}", source) for one in wanted])


def _equals(cells: pd.Series, value: Any, option: str, source: str) -> NDArray[np.bool_]:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(cells):
        number = _number(value)
        if number is None:
            raise UserError(f"{option}: {cells.name} is a column of numbers in {source}.")
        values = cells.to_numpy(dtype=np.float64, na_value=np.nan)
        # The table and the option may have different numbers of digits, so compare to 1e-9.
        return np.isclose(values, number, rtol=1e-9, atol=0.0)
    return (cells.astype(str) == str(value)).to_numpy(dtype=bool)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _listed_values(cells: pd.Series, value: Any) -> list[Any]:
    """The values of `where.lr=[1e-3,3e-3]`; any other value alone, also a cell that is written like a list."""
    if isinstance(value, (list, tuple)):
        return list(value)
    text = str(value).strip()
    if not (text.startswith("[") and text.endswith("]")) or (cells.astype(str) == text).any():
        return [value]
    return [part.strip().strip("'\"") for part in text[1:-1].split(",") if part.strip()]
