"""Files of a preparation: shards, which are appended to, and saved progress, from which an interrupted one resumes.

On resuming, shards are truncated to the last saved progress, so that an interrupted preparation produces the same bytes as
an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.prepared import META, META_VERSION, content_sha256, shard_sha256
from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps

PROGRESS = "progress.json"
# Raise it when the same text would be split into different documents, since `documents_read` counts them.
PROGRESS_VERSION = 2
SPLITS = ("train", "validation")


@dataclass
class SplitCount:
    """Content of a split so far."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass
class Counts:
    """Progress of a preparation; a function of the documents read."""

    documents_read: int = 0
    duplicates: int = 0
    """Duplicate validation documents, which are dropped."""
    without_text: int = 0
    """Rows whose text is null, which are dropped."""
    train: SplitCount = field(default_factory=SplitCount)
    validation: SplitCount = field(default_factory=SplitCount)

    @property
    def tokens(self) -> int:
        """Tokens of both splits."""
        return self.train.tokens + self.validation.tokens

    def split(self, name: str) -> SplitCount:
        return self.train if name == "train" else self.validation


class ShardWriter:
    """Appends tokens to <split>-<k>.bin; each full shard has exactly `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, written: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._written = written
        self._truncate()
        self._file = open(self._path(self._written // shard_tokens), "ab")  # noqa: SIM115  closed by `close`

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._split}-{shard:05d}.bin"

    def _truncate(self) -> None:
        """Remove what an interrupted preparation wrote after its last saved progress."""
        current = self._written // self._shard_tokens
        for path in self._folder.glob(f"{self._split}-*.bin"):
            if path.name > self._path(current).name:
                path.unlink()
        path = self._path(current)
        path.touch()
        os.truncate(path, (self._written % self._shard_tokens) * self._dtype.itemsize)

    def append(self, tokens: NDArray[np.integer]) -> None:
        while tokens.size:
            room = self._shard_tokens - self._written % self._shard_tokens
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.astype(self._dtype, copy=False).tobytes())
            self._written += part.size
            if part.size == room:
                self.flush()
                self._file.close()
                self._file = open(self._path(self._written // self._shard_tokens), "ab")  # noqa: SIM115

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> list[dict[str, Any]]:
        """Finish writing; returns name, tokens and checksum of every shard."""
        self.flush()
        self._file.close()
        found = []
        for path in sorted(self._folder.glob(f"{self._split}-*.bin")):
            tokens = path.stat().st_size // self._dtype.itemsize
            if tokens == 0:
                path.unlink()
                continue
            found.append({"file": path.name, "tokens": tokens, "sha256": shard_sha256(path)})
        return found


def save_progress(folder: Path, counts: Counts, settings: dict[str, Any], identity: dict[str, Any]) -> None:
    """Save progress. `identity` is only needed to resume; unlike `settings` it does not become part of the metadata."""
    data = {"version": PROGRESS_VERSION, "settings": settings, "identity": identity, "counts": asdict(counts)}
    write_atomic(folder / PROGRESS, dumps(data))


def load_progress(folder: Path) -> tuple[Counts, dict[str, Any]] | None:
    """Counts, and settings with identity, of an interrupted preparation; None if there is none.

    Raises `UserError` if it was made by a version of this package that splits text into documents differently.
    """
    try:
        data = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        version, raw = data.get("version"), dict(data["counts"])
        train, validation = SplitCount(**raw.pop("train")), SplitCount(**raw.pop("validation"))
        counts, begun_with = Counts(**raw, train=train, validation=validation), dict(data["settings"])
        begun_with |= data.get("identity", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if version != PROGRESS_VERSION:
        raise UserError(
            f"out={str(folder)!r} was started by another version of scaling_lab. Give another folder, or remove it."
        )
    return counts, begun_with


def write_meta(
    folder: Path,
    counts: Counts,
    shards: dict[str, list[dict[str, Any]]],
    settings: dict[str, Any],
    tokenizer: dict[str, Any],
    dtype: str,
    shard_tokens: int,
) -> dict[str, Any]:
    """Write the metadata, when everything else is complete, and return it."""
    meta: dict[str, Any] = {
        "format_version": META_VERSION,
        "source": settings["source"],
        "settings": settings,
        "tokenizer": {key: tokenizer[key] for key in ("name", "sha256", "separator")},
        "vocab_size": tokenizer["vocab_size"],
        "dtype": dtype,
        "shard_tokens": shard_tokens,
        "documents_read": counts.documents_read,
        "duplicates": counts.duplicates,
        "without_text": counts.without_text,
        "splits": {name: {**asdict(counts.split(name)), "shards": shards[name]} for name in SPLITS},
        "content_sha256": content_sha256([s["sha256"] for name in SPLITS for s in shards[name]]),
    }
    write_atomic(folder / META, dumps(meta))
    return meta
