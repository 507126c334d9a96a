"""A user's table: renamed columns, filters, units, and conversion of cells to numbers.

Files are read by table_files.py. A `Table` gives columns as NumPy arrays, with NaN for cells that are not numbers; their
text is kept for error messages. pandas is imported inside functions, so that importing `scaling_lab.analysis` stays fast.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.table_files import read_frame
from scaling_lab.analysis.data.units import Unit, read_units, units_of_columns, units_sentence
from scaling_lab.core.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas as pd

# The columns that `analyze` understands; `columns.NAME=` gives their names in a table.
COLUMNS = ("run_id", "params", "tokens", "flops", "loss", "budget_flops", "seed", "loss_sem")

# Common other names of these columns: only suggested in errors, never used silently.
_ALIASES: dict[str, tuple[str, ...]] = {
    "run_id": ("run", "id", "name", "run_name", "model"),
    "params": (
        "n",
        "n_params",
        "num_params",
        "parameters",
        "n_parameters",
        "model_size",
        "size",
        "params_total",
    ),
    "tokens": ("d", "n_tokens", "num_tokens", "train_tokens", "tokens_seen", "training_tokens"),
    "flops": ("c", "compute", "train_flops", "total_flops", "compute_flops", "training_flops", "flop"),
    "loss": (
        "l",
        "val_loss",
        "loss_nats",
        "final_loss",
        "eval_loss",
        "validation_loss",
        "val_loss_nats",
        "train_loss",
    ),
}

# Common ways to write a missing value.
_MISSING_WORDS = ("", "nan", "none", "null", "na", "n/a", "-", "?")


@dataclass(frozen=True)
class Table:
    """A table after renaming and filtering, with the origin of its rows."""

    source: str
    """Name of the file, for messages."""
    frame: pd.DataFrame
    row: NDArray[np.int64]
    """(rows,) row number of each kept row in the file; the first row of data is 1."""
    notes: tuple[str, ...] = ()
    units: Mapping[str, Unit] = field(default_factory=dict)
    """By column, the unit by which `numbers` multiplies; `cell` and `where` use the numbers as written."""

    def has(self, name: str) -> bool:
        return name in self.frame.columns

    @property
    def names(self) -> list[str]:
        return [str(c) for c in self.frame.columns]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """(rows,) a column as float64, converted to single parameters, tokens, FLOPs or nats; NaN for cells that are not numbers."""
        values = self._as_written(name)
        if name not in self.units:
            return values
        with np.errstate(over="ignore"):
            return values * self.units[name].factor

    def _as_written(self, name: str) -> NDArray[np.float64]:
        """(rows,) a column as float64 in the unit of the table."""
        import pandas as pd

        column = self.frame[name]
        if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_timedelta64_dtype(column):
            return np.full(len(column), np.nan)  # pandas would give nanoseconds
        if pd.api.types.is_numeric_dtype(column):
            return column.to_numpy(dtype=np.float64, na_value=np.nan)
        try:
            values = pd.to_numeric(column, errors="coerce")
        except TypeError:  # cells that are lists or objects
            values = pd.to_numeric(column.map(_scalar), errors="coerce")
        return values.to_numpy(dtype=np.float64, na_value=np.nan)

    def empty(self, name: str) -> NDArray[np.bool_]:
        """(rows,) whether a cell is empty: no value, blank, or a word for a missing value."""
        column = self.frame[name]
        empty = column.isna().to_numpy(dtype=bool)
        if column.dtype.kind not in "biufc":
            words = column.astype(str).str.strip().str.lower()
            empty = empty | words.isin(_MISSING_WORDS).to_numpy(dtype=bool)
        return empty

    def cell(self, name: str, position: int) -> str:
        """The text of a cell, for error messages; '' if it is empty."""
        import pandas as pd

        value = self.frame[name].iloc[position]
        return "" if np.ndim(value) == 0 and pd.isna(value) else str(value)


def read_table(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, Any] | None = None,
    metric: str | None = None,
    metrics: Sequence[str] = (),
    units: Mapping[str, Any] | None = None,
) -> Table:
    """Read a table, rename its columns, and keep the rows that match.

    Args:
        path: CSV, TSV, Parquet, JSON (a list of records, or an object of columns) or JSON lines, optionally compressed.
        columns: our column name -> that in the table (`{"loss": "val_loss"}`).
        where: `COLUMN`, `COLUMN.min` or `COLUMN.max` -> value, by the names in the table (or ours after renaming).
        metric: the column to analyze instead of `loss`.
        metrics: other loss columns, converted to numbers; without a column `loss` the first one is used as loss.
        units: column (by our name, or a metric) -> its unit (`units.read_units`).

    Raises:
        UserError: no such file, not a table, an unknown column or unit; the message names the file and a similar column.
    """
    path = Path(path)
    frame, notes = read_frame(path)
    return table_from_frame(
        frame, path.name, notes, columns=columns, where=where, metric=metric, metrics=metrics, units=units
    )


def table_from_frame(
    frame: pd.DataFrame,
    source: str,
    notes: Sequence[str] = (),
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, Any] | None = None,
    metric: str | None = None,
    metrics: Sequence[str] = (),
    units: Mapping[str, Any] | None = None,
) -> Table:
    """A `Table` from a frame: rename columns and keep the rows that match. Other arguments are as in `read_table`.

    Args:
        frame: with distinct text column names (`table_files.distinct_names`); it is not modified.
        source: name of the table in messages.
        notes: notes on how it was read.
    """
    notes = list(notes)
    row = np.arange(1, len(frame) + 1, dtype=np.int64)
    renames = dict(columns or {})
    if metric is not None:
        renames["loss"] = _metric_column(metric, source, list(frame.columns))
    frame = _rename(frame, renames, source)
    for name in metrics:
        _metric_column(name, source, list(frame.columns), "metrics")
    keep = np.ones(len(frame), dtype=bool)
    for key, value in (where or {}).items():
        keep &= _matches(frame, renames, key, value, source)
    if not keep.all():
        notes.append(f"where: {int(keep.sum())} of {keep.size} rows match.")
    if len(frame) and not keep.any():
        wanted = " ".join(f"where.{k}={v}" for k, v in (where or {}).items())
        raise UserError(f"{source}: no row matches {wanted} ({len(frame)} rows read).")
    if not keep.all():  # skipped otherwise, since it copies the table
        frame, row = frame.loc[keep].reset_index(drop=True), row[keep]
    units_found = _units(frame, units or {}, metric, metrics, source)
    if units_found:
        notes.append(units_sentence(units_found))
    table = Table(source, frame, row, tuple(notes), units_found)
    if not metrics:
        return table
    numbers = {name: table._as_written(name) for name in metrics}
    if "loss" not in frame:
        numbers["loss"] = numbers[metrics[0]]
        notes.append(f"loss is not in the table; {metrics[0]} is used instead.")
    return replace(table, frame=frame.assign(**numbers), notes=tuple(notes))


def missing_column(name: str, table: Table, *, why: str = "") -> UserError:
    """The error for a missing column, with a similar column name if there is one."""
    # Columns with one of our names are not suggested: `params` is not another name of `loss`.
    near = nearest_column(name, [n for n in table.names if n not in COLUMNS])
    hint = (
        f" Did you mean {shlex.quote(f'columns.{name}={near}')}?"
        if near
        else f" Give its name with columns.{name}=NAME."
    )
    return UserError(
        f"{table.source} has no column {name!r}{why}; its columns are {listed(table.names)}.{hint}"
    )


def _units(
    frame: pd.DataFrame, units: Mapping[str, Any], metric: str | None, metrics: Sequence[str], source: str
) -> dict[str, Unit]:
    """The unit of each column that has one; `UserError` for the unit of a column that the table does not have."""
    given = read_units(units, (*metrics, *([] if metric is None else [metric])))
    names = list(frame.columns)
    for name, value in units.items():
        if name not in names and not (name == "loss" and metrics):
            raise UserError(
                f"units.{name}={value}: {source} has no column {name!r}; its columns are {listed(names)}."
            )
    return units_of_columns(given, names, metric, metrics)


def _metric_column(metric: str, source: str, names: list[str], option: str = "metric") -> str:
    if metric in names:
        return metric
    near = nearest_column(metric, names)
    hint = f" Did you mean {shlex.quote(f'{option}={near}')}?" if near else ""
    raise UserError(f"{option}={metric}: {source} has no such column; its columns are {listed(names)}.{hint}")


def _rename(frame: pd.DataFrame, renames: Mapping[str, str], source: str) -> pd.DataFrame:
    names = list(frame.columns)
    for ours, theirs in renames.items():
        if ours not in COLUMNS:
            raise unknown("columns.", ours, COLUMNS)
        if theirs not in names:
            near = nearest_column(theirs, names)
            hint = f" Did you mean {shlex.quote(f'columns.{ours}={near}')}?" if near else ""
            raise UserError(
                f"columns.{ours}={theirs}: {source} has no such column; its columns are {listed(names)}.{hint}"
            )
    # A column may be used twice (columns.params=params_no_embed, while params is kept), so copy instead of renaming.
    return frame.assign(**{ours: frame[theirs] for ours, theirs in renames.items()})


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
    number = _number(value)
    if pd.api.types.is_numeric_dtype(cells):
        if number is None:
            raise UserError(f"where.{key}={value}: {column} is a column of numbers in {source}.")
        values = cells.to_numpy(dtype=np.float64, na_value=np.nan)
        # The table and the option may have different numbers of digits, so compare to 1e-9.
        return np.isclose(values, number, rtol=1e-9, atol=0.0)
    return (cells.astype(str) == str(value)).to_numpy(dtype=bool)


def _scalar(value: Any) -> Any:
    """A cell that may be converted to a number, or None."""
    return value if isinstance(value, (str, int, float)) else None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def nearest_column(name: str, names: list[str]) -> str | None:
    """The column that `name` probably refers to: a different case, a common synonym, or a similar name."""
    lowered = {n.lower(): n for n in names}
    for alias in (name.lower(), *_ALIASES.get(name, ())):
        if alias in lowered:
            return lowered[alias]
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    if close:
        return lowered[close[0]]
    inside = [n for low, n in lowered.items() if len(name) > 2 and name.lower() in low]
    return inside[0] if inside else None


def listed(names: list[str], limit: int = 20) -> str:
    """The first names and the total number, for messages."""
    shown = ", ".join(names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
