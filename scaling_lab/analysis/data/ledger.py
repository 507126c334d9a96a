"""Fast reading of a sweep's run records, with curves as columns instead of point objects.

    records, problems = load_ledger(RunStore("results/my-sweep"))

The result equals that of `RunStore.load_records`, except that `record.curve` is a `CurveColumns`: a sequence of `EvalPoint`
like the tuple, with columns that the analysis uses without creating ten million objects. Arrow's JSON reader parses many
curve.jsonl files at once. A run whose file is unusual in any way (a truncated line, a missing field, NaN) is read again by
the slower reader of the store, so that one place decides how to handle damaged files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import EvalPoint, RunRecord
from scaling_lab.core.storage.store import RunStore

if TYPE_CHECKING:
    import pyarrow

# Curve files of about this many bytes in total are parsed in one call, to make the overhead of a call negligible.
_BATCH_BYTES = 16 << 20
_COUNTS = ("step", "tokens")
_REQUIRED = tuple(f.name for f in fields(EvalPoint) if f.default is MISSING)
_NAMES = tuple(f.name for f in fields(EvalPoint) if f.name != "evals")
# Prefix of the columns of a point's `evals` (other losses and scores).
EVALS = "evals."


class CurveColumns(Sequence[EvalPoint]):
    """The curve of one run as columns: `columns[name]` is a (points,) array, int64 for counts, else float64 with NaN for
    missing values; `columns["evals.NAME"]` has the values of NAME in the points' `evals`.

    As a sequence it contains the same `EvalPoint` values as the store's tuple (None for missing values).
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return int(self.columns["step"].size)

    @overload
    def __getitem__(self, at: int) -> EvalPoint: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[EvalPoint, ...]: ...
    def __getitem__(self, at: int | slice) -> EvalPoint | tuple[EvalPoint, ...]:
        if isinstance(at, slice):
            return tuple(CurveColumns({k: v[at] for k, v in self.columns.items()}))
        return _eval_point({name: v[at].item() for name, v in self.columns.items()})

    def __iter__(self) -> Iterator[EvalPoint]:
        for row in zip(*(values.tolist() for values in self.columns.values())):
            yield _eval_point(dict(zip(self.columns, row)))

    def first(self, n: int) -> tuple[EvalPoint, ...]:
        """The first n points as columns, typed as the tuple that a record declares."""
        return cast("tuple[EvalPoint, ...]", CurveColumns({k: v[:n] for k, v in self.columns.items()}))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CurveColumns({len(self)} points)"


def curve_columns(points: Sequence[EvalPoint]) -> Mapping[str, NDArray[Any]]:
    """The columns of a curve: its own, or arrays made from its points (NaN for None)."""
    if isinstance(points, CurveColumns):
        return points.columns
    out: dict[str, NDArray[Any]] = {
        name: np.array([_number(getattr(p, name)) for p in points], dtype=_dtype(name)) for name in _NAMES
    }
    for name in dict.fromkeys(name for p in points for name in p.evals or ()):
        out[EVALS + name] = np.array([_number((p.evals or {}).get(name)) for p in points], dtype=np.float64)
    return out


def load_ledger(
    store: RunStore, *, batch_bytes: int = _BATCH_BYTES
) -> tuple[list[RunRecord], list[tuple[str, str]]]:
    """All records of a sweep with their curves, ordered by run id, and (run id, reason) for each that cannot be read.

    The same as `store.load_records()`, but several times faster and with a fraction of the memory (scripts/bench_store.py).
    """
    records: dict[str, RunRecord] = {}
    problems: dict[str, str] = {}

    def collect(batch: list[tuple[str, RunRecord]], parsed: Future[list[CurveColumns | None]]) -> None:
        for (run_id, record), columns in zip(batch, parsed.result()):
            if columns is not None and len(columns) >= record.curve_points:
                records[run_id] = replace(record, curve=columns.first(record.curve_points))
                continue
            try:
                records[run_id] = store.read_record(run_id)
            except UserError as error:
                problems[run_id] = str(error)

    run_ids = store.run_ids_with_record()
    # pyarrow parses without the GIL, so one batch is parsed while the files of the next are read.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: list[tuple[list[tuple[str, RunRecord]], Future[list[CurveColumns | None]]]] = []

        def submit(batch: list[tuple[str, RunRecord]], texts: list[bytes]) -> None:
            pending.append((batch, pool.submit(_parse, texts)))
            while len(pending) > 1:
                collect(*pending.pop(0))

        batch: list[tuple[str, RunRecord]] = []
        texts: list[bytes] = []
        size = 0
        for run_id in run_ids:
            try:
                record = store.read_record(run_id, curve=False)
                path = store.run_folder(run_id) / "curve.jsonl"
                text = path.read_bytes() if path.exists() else b""
            except (UserError, OSError) as error:
                problems[run_id] = str(error)
                continue
            batch.append((run_id, record))
            texts.append(text)
            size += len(text)
            if size >= batch_bytes:
                submit(batch, texts)
                batch, texts, size = [], [], 0
        submit(batch, texts)
        for one in pending:
            collect(*one)
    return [records[r] for r in run_ids if r in records], [(r, problems[r]) for r in run_ids if r in problems]


