"""Owns where documents come from: files and folders of text, JSON lines and Parquet, or a data set of the hub, in a fixed order."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError, unknown

# Data sets by a short name: (repository, configuration, column of the text).
PRESETS: dict[str, tuple[str, str | None, str]] = {
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "openwebtext": ("Skylion007/openwebtext", None, "text"),
    "tinystories": ("roneneldan/TinyStories", None, "text"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
}
ENDINGS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
TEXT, JSON_LINES, PARQUET = "text", "json", "parquet"
# Between documents of one text file, where the file holds it; else blank lines separate them.
END_OF_TEXT = "<|endoftext|>"
READ_CHARACTERS = 1 << 20
# A longer document is cut: a file that is one giant line must not have to fit into memory several times.
MAX_DOCUMENT_CHARACTERS = 1 << 20
ENCODING_ERRORS = ("strict", "replace")


@dataclass(frozen=True)
class LocalText:
    """Documents of a file, or of all files of a folder in the order of their names."""

    path: Path
    text_column: str = "text"
    errors: str = "strict"

    def __post_init__(self) -> None:
        if self.errors not in ENCODING_ERRORS:
            raise unknown("errors", self.errors, ENCODING_ERRORS)
        if not self.path.exists():
            raise UserError(f"path={str(self.path)!r}: there is no such file or folder.")
        if not self.files():
            raise UserError(f"path={str(self.path)!r} holds no file that ends in {', '.join(ENDINGS)}.")

    @property
    def name(self) -> str:
        return self.path.name

    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        return sorted(p for p in self.path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())

    def size_bytes(self) -> int | None:
        return sum(path.stat().st_size for path in self.files())

    def documents(self, skip: int = 0) -> Iterator[str]:
        """Every document after the first `skip`. Raises `UserError` naming the file and the place of what cannot be read."""
        single = self.path.is_file()
        return itertools.islice(
            itertools.chain.from_iterable(self._of_file(path, single) for path in self.files()), skip, None
        )

    def _of_file(self, path: Path, single: bool) -> Iterator[str]:
        form = ENDINGS.get(path.suffix.lower(), TEXT)
        if form == PARQUET:
            return self._parquet(path)
        if form == JSON_LINES:
            return self._json_lines(path)
        # In a folder a text file is a document; alone it holds many.
        return split_text(self._characters(path)) if single else whole(self._characters(path))

    def _characters(self, path: Path) -> Iterator[str]:
        read_bytes = 0
        with open(path, encoding="utf-8", errors=self.errors, newline="") as file:
            while True:
                try:
                    text = file.read(READ_CHARACTERS)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"path={str(path)!r} is not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x} near byte "
                        f"{first_bad_byte(path)}). Convert it, or give errors=replace."
                    ) from None
                if not text:
                    return
                read_bytes += len(text)
                yield text.replace("\r\n", "\n")

    def _json_lines(self, path: Path) -> Iterator[str]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8", self.errors))
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"path={str(path)!r}, line {number} is not a JSON object of its own: {' '.join(str(error).split())}."
                    ) from None
                yield self._column(path, f"line {number}", row)

    def _column(self, path: Path, where: str, row: Any) -> str:
        text = row.get(self.text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"text_column={self.text_column!r} is no text in {str(path)!r}, {where}. It has: {has or 'nothing'}."
            )
        return text

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            if self.text_column not in names:
                raise UserError(
                    f"text_column={self.text_column!r} is no column of {str(path)!r}. Choices: {', '.join(names)}."
                )
            for batch in file.iter_batches(batch_size=1024, columns=[self.text_column]):
                for k, text in enumerate(batch.column(0).to_pylist()):
                    if text is not None:
                        yield self._column(path, f"row {k}", {self.text_column: text})
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"path={str(path)!r} cannot be read as Parquet: {' '.join(str(error).split())}."
            ) from None


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub, streamed: nothing is downloaded but what is read."""

    repository: str
    configuration: str | None
    text_column: str
    split: str = "train"

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.repository, self.configuration) if part)

    def size_bytes(self) -> int | None:
        return None

    def documents(self, skip: int = 0) -> Iterator[str]:
        """Every document after the first `skip`. Raises `UserError` in one line where the hub cannot be reached."""
        try:
            import datasets

            # Its retries are many lines about what the one error says.
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
            stream = datasets.load_dataset(
                self.repository, self.configuration, split=self.split, streaming=True
            )
            for row in stream.skip(skip) if skip else stream:
                yield row[self.text_column]
        except KeyError:
            raise UserError(f"text_column={self.text_column!r} is no column of {self.name}.") from None
        except Exception as error:  # the hub's client has many kinds; all mean that the text did not come
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"source={self.name!r} could not be read from the Hugging Face hub ({type(error).__name__}: {what[:160]}). "
                "Without a network use a local file: scaling-lab prepare-data path=FILE (text, JSON lines or Parquet)."
            ) from None


def hub_text(source: str, text_column: str | None) -> HubText:
    """A preset, or OWNER/NAME[:CONFIGURATION] of the hub."""
    if source in PRESETS:
        repository, configuration, column = PRESETS[source]
        return HubText(repository, configuration, text_column or column)
    if "/" not in source:
        raise unknown("source", source, [*PRESETS, "OWNER/NAME of the hub"])
    repository, _, configuration = source.partition(":")
    return HubText(repository, configuration or None, text_column or "text")


def split_text(parts: Iterator[str]) -> Iterator[str]:
    """Documents of one long text: between end-of-text marks where its beginning has one, else between blank lines."""
    buffer, mark = "", None
    for part in parts:
        buffer += part
        mark = mark or (END_OF_TEXT if END_OF_TEXT in buffer else "\n\n")
        *done, buffer = buffer.split(mark)
        yield from done
        # Without any mark the buffer would grow to the whole file.
        while len(buffer) > 2 * MAX_DOCUMENT_CHARACTERS:
            yield buffer[:MAX_DOCUMENT_CHARACTERS]
            buffer = buffer[MAX_DOCUMENT_CHARACTERS:]
    yield buffer


def whole(parts: Iterator[str]) -> Iterator[str]:
    """One document of all parts, cut where it is very long."""
    buffer = ""
    for part in parts:
        buffer += part
        while len(buffer) > 2 * MAX_DOCUMENT_CHARACTERS:
            yield buffer[:MAX_DOCUMENT_CHARACTERS]
            buffer = buffer[MAX_DOCUMENT_CHARACTERS:]
    yield buffer


def first_bad_byte(path: Path) -> int:
    """Where a file stops being UTF-8."""
    import codecs

    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return read - pending + error.start
            read += len(block)
    return read
