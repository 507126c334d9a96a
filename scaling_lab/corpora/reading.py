"""Reading of text, JSON Lines and Parquet files, and splitting of long text into documents.

Documents do not depend on block boundaries: line endings and separators that span two reads are handled.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError

# Separates documents in a text file that contains it; otherwise blank lines do.
END_OF_TEXT = "<|endoftext|>"
READ_BYTES = 1 << 20
# Longer documents are cut, to limit memory for files that are one giant line.
MAX_DOCUMENT_CHARACTERS = 1 << 20
BYTE_ORDER_MARK = codecs.BOM_UTF8


@dataclass
class ReadProgress:
    """Reading progress in the source's own unit: bytes of files, or rows of a dataset."""

    done: float = 0.0
    total: float | None = None

    @property
    def share(self) -> float | None:
        """Fraction read, in [0, 1]; None if the total is unknown."""
        return None if self.total is None else min(1.0, self.done / max(1.0, self.total))


def read_characters(path: Path, errors: str, meter: ReadProgress) -> Iterator[str]:
    """The text of a UTF-8 file in parts, with LF line endings and without a byte order mark.

    Raises `UserError` naming the first invalid byte, unless `errors` is replace.
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
                    f"path={str(path)!r} is not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x} near offset "
                    f"{first_bad_byte(path)}). Convert it, or give errors=replace."
                ) from None
            meter.done += len(block)
            # The LF of a CRLF may be the first character of the next part.
            kept = "\r" if block and text.endswith("\r") else ""
            if text := text.removesuffix(kept).replace("\r\n", "\n"):
                yield text
            if not block:
                return


def json_rows(path: Path, errors: str, meter: ReadProgress) -> Iterator[tuple[str, Any]]:
    """(position as text, value) of each line of a JSON Lines file."""
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
                    f"path={str(path)!r}, line {number} is not valid JSON: {' '.join(str(error).split())}. "
                    "A JSON Lines file has one object per line."
                ) from None
            yield f"line {number}", row


def parquet_rows(path: Path, column: str, meter: ReadProgress) -> Iterator[tuple[str, Any]]:
    """(position as text, {column: value}) of each row of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names, rows, size = file.schema_arrow.names, file.metadata.num_rows, path.stat().st_size
        if column not in names:
            raise UserError(
                f"text_column={column!r} is not a column of {str(path)!r}. Choices: {', '.join(names)}."
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
    """The text of one row; None if it is null.

    Raises `UserError` naming the position if the column is missing or does not contain text.
    """
    if isinstance(row, dict) and column in row:
        text = row[column]
        if text is None or isinstance(text, str):
            return text
    has = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
    raise UserError(
        f"text_column={column!r} has no text in {source!r}, {where}. The row has: {has or 'nothing'}."
    )


def split_long(document: str) -> Iterator[str]:
    """A document, cut into pieces of `MAX_DOCUMENT_CHARACTERS` while more than twice that is left."""
    start = 0
    while len(document) - start > 2 * MAX_DOCUMENT_CHARACTERS:
        yield document[start : start + MAX_DOCUMENT_CHARACTERS]
        start += MAX_DOCUMENT_CHARACTERS
    yield document[start:] if start else document


def split_documents(parts: Iterator[str]) -> Iterator[str]:
    """Documents of one long text, separated by end-of-text marks if its first part has one, else by blank lines."""
    buffer, mark = "", None
    for part in parts:
        buffer += part
        mark = mark or (END_OF_TEXT if END_OF_TEXT in buffer else "\n\n")
        *done, buffer = buffer.split(mark)
        for document in done:
            yield from split_long(document)
        # Without any separator the buffer would grow to the whole file.
        *done, buffer = split_long(buffer)
        yield from done
    yield buffer


def join_parts(parts: Iterator[str]) -> Iterator[str]:
    """One document made of all parts, cut if it is very long."""
    buffer = ""
    for part in parts:
        *done, buffer = split_long(buffer + part)
        yield from done
    yield buffer


def first_bad_byte(path: Path) -> int:
    """Offset of the first byte that is not valid UTF-8."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            read += len(block)
    # The file ends within a character.
    return read - len(decoder.getstate()[0])