def _parse(texts: Sequence[bytes]) -> list[CurveColumns | None]:
    """The curves of several files; None for a file that needs the slow reader."""
    whole = [text if text.endswith(b"\n") else text[: text.rfind(b"\n") + 1] for text in texts]
    merged = _columns(b"".join(whole))
    if merged is None:  # one of the files is unusual: find out which
        return [None] if len(texts) == 1 else [_parse([text])[0] for text in texts]
    lines = np.array([text.count(b"\n") for text in whole], dtype=np.int64)
    ends = np.cumsum(lines)
    return [
        CurveColumns({name: values[start:end] for name, values in merged.items()})
        for start, end in zip((ends - lines).tolist(), ends.tolist())
    ]


def _columns(text: bytes) -> dict[str, NDArray[Any]] | None:
    """The columns of JSON lines; None unless every line is one complete point."""
    if not text:
        return {name: np.empty(0, dtype=_dtype(name)) for name in _NAMES}
    import pyarrow
    from pyarrow import json

    try:
        table = json.read_json(
            pyarrow.BufferReader(text),
            # A single block, because a block boundary may lie inside a line.
            read_options=json.ReadOptions(use_threads=False, block_size=len(text) + 1),
            # Only the type of `evals` is inferred: its names differ between sweeps.
            parse_options=json.ParseOptions(explicit_schema=_schema(), unexpected_field_behavior="infer"),
        )
    except pyarrow.ArrowException:
        return None
    if table.num_rows != text.count(b"\n"):  # blank lines, or two points on one
        return None
    if not {*table.column_names} <= {*_NAMES, "evals"}:
        return None
    if any(table.column(name).null_count for name in _REQUIRED):
        return None
    evals = _evals(table)
    if evals is None:
        return None
    out: dict[str, NDArray[Any]] = {}
    for name in _NAMES:
        column = table.column(name)
        if name == "wall_time_s":
            column = column.fill_null(EvalPoint.wall_time_s)
        out[name] = column.to_numpy()
        if out[name].dtype != _dtype(name):  # all values are null
            out[name] = out[name].astype(_dtype(name))
    return out | evals


def _evals(table: pyarrow.Table) -> dict[str, NDArray[np.float64]] | None:
    """The columns of the points' `evals`; None unless all values are numbers."""
    import pyarrow

    if "evals" not in table.column_names or pyarrow.types.is_null(table.column("evals").type):
        return {}
    # The table was read as one block, so this column has one chunk; flatten() keeps missing values missing.
    (column,) = table.column("evals").chunks
    if not pyarrow.types.is_struct(column.type):
        return None
    out = {}
    for field, values in zip(column.type, column.flatten()):
        if not (pyarrow.types.is_floating(field.type) or pyarrow.types.is_integer(field.type)):
            return None
        out[EVALS + field.name] = values.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)
    return out


def _schema() -> pyarrow.Schema:
    import pyarrow

    return pyarrow.schema([(n, pyarrow.int64() if n in _COUNTS else pyarrow.float64()) for n in _NAMES])


def _dtype(name: str) -> type:
    return np.int64 if name in _COUNTS else np.float64


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _eval_point(cells: Mapping[str, Any]) -> EvalPoint:
    plain = {
        name: _optional_value(name, value) for name, value in cells.items() if not name.startswith(EVALS)
    }
    # NaN means missing: not every run, and not every point of a run, has all of them.
    evals = {name.removeprefix(EVALS): v for name, v in cells.items() if name.startswith(EVALS) and v == v}
    return EvalPoint(**plain, evals=evals or None)


def _optional_value(name: str, value: Any) -> Any:
    """The value of a field, with None for NaN in optional fields."""
    return None if value != value and name not in _REQUIRED else value
