"""A user's table: renamed columns, filters, units, and conversion of cells to numbers.

Files are read by files.py. A `Table` gives columns as NumPy arrays, with NaN for cells that are not numbers; their
text is kept for error messages. pandas is imported inside functions, so that importing `scaling_lab.analysis` stays fast.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.tables.cells import Cells, numbers_in_cells
from scaling_lab.analysis.data.tables.files import read_frame
from scaling_lab.analysis.data.tables.filters import matching_rows
from scaling_lab.analysis.data.tables.headers import Headers, read_headers
from scaling_lab.analysis.data.tables.names import listed, nearest_column
from scaling_lab.analysis.data.tables.units import (
    BITS_PER_BYTE,
    PERPLEXITY,
    Unit,
    loss_unit,
    read_units,
    units_of_columns,
    units_sentence,
)
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas as pd

# The columns that `analyze` understands; `columns.NAME=` gives their names in a table.
COLUMNS = ("run_id", "params", "tokens", "flops", "loss", "budget_flops", "seed", "loss_sem")
_NUMBERS = ("params", "tokens", "flops", "loss", "budget_flops", "unique_tokens", "loss_sem")
LARGEST_LOSS_NATS = 12.0
"""A loss per token that no untrained model exceeds: ln(160,000)."""
# A column of FLOPs, by its name alone, must be within this factor of 6 params tokens.
_NEAR = 10.0


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
    """By column, the unit that `numbers` converts; `cell` and `where` use the numbers as written."""
    own_names: tuple[str, ...] = ()
    """The columns of the file."""
    unclear: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By our name: several columns that may be it, so that none is used."""
    non_embedding: bool = False
    """Whether `params` is a column that says it counts no embeddings."""
    cells: Mapping[str, Cells] = field(default_factory=dict)
    """By column of text: its numbers."""

    def has(self, name: str) -> bool:
        return name in self.frame.columns

    @property
    def names(self) -> list[str]:
        return [str(c) for c in self.frame.columns]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """(rows,) a column as float64, converted to single parameters, tokens, FLOPs or nats; NaN for cells that are not numbers."""
        values = self._as_written(name)
        return self.units[name].convert(values) if name in self.units else values

    def _as_written(self, name: str) -> NDArray[np.float64]:
        """(rows,) a column as float64 in the unit of the table."""
        import pandas as pd

        if name in self.cells:
            return self.cells[name].values
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
    decimal: str | None = None,
) -> Table:
    """Read a table, rename its columns, and keep the rows that match.

    Args:
        path: CSV, TSV, Parquet, JSON (a list of records, or an object of columns) or JSON lines, optionally compressed.
        columns: our column name -> that in the table (`{"loss": "val_loss"}`).
        where: `COLUMN`, `COLUMN.min` or `COLUMN.max` -> value, by the names in the table (or ours after renaming).
        metric: the column to analyze instead of `loss`.
        metrics: other loss columns, converted to numbers; without a column `loss` the first one is used as loss.
        units: column (by our name, or a metric) -> its unit (`units.read_units`).
        decimal: "point" or "comma": the decimal mark of numbers in text cells; None decides by each column.

    Raises:
        UserError: no such file, not a table, an unknown column or unit; the message names the file and a similar column.
    """
    path = Path(path)
    frame, notes = read_frame(path)
    return table_from_frame(
        frame,
        path.name,
        notes,
        columns=columns,
        where=where,
        metric=metric,
        metrics=metrics,
        units=units,
        decimal=decimal,
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
    decimal: str | None = None,
) -> Table:
    """A `Table` from a frame: rename columns and keep the rows that match. Other arguments are as in `read_table`.

    Args:
        frame: with distinct text column names (`files.distinct_names`); it is not modified.
        source: name of the table in messages.
        notes: notes on how it was read.
    """
    own_names = tuple(str(name) for name in frame.columns)
    renames = dict(columns or {})
    if metric is not None:
        renames["loss"] = _metric_column(metric, source, list(own_names))
    headers = read_headers(own_names, renames, needs_loss=not metrics)
    frame = _rename(frame, {ours: h.column for ours, h in headers.taken.items()} | renames, source)
    for name in metrics:
        _metric_column(name, source, list(own_names), "metrics")
    frame, row, notes = matching_rows(frame, renames, where or {}, source, list(notes))
    if headers.taken:
        named = ", ".join(f"{ours} is {h.column}" for ours, h in headers.taken.items())
        notes.append(f"columns by their names: {named}.")
    cells = _text_cells(frame, (*_NUMBERS, *metrics), decimal, units or {}, notes)
    found = _units(frame, units or {}, headers, metric, metrics, source)
    found = {name: unit for name, unit in found.items() if not (name in cells and cells[name].has_units)}
    table = Table(source, frame, row, (), found, own_names, headers.unclear, cells=cells)
    table = _without_doubtful(table, headers, notes)
    table = replace(table, non_embedding="params" in headers.taken and headers.taken["params"].non_embedding)
    table = _perplexity_by_size(table, metric, metrics, notes)
    if table.units:
        notes.append(units_sentence(table.units))
    if metrics:
        numbers = {name: table._as_written(name) for name in metrics}
        if "loss" not in frame:
            numbers["loss"] = numbers[metrics[0]]
            notes.append(f"loss is not in the table; {metrics[0]} is used instead.")
        rest = {name: c for name, c in cells.items() if name not in numbers}
        table = replace(table, frame=table.frame.assign(**numbers), cells=rest)
    return replace(table, notes=tuple(notes))


