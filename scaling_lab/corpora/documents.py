"""Owns where documents come from: files and folders of text, JSON lines and Parquet, or a data set of the hub, in a fixed order."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError, unknown
from scaling_lab.corpora.reading import (
    Meter,
    characters,
    cut,
    json_rows,
    parquet_rows,
    split_text,
    text_of,
    whole,
)

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
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz")
TEXT, JSON_LINES, PARQUET = "text", "json", "parquet"
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
        if self.path.is_file() and self.path.suffix.lower() in COMPRESSED:
            raise UserError(
                f"path={str(self.path)!r} is compressed: unpack it first. Choices: {', '.join(ENDINGS)}."
            )
        if not self.files():
            raise UserError(f"path={str(self.path)!r} holds no file that ends in {', '.join(ENDINGS)}.")

    @property
    def name(self) -> str:
        # Of `.` and `..` too.
        return self.path.name or self.path.resolve().name

    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        return sorted(p for p in self.path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())

    def identity(self) -> dict[str, Any]:
        """What must be as it was for an interrupted preparation to go on: the column, and the files as they stand."""
        stats = [(path, path.stat()) for path in self.files()]
        listed = [(str(path.relative_to(self.path)), s.st_size, s.st_mtime_ns) for path, s in stats]
        return {"text_column": self.text_column, "files": hashlib.sha256(repr(listed).encode()).hexdigest()}

    def documents(self, skip: int = 0, meter: Meter | None = None) -> Iterator[str | None]:
        """Every document after the first `skip`, None for a row without text; `meter` is kept at the bytes read.

        Raises `UserError` naming the file and the place of what cannot be read.
        """
        return itertools.islice(self._all(meter or Meter()), skip, None)

    def _all(self, meter: Meter) -> Iterator[str | None]:
        single = self.path.is_file()
        sizes = {path: path.stat().st_size for path in self.files()}
        meter.total = sum(sizes.values())
        for path, size in sizes.items():
            before = meter.done
            yield from self._of_file(path, single, meter)
            meter.done = before + size

    def _of_file(self, path: Path, single: bool, meter: Meter) -> Iterator[str | None]:
        form = ENDINGS.get(path.suffix.lower(), TEXT)
        if form == TEXT:
            parts = characters(path, self.errors, meter)
            # In a folder a text file is a document; alone it holds many.
            yield from split_text(parts) if single else whole(parts)
            return
        rows = (
            parquet_rows(path, self.text_column, meter)
            if form == PARQUET
            else json_rows(path, self.errors, meter)
        )
        for where, row in rows:
            text = text_of(row, self.text_column, str(path), where)
            yield from (None,) if text is None else cut(text)


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

    def identity(self) -> dict[str, Any]:
        """What must be as it was for an interrupted preparation to go on."""
        return {"text_column": self.text_column, "split": self.split}

    def documents(self, skip: int = 0, meter: Meter | None = None) -> Iterator[str | None]:
        """Every document after the first `skip`, None for a row without text; `meter` is kept at the rows read.

        Raises `UserError` in one line where the hub cannot be reached, and where a row has no such column.
        """
        return itertools.islice(self._all(meter or Meter()), skip, None)

    def _all(self, meter: Meter) -> Iterator[str | None]:
        try:
            import datasets

            # Its retries are many lines about what the one error says.
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
            stream = datasets.load_dataset(
                self.repository, self.configuration, split=self.split, streaming=True
            )
            meter.total = rows_of(stream, self.split)
            for number, row in enumerate(stream):
                meter.done += 1
                text = text_of(row, self.text_column, self.name, f"row {number}")
                yield from (None,) if text is None else cut(text)
        except UserError:
            raise
        except Exception as error:  # the hub's client has many kinds; all mean that the text did not come
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"source={self.name!r} could not be read from the Hugging Face hub ({type(error).__name__}: {what[:160]}). "
                "Without a network use a local file: scaling-lab prepare-data path=FILE (text, JSON lines or Parquet)."
            ) from None


def rows_of(stream: Any, split: str) -> int | None:
    """How many rows a streamed data set says that it has."""
    splits = getattr(getattr(stream, "info", None), "splits", None) or {}
    return getattr(splits.get(split), "num_examples", None) or None


def hub_text(source: str, text_column: str | None) -> HubText:
    """A preset, or OWNER/NAME[:CONFIGURATION] of the hub."""
    if source in PRESETS:
        repository, configuration, column = PRESETS[source]
        return HubText(repository, configuration, text_column or column)
    if "/" not in source:
        raise unknown("source", source, [*PRESETS, "OWNER/NAME of the hub"])
    repository, _, configuration = source.partition(":")
    return HubText(repository, configuration or None, text_column or "text")
