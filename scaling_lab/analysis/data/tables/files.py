"""Read a user's file into a data frame: CSV and its dialects, Parquet, JSON records, JSON lines.

Files vary: semicolons, decimal commas, byte order marks, Latin-1, a trailing comma on every row, a truncated last line.
Reading is lenient, and notes say what was assumed. A row that cannot be read becomes an empty row, so that row numbers match
the file and the row is later dropped with a reason.
"""

from __future__ import annotations

import bz2
import difflib
import gzip
import io
import json
import lzma
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from scaling_lab.core.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSIONS = (*_OPENERS, ".zst")
_SEPARATORS = (",", ";", "\t", "|")
# Encoding, separator and decimal mark are detected from this much of a file.
_SAMPLE_BYTES = 1 << 16
# Larger JSON-lines files are first parsed with Arrow, which is twenty times faster than the standard library.
LARGE_JSON_BYTES = 8 << 20


def read_frame(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the file, with distinct, stripped column names, and notes on how it was read.

    Raises:
        UserError: no such file, an unknown file extension, or not a table.
    """
    kind = _kind(path)
    notes: list[str] = []
    try:
        if kind == "csv":
            frame = _read_csv(path, notes)
        elif kind == "parquet":
            frame = _read_parquet(path)
        else:
            frame = _read_json(path, kind == "jsonl", notes)
    except UserError:
        raise
    # Parser, Arrow and decoding errors are subclasses of these; a file with too deep nesting raises RecursionError.
    except (ValueError, OSError, EOFError, ImportError, TypeError, lzma.LZMAError, RecursionError) as error:
        text = str(error).strip()
        first = text.splitlines()[0] if text else type(error).__name__
        raise UserError(f"runs={path} could not be read as {kind}: {first}") from error
    if len(frame) == 0:
        raise UserError(f"runs={path} has no rows.")
    frame.columns = cast("Any", distinct_names([str(c) for c in frame.columns], notes))
    return frame, notes


def header_names(path: Path) -> list[str]:
    """Column names of a CSV or Parquet file, without reading its rows; empty for other files."""
    try:
        kind = _kind(path)
        if kind == "parquet":
            import pyarrow.parquet

            return [str(name) for name in pyarrow.parquet.read_schema(path).names]
        if kind == "csv":
            import pandas as pd

            return distinct_names(
                [str(c) for c in pd.read_csv(_source(path), nrows=0, **_dialect(path, [])).columns], []
            )
    except (OSError, ValueError):
        pass  # reading the table will report the problem
    return []


def _kind(path: Path) -> str:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UserError(
            f"runs={path}: no such file." + (f" Did you mean {path.parent / near[0]}?" if near else "")
        )
    if path.is_dir():
        raise UserError(f"runs={path} is a directory; a table is one file: {', '.join(sorted(KINDS))}.")
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes = suffixes[:-1]
    kind = KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise unknown("runs: file extension", suffixes[-1] if suffixes else "", KINDS)
    return kind


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    suffix = path.suffix.lower()
    if suffix in _OPENERS:
        return cast("IO[bytes]", _OPENERS[suffix](path, "rb"))
    if suffix == ".zst":
        import pyarrow

        return cast("IO[bytes]", pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _source(path: Path) -> Any:
    """What pandas reads: the path, or the decompressed bytes for .zst, for which pandas needs another package."""
    if path.suffix.lower() != ".zst":
        return path
    with _open(path) as file:
        return io.BytesIO(file.read())


# -- CSV


def _read_csv(path: Path, notes: list[str]) -> pd.DataFrame:
    import pandas as pd

    options = _dialect(path, notes)
    try:
        frame = pd.read_csv(_source(path), low_memory=False, **options)
    except UnicodeDecodeError:  # beyond the sample
        options["encoding"] = "latin-1"
        notes.append("The file is not UTF-8: read as Latin-1.")
        frame = pd.read_csv(_source(path), low_memory=False, **options)
    except pd.errors.ParserError:
        frame = _read_ragged_csv(path, options, notes)
    if not isinstance(frame.index, pd.RangeIndex):
        # Every row has one cell more than the header, and pandas uses the first as row name. With a trailing separator
        # the extra cell is the last one.
        if frame.iloc[:, -1].isna().all():
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", pd.errors.ParserWarning
                )  # about the extra cell, which is empty
                frame = pd.read_csv(_source(path), low_memory=False, index_col=False, **options)
        else:
            levels = frame.index.nlevels
            frame = frame.reset_index(names=[f"index_{k}" if levels > 1 else "index" for k in range(levels)])
    return frame


def _read_ragged_csv(path: Path, options: dict[str, Any], notes: list[str]) -> pd.DataFrame:
    """Read a file in which some rows have too many cells: they become empty rows, and a note counts them."""
    import pandas as pd

    width = len(pd.read_csv(_source(path), nrows=0, **options).columns)
    bad: list[list[str]] = []

    def empty(cells: list[str]) -> list[str]:
        bad.append(cells)
        return [""] * width

    frame = pd.read_csv(_source(path), engine="python", on_bad_lines=empty, **options)
    if bad:
        first = ",".join(bad[0])
        notes.append(
            f"{len(bad)} row(s) have more cells than the header's {width} and are dropped; the first: {first[:60]!r}."
        )
    return frame


def _dialect(path: Path, notes: list[str]) -> dict[str, Any]:
    """Encoding, separator and decimal mark of a CSV file, as options of `pandas.read_csv`."""
    with _open(path) as file:
        sample = file.read(_SAMPLE_BYTES)
    encoding = "utf-8"
    if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    else:
        try:
            sample.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 4:  # not just a character truncated by the end of the sample
                encoding = "latin-1"
                notes.append("The file is not UTF-8: read as Latin-1.")
    lines = sample.decode(encoding, errors="replace").lstrip("\ufeff").splitlines()
    header = next((line for line in lines if line.strip()), "")
    outside_quotes = re.sub(r'"[^"]*"', "", header)
    separator = max(_SEPARATORS, key=outside_quotes.count)  # in case of ties the first, the comma
    options: dict[str, Any] = {"sep": separator, "encoding": encoding}
    if separator != ",":
        cells = [cell.strip().strip('"') for line in lines[1:50] for cell in line.split(separator)]
        comma = any(re.fullmatch(r"[+-]?\d+,\d+([eE][+-]?\d+)?", cell) for cell in cells)
        # 21.961.153 is no number with a decimal point: its points separate thousands.
        if comma and not any(re.fullmatch(r"[+-]?\d+\.\d+([eE][+-]?\d+)?", cell) for cell in cells):
            options["decimal"] = ","
            if any(re.fullmatch(r"[+-]?\d{1,3}(\.\d{3}){2,}", cell) for cell in cells):
                options["thousands"] = "."
            notes.append("Numbers are written with a decimal comma.")
    return options


# -- Parquet


def _read_parquet(path: Path) -> pd.DataFrame:
    """All columns, including those that pandas stored as the index of the frame."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path).read()
    names = table.column_names
    if len(set(names)) < len(names):  # column names of a frame must be distinct
        table = table.rename_columns(distinct_names(names, []))
    nameless = [n for n in table.column_names if re.fullmatch(r"__index_level_\d+__", n)]
    return table.drop_columns(nameless).to_pandas(ignore_metadata=True)


# -- JSON


def _read_json(path: Path, lines: bool, notes: list[str]) -> pd.DataFrame:
    """JSON records, JSON lines (also in .json files), an object of columns, or an object with one list of records. Nested
    objects become columns a.b."""
    import pandas as pd

    if lines and path.stat().st_size > LARGE_JSON_BYTES:
        frame = _arrow_lines(path)
        if frame is not None:
            return frame
    with _open(path) as file:
        raw = file.read()
    text = _decoded(raw, notes)
    data: Any = None
    if not lines:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            if "\n" not in text.strip() or not _is_json(text.strip().splitlines()[0]):
                raise
            if error.pos == len(text.rstrip()):
                raise  # a single, truncated document
            lines = True  # JSON lines in a .json file
    if lines:
        data = _json_lines(text, notes)
    if isinstance(data, dict):
        wrapped = [v for v in data.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(wrapped) == 1:
            data = wrapped[0]  # {"runs": [...]}
        elif any(isinstance(v, (list, dict)) for v in data.values()):
            return pd.DataFrame(data)
        else:
            data = [data]
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise ValueError("expected a list of records, one object per row")
    return pd.json_normalize(data)


def _json_lines(text: str, notes: list[str]) -> list[dict[str, Any]]:
    """One record per non-blank line; a line that is not an object becomes an empty record, and a note counts these lines."""
    records: list[dict[str, Any]] = []
    bad: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            records.append(record)
        except ValueError as error:
            records.append({})
            bad.append(f"line {number}: {error}")
    if bad and len(bad) == len(records):
        raise ValueError(bad[0])
    if bad:
        notes.append(f"{len(bad)} line(s) are not JSON objects and are dropped; the first is {bad[0]}.")
    return records


def _arrow_lines(path: Path) -> pd.DataFrame | None:
    """A large file of JSON lines; None if Arrow would read it differently from the standard library."""
    import pyarrow
    from pyarrow import json as arrow_json

    options = arrow_json.ReadOptions(block_size=4 << 20)
    try:
        try:  # block by block, with a third of the memory; the first block must determine all column types
            with _open(path) as file, arrow_json.open_json(file, read_options=options) as blocks:
                table = pyarrow.Table.from_batches(list(blocks), blocks.schema)
        except pyarrow.ArrowException:
            with _open(path) as file:
                table = arrow_json.read_json(file, read_options=options)
    except (pyarrow.ArrowException, ValueError):
        return None
    while any(pyarrow.types.is_struct(f.type) for f in table.schema):
        table = table.flatten()
    # Arrow parses text like "2026-01-01" as a time, which a filter with that text would not match.
    has_times = any(pyarrow.types.is_temporal(f.type) for f in table.schema)
    if has_times or len(set(table.column_names)) < table.num_columns:
        return None
    return table.to_pandas(
        split_blocks=True, self_destruct=True
    )  # column by column, without a second copy in memory


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _decoded(raw: bytes, notes: list[str]) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        notes.append("The file is not UTF-8: read as Latin-1.")
        return io.TextIOWrapper(io.BytesIO(raw), encoding="latin-1").read()


def distinct_names(names: list[str], notes: list[str]) -> list[str]:
    """Stripped names, with repeated names numbered."""
    out: list[str] = []
    repeated = []
    for name in (n.strip().removeprefix("\ufeff") for n in names):
        new, k = name, 1
        while new in out:
            new, k = f"{name}.{k}", k + 1
        if new != name:
            repeated.append(name)
        out.append(new)
    if repeated:
        notes.append(f"Columns with the same name are numbered: {', '.join(dict.fromkeys(repeated))}.")
    return out