def _text_cells(
    frame: pd.DataFrame,
    names: Sequence[str],
    decimal: str | None,
    units: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Cells]:
    """The numbers of those columns whose cells are text. Raises `UserError` for a unit given twice."""
    import pandas as pd

    found = {}
    for name in dict.fromkeys(names):
        if name not in frame or not (
            pd.api.types.is_object_dtype(frame[name]) or pd.api.types.is_string_dtype(frame[name])
        ):
            continue
        try:
            cells = numbers_in_cells(frame[name], name, decimal)
        except TypeError:  # cells that are lists or objects
            continue
        if cells.has_units and name in units:
            raise UserError(
                f"units.{name}={units[name]}: cells of {name} carry units of their own. Leave units.{name} out."
            )
        notes += cells.notes
        found[name] = cells
    return found


def _without_doubtful(table: Table, headers: Headers, notes: list[str]) -> Table:
    """Without columns that are not what their name may mean, by the numbers of the others."""
    doubtful = [ours for ours, header in headers.taken.items() if header.doubtful]
    unclear = dict(table.unclear)
    for ours in doubtful:
        column = headers.taken[ours].column
        if table.has("params") and table.has("tokens"):
            with np.errstate(all="ignore"):
                counted = FLOPS_PER_PARAM_TOKEN * table.numbers("params") * table.numbers("tokens")
                ratio = float(np.nanmedian(table.numbers(ours) / counted))
            if 1 / _NEAR <= ratio <= _NEAR:
                continue
            notes.append(f"{column} is not read as {ours}: it is {ratio:.2g} times 6 params tokens.")
        else:
            unclear[ours] = (column,)
        units = {name: unit for name, unit in table.units.items() if name != ours}
        table = replace(table, frame=table.frame.drop(columns=ours), units=units, unclear=unclear)
    return table


def _perplexity_by_size(table: Table, metric: str | None, metrics: Sequence[str], notes: list[str]) -> Table:
    """Losses that are all above 12 are perplexities: a uniform guess among 160,000 tokens loses 12 nats."""
    if not table.has("loss") or table.units.get("loss") is not None:
        return table
    losses = table.numbers("loss")
    losses = losses[np.isfinite(losses)]
    if not losses.size or not losses.min() > LARGEST_LOSS_NATS:
        return table
    notes.append(
        f"every loss is above {LARGEST_LOSS_NATS:g}, so they are read as perplexities; units.loss=nats if they are not."
    )
    names = [n for n in ("loss", "loss_sem", metric, *metrics) if n is not None and table.has(n)]
    return replace(table, units={**table.units, **dict.fromkeys(names, loss_unit(PERPLEXITY))})


def columns_error(
    table: Table, needed: Sequence[str], why: str = "", option: str = "columns.{}={}", between: str = " "
) -> UserError:
    """The one error for columns that are missing or unclear, with a complete line.

    Args:
        needed: our names.
        why: why they are needed.
        option: how a column is named, from ours and the table's name.
        between: what separates two of these.
    """
    said, line = [], []
    for name in needed:
        options = table.unclear.get(name)
        said.append(f"{name} can be {' or '.join(options)}" if options else f"has no column {name!r}")
        # Columns with one of our names are not suggested: `params` is not another name of `loss`.
        near = (
            options[0] if options else nearest_column(name, [n for n in table.own_names if n not in COLUMNS])
        )
        given = option.format(name, near or "NAME")
        line.append(shlex.quote(given) if between == " " else given)
    said.sort(key=lambda part: not part.startswith("has"))  # "t.csv has no column ..., loss can be ..."
    return UserError(
        f"{table.source}{'' if said[0].startswith('has') else ':'} {', '.join(said)}{why}; its columns are "
        f"{listed(list(table.own_names))}. For example: {between.join(line)}"
    )


def _units(
    frame: pd.DataFrame,
    units: Mapping[str, Any],
    headers: Headers,
    metric: str | None,
    metrics: Sequence[str],
    source: str,
) -> dict[str, Unit]:
    """The unit of each column that has one; `UserError` for the unit of a column that the table does not have."""
    given = read_units(units, (*metrics, *([] if metric is None else [metric])))
    names = list(frame.columns)
    for name, value in units.items():
        if name not in names and not (name == "loss" and metrics):
            raise UserError(
                f"units.{name}={value}: {source} has no column {name!r}; its columns are {listed(names)}."
            )
    in_headers = {name: unit for name, unit in headers.units.items() if name not in given}
    if "loss" in in_headers and in_headers["loss"].name == BITS_PER_BYTE:
        raise UserError(
            f"{source}: {headers.column('loss')} is in bits per byte or character, and losses here are per token. Multiply it by "
            "the bytes (characters) per token of your tokenizer, and give units.loss=bits."
        )
    return units_of_columns({**in_headers, **given}, names, metric, metrics)


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


def _scalar(value: Any) -> Any:
    """A cell that may be converted to a number, or None."""
    return value if isinstance(value, (str, int, float)) else None
