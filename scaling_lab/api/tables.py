"""Reading tables for the Python API: DataFrames, files, dictionaries of columns, tables of other libraries."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.analysis.data.tables.table import Table

_COUNTS = ("params", "tokens", "flops")


def read_table(
    data: Any,
    *,
    loss: str | None = None,
    params: str | None = None,
    tokens: str | None = None,
    flops: str | None = None,
    run_id: str | None = None,
    columns: Mapping[str, str] | None = None,
    units: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """A table of runs as a DataFrame with this package's column names and units.

    CSV in its dialects, Parquet, JSON records and JSON lines are read as `scaling-lab analyze runs=FILE` reads them.

    Args:
        data: path of a file, a DataFrame, a dictionary of columns, a list of records, or a table of pyarrow or polars.
        loss: what the table calls its loss; likewise `params`, `tokens`, `flops` and `run_id`.
        columns: the same for any column, ours to theirs: `{"budget_flops": "budget", "loss_sem": "stderr"}`.
        units: the unit a column is written in, by our name: `{"params": "M", "tokens": "B", "loss": "bits"}`. A number or
            K, M, B, T for counts; PF-days too for FLOPs; nats or bits (per token) for losses.
        where: rows to keep: `{"dataset": "c4", "params.min": 1e6}`.

    Returns:
        (rows, columns): every column of the table, those that were renamed under both names, those with a unit in
        parameters, tokens, FLOPs or nats per token. `attrs["source"]` names the table, `attrs["notes"]` says what was
        assumed in reading it.

    Raises:
        UserError: there is no such file or column, or it cannot be read as a table.

    >>> sl.read_table("my_runs.csv", where={"params.min": 1e7}).columns.tolist()
    ['run_id', 'params', 'tokens', 'flops', 'loss']
    """
    names = column_names(columns, loss=loss, params=params, tokens=tokens, flops=flops, run_id=run_id)
    table = table_of(data, columns=names, units=units, where=where)
    frame = table.frame.copy()
    for name in {**table.units, **table.cells}:
        frame[name] = table.numbers(name)
    frame.attrs = {"source": table.source, "notes": list(table.notes)}
    return frame


def column_names(columns: Mapping[str, str] | None, **named: str | None) -> dict[str, str]:
    """Our column names to the table's, from `columns` and the keyword arguments. Raises `UserError` for two names of one."""
    found = {str(ours): str(theirs) for ours, theirs in (columns or {}).items()}
    for ours, theirs in named.items():
        if theirs is None:
            continue
        if found.get(ours, theirs) != theirs:
            raise UserError(f"{ours}={theirs!r} and columns={{{ours!r}: {found[ours]!r}}}: give one of them.")
        found[ours] = str(theirs)
    return found


def table_of(
    data: Any,
    *,
    columns: Mapping[str, str] | None = None,
    units: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
    metric: str | None = None,
    metrics: Sequence[str] = (),
    decimal: str | None = None,
) -> Table:
    """The analysis's `Table` from any kind of table. Raises `UserError`."""
    from scaling_lab.analysis.data.tables.table import table_from_frame

    frame, source, notes = frame_of(data)
    names = [str(name) for name in frame.columns]
    for ours, theirs in (columns or {}).items():
        _check_column(ours, theirs, names, source)
    return table_from_frame(
        frame,
        source,
        notes,
        columns=columns,
        where=where,
        metric=metric,
        metrics=metrics,
        units=units,
        decimal=decimal,
    )


def check_needed(table: Table) -> None:
    """Raise `UserError` naming the argument where the loss, or two of params, tokens and flops, are missing."""
    from scaling_lab.analysis.data.table_observations import needed_columns
    from scaling_lab.analysis.data.tables.table import columns_error

    needed, why = needed_columns(table)
    if needed:
        raise columns_error(table, needed, why, "{}={!r}", ", ")


def frame_of(data: Any) -> tuple[pd.DataFrame, str, list[str]]:
    """(rows, the table's name for messages, notes on how it was read). Column names are distinct text."""
    import pandas as pd

    from scaling_lab.analysis.data.tables.files import distinct_names

    if isinstance(data, (str, Path)):
        return _read_file(Path(data).expanduser())
    frame = _converted(data)
    if frame.empty:
        raise UserError("the table holds no rows.")
    source = str(frame.attrs.get("source", "the table"))
    notes = [str(note) for note in frame.attrs.get("notes", ())]
    if any(name is not None for name in frame.index.names):  # run_id as the index, as pandas users have it
        frame = frame.reset_index()
    names = ["/".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    out = frame.reset_index(drop=True)
    out.columns = pd.Index(distinct_names(names, notes))
    return out, source, notes


def _read_file(path: Path) -> tuple[pd.DataFrame, str, list[str]]:
    from scaling_lab.analysis.data.tables.files import read_frame

    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise UserError(f"data={str(path)!r}: there is no such file.{hint}")
    try:
        frame, notes = read_frame(path)
    except UserError as error:  # the command line calls the table runs=
        raise UserError(str(error).replace("runs=", "data=", 1)) from error
    return frame, path.name, notes


def _converted(data: Any) -> pd.DataFrame:
    """A DataFrame from a DataFrame, columns, records, or any table that knows `to_pandas` or the Arrow interface."""
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data
    if hasattr(data, "to_pandas"):  # pyarrow, polars, datasets
        return pd.DataFrame(data.to_pandas())
    if hasattr(data, "__arrow_c_stream__"):
        import pyarrow

        return pyarrow.table(data).to_pandas()
    records = isinstance(data, (list, tuple)) and all(isinstance(row, Mapping) for row in data)
    if isinstance(data, Mapping) or (records and data):
        try:
            return pd.DataFrame(dict(data) if isinstance(data, Mapping) else list(data))
        except ValueError as error:  # columns of different lengths
            raise UserError(f"data: this {type(data).__name__} is not a table: {error}.") from error
    raise UserError(
        f"data={type(data).__name__} is not a table. Choices: a pandas DataFrame, the path of a CSV, Parquet or JSON "
        "file, a dictionary of columns, a list of records, a pyarrow or polars table."
    )


def _check_column(ours: str, theirs: str, names: list[str], source: str) -> None:
    from scaling_lab.analysis.data.tables.names import listed, nearest_column
    from scaling_lab.analysis.data.tables.table import COLUMNS
    from scaling_lab.core.errors import unknown

    if ours not in COLUMNS:
        raise unknown("columns: the name", ours, COLUMNS)
    if theirs in names:
        return
    near = nearest_column(theirs, names)
    hint = f" Did you mean {near!r}?" if near else ""
    raise UserError(f"{ours}={theirs!r}: {source} has no such column.{hint} Its columns are {listed(names)}.")
