"""Document sources, in a fixed order: files and folders of text, JSON Lines and Parquet, or a dataset on the Hub."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.installation import require
from scaling_lab.corpora.reading import (
    ReadProgress,
    join_parts,
    json_rows,
    parquet_rows,
    read_characters,
    split_documents,
    split_long,
    text_of,
)

# Datasets with a short name: (repository, configuration, text column).
PRESETS: dict[str, tuple[str, str | None, str]] = {
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "openwebtext": ("Skylion007/openwebtext", None, "text"),
    "tinystories": ("roneneldan/TinyStories", None, "text"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
}
FORMATS = {
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
    """Documents of a file, or of all files in a folder in the order of their names."""

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
                f"path={str(self.path)!r} is compressed: unpack it first. Choices: {', '.join(FORMATS)}."
            )
        if not self.files():
            raise UserError(f"path={str(self.path)!r} contains no file that ends in {', '.join(FORMATS)}.")

    @property
    def name(self) -> str:
        # `.` and `..` have no name until resolved.
        return self.path.name or self.path.resolve().name

    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        return sorted(p for p in self.path.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())

    def identity(self) -> dict[str, Any]:
        """What must be unchanged to resume an interrupted preparation: the column and the state of the files."""
        stats = [(path, path.stat()) for path in self.files()]
        listed = [(str(path.relative_to(self.path)), s.st_size, s.st_mtime_ns) for path, s in stats]
        return {"text_column": self.text_column, "files": hashlib.sha256(repr(listed).encode()).hexdigest()}

    def documents(self, skip: int = 0, meter: ReadProgress | None = None) -> Iterator[str | None]:
        """All documents after the first `skip`, None for a row without text; updates `meter` with the bytes read.

        Raises `UserError` naming the file and the position of text that cannot be read.
        """
        return itertools.islice(self._read(meter or ReadProgress()), skip, None)

    def _read(self, meter: ReadProgress) -> Iterator[str | None]:
        single = self.path.is_file()
        sizes = {path: path.stat().st_size for path in self.files()}
        meter.total = sum(sizes.values())
        for path, size in sizes.items():
            before = meter.done
            yield from self._read_file(path, single, meter)
            meter.done = before + size

    def _read_file(self, path: Path, single: bool, meter: ReadProgress) -> Iterator[str | None]:
        form = FORMATS.get(path.suffix.lower(), TEXT)
        if form == TEXT:
            parts = read_characters(path, self.errors, meter)
            # In a folder each text file is one document; a single file contains many.
            yield from split_documents(parts) if single else join_parts(parts)
            return
        rows = (
            parquet_rows(path, self.text_column, meter)
            if form == PARQUET
            else json_rows(path, self.errors, meter)
        )
        for where, row in rows:
            text = text_of(row, self.text_column, str(path), where)
            yield from (None,) if text is None else split_long(text)


@dataclass(frozen=True)
class HubText:
    """A dataset on the Hugging Face Hub, streamed: only what is read is downloaded."""

    repository: str
    configuration: str | None
    text_column: str
    split: str = "train"

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.repository, self.configuration) if part)

    def identity(self) -> dict[str, Any]:
        """What must be unchanged to resume an interrupted preparation."""
        return {"text_column": self.text_column, "split": self.split}

    def documents(self, skip: int = 0, meter: ReadProgress | None = None) -> Iterator[str | None]:
        """All documents after the first `skip`, None for a row without text; updates `meter` with the rows read.

        Raises `UserError` if the Hub cannot be reached or a row does not have the text column.
        """
        return itertools.islice(self._read(meter or ReadProgress()), skip, None)

    def _read(self, meter: ReadProgress) -> Iterator[str | None]:
        try:
            import datasets

            # It logs each retry; the final error says it all.
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
            stream = datasets.load_dataset(
                self.repository, self.configuration, split=self.split, streaming=True
            )
            meter.total = row_count(stream, self.split)
            for number, row in enumerate(stream):
                meter.done += 1
                text = text_of(row, self.text_column, self.name, f"row {number}")
                yield from (None,) if text is None else split_long(text)
        except UserError:
            raise
        except Exception as error:  # the Hub's client raises many types
            what = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"source={self.name!r} could not be read from the Hugging Face Hub ({type(error).__name__}: {what[:160]}). "
                "Without a network use a local file: scaling-lab prepare-data path=FILE (text, JSON Lines or Parquet)."
            ) from None


def row_count(stream: Any, split: str) -> int | None:
    """Number of rows of a streamed dataset according to its metadata; None if it does not say."""
    splits = getattr(getattr(stream, "info", None), "splits", None) or {}
    return getattr(splits.get(split), "num_examples", None) or None


def hub_text(source: str, text_column: str | None) -> HubText:
    """A preset, or OWNER/NAME[:CONFIGURATION] on the Hub. Raises `UserError` where the package datasets is missing."""
    require("datasets", f"source={source}")
    if source in PRESETS:
        repository, configuration, column = PRESETS[source]
        return HubText(repository, configuration, text_column or column)
    if "/" not in source:
        raise unknown("source", source, [*PRESETS, "OWNER/NAME on the Hub"])
    repository, _, configuration = source.partition(":")
    return HubText(repository, configuration or None, text_column or "text")
