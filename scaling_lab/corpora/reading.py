"""Owns how text comes out of one file: characters, JSON lines, Parquet; how long text becomes documents; how far it is.

A document is the same however the file happens to be read: neither a line's end nor a mark is lost between two reads.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError

# Between documents of one text file, where the file holds it; else blank lines separate them.
END_OF_TEXT = "<|endoftext|>"
READ_BYTES = 1 << 20
# A longer document is cut: a file that is one giant line must not have to fit into memory several times.
MAX_DOCUMENT_CHARACTERS = 1 << 20
BYTE_ORDER_MARK = codecs.BOM_UTF8


@dataclass
class Meter:
    """How far the reading is, in the source's own unit: bytes of its files, or rows of a data set."""

    done: float = 0.0
    total: float | None = None

    @property
    def share(self) -> float | None:
        """In [0, 1]; None where nobody knows how much there is."""
        return None if self.total is None else min(1.0, self.done / max(1.0, self.total))


def characters(path: Path, errors: str, meter: Meter) -> Iterator[str]:
    """The text of a UTF-8 file, part by part, its lines ended by a line feed and without a byte order mark.

    Raises `UserError` naming the byte that is not UTF-8, unless `errors` is replace.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    kept = ""
    with open(path, "rb") as file:
        while True:
            block = file.read(READ_BYTES)
            try:
                text = kept + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"path={str(path)!r} is not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x} near byte "
                    f"{first_bad_byte(path)}). Convert it, or give errors=replace."
                ) from None
            meter.done += len(block)
            # Its line feed may be the first of the next part.
            kept = "\r" if block and text.endswith("\r") else ""
            if text := text.removesuffix(kept).replace("\r\n", "\n"):
                yield text
            if not block:
                return


def json_rows(path: Path, errors: str, meter: Meter) -> Iterator[tuple[str, Any]]:
    """Where each value of a file of JSON lines is, in words, and the value."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            meter.done += len(line)
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", errors))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"path={str(path)!r}, line {number} is not a JSON object of its own: {' '.join(str(error).split())}. "
                    "JSON lines have one object on each line."
                ) from None
            yield f"line {number}", row


def parquet_rows(path: Path, column: str, meter: Meter) -> Iterator[tuple[str, Any]]:
    """Where each row of a Parquet file is, in words, and the row: {column: value}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names, rows, size = file.schema_arrow.names, file.metadata.num_rows, path.stat().st_size
        if column not in names:
            raise UserError(
                f"text_column={column!r} is no column of {str(path)!r}. Choices: {', '.join(names)}."
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            meter.done += size * batch.num_rows / rows
            for value in batch.column(0).to_pylist():
                yield f"row {number}", {column: value}
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"path={str(path)!r} cannot be read as Parquet: {' '.join(str(error).split())}."
        ) from None


def text_of(row: Any, column: str, source: str, where: str) -> str | None:
    """The text of one row; None where the row says that it has none (null).

    Raises `UserError` naming the place where the column is missing or holds something else.
    """
    if isinstance(row, dict) and column in row:
        text = row[column]
        if text is None or isinstance(text, str):
            return text
    has = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
    raise UserError(f"text_column={column!r} is no text in {source!r}, {where}. It has: {has or 'nothing'}.")


def cut(document: str) -> Iterator[str]:
    """A document, in pieces of `MAX_DOCUMENT_CHARACTERS` while more than two of them are left."""
    start = 0
    while len(document) - start > 2 * MAX_DOCUMENT_CHARACTERS:
        yield document[start : start + MAX_DOCUMENT_CHARACTERS]
        start += MAX_DOCUMENT_CHARACTERS
    yield document[start:] if start else document


def split_text(parts: Iterator[str]) -> Iterator[str]:
    """Documents of one long text: between end-of-text marks where its beginning has one, else between blank lines."""
    buffer, mark = "", None
    for part in parts:
        buffer += part
        mark = mark or (END_OF_TEXT if END_OF_TEXT in buffer else "\n\n")
        *done, buffer = buffer.split(mark)
        for document in done:
            yield from cut(document)
        # Without any mark the buffer would grow to the whole file.
        *done, buffer = cut(buffer)
        yield from done
    yield buffer


def whole(parts: Iterator[str]) -> Iterator[str]:
    """One document of all parts, cut where it is very long."""
    buffer = ""
    for part in parts:
        *done, buffer = cut(buffer + part)
        yield from done
    yield buffer


def first_bad_byte(path: Path) -> int:
    """Where a file stops being UTF-8."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            read += len(block)
    # It ends within a character.
    return read - len(decoder.getstate()[0])
