"""Owns the `prepared` source: a folder that `scaling-lab prepare-data` wrote, and the sidecar that describes it.

meta.json                 tokenizer and its hash, dtype, counts, source, checksums; written last
tokenizer.json            where the tokenizer is not bytes
train-00000.bin ...       flat token ids in `dtype`, little-endian; every shard but the last has `shard_tokens`
validation-00000.bin ...
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError

META = "meta.json"
META_VERSION = 1
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Prepared:
    """Token files with a sidecar, memory-mapped: never read as a whole."""

    kind: ClassVar[str] = "prepared"

    path: str = ""
    """The folder that prepare-data wrote."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "data.path is missing: data=prepared needs data.path=FOLDER (from scaling-lab prepare-data)."
            )

    @property
    def vocab_size(self) -> int:
        return int(_meta(self)["vocab_size"])

    @property
    def bytes_per_token(self) -> float | None:
        """Of the validation split, separators included: nats per token over this and ln 2 are bits per byte."""
        split = _meta(self)["splits"]["validation"]
        return float(split["bytes"] / split["tokens"])

    @property
    def tokenizer(self) -> str:
        """What decides the tokens' meaning: bytes, or the beginning of the tokenizer file's checksum."""
        found = _meta(self)["tokenizer"]
        return "bytes" if found["name"] == "bytes" else f"sha256 {found['sha256'][:12]}"

    def tokens(self, split: str) -> ShardedTokens:
        return _splits(self)[0 if split == "train" else 1]

    def n_tokens(self, split: str) -> int:
        return int(_meta(self)["splits"][split]["tokens"])

    def fingerprint(self) -> str:
        """sha256 over the shards' checksums: equal fingerprints mean the same tokens in the same order."""
        return str(_meta(self)["content_sha256"])


class ShardedTokens:
    """Several memory-mapped files as one flat array: `size`, `dtype`, slices and integer arrays."""

    def __init__(self, shards: list[NDArray[np.integer]], shard_tokens: int) -> None:
        self._shards, self._shard_tokens = shards, shard_tokens
        self.size = sum(int(shard.size) for shard in shards)
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> NDArray[np.integer]:
        """Tokens of a slice, or at an integer array of any shape."""
        if isinstance(at, slice):
            at = np.arange(*at.indices(self.size))
        places = np.asarray(at)
        if len(self._shards) == 1:
            return np.asarray(self._shards[0][places])
        out = np.empty(places.shape, dtype=self.dtype)
        which = places // self._shard_tokens
        for k in np.unique(which):
            here = which == k
            out[here] = self._shards[k][places[here] - k * self._shard_tokens]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.integer]:
        whole = np.concatenate(self._shards)
        return whole if dtype is None else whole.astype(dtype)


@cache
def _meta(source: Prepared) -> dict[str, Any]:
    path = Path(source.path).expanduser() / META
    if not path.is_file():
        unfinished = (path.parent / "progress.json").is_file()
        why = "is not finished: repeat the prepare-data command" if unfinished else f"has no {META}"
        raise UserError(f"data.path={source.path!r} {why} (scaling-lab prepare-data writes such a folder).")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format_version"] != META_VERSION:
            raise UserError(
                f"data.path={source.path!r}: format version {meta['format_version']}, this version reads {META_VERSION}."
            )
        if meta["dtype"] not in DTYPES:
            raise UserError(
                f"data.path={source.path!r}: dtype {meta['dtype']!r} in {META}. Choices: {', '.join(DTYPES)}."
            )
        if meta["vocab_size"] > np.iinfo(meta["dtype"]).max + 1:
            raise UserError(
                f"data.path={source.path!r}: a vocabulary of {meta['vocab_size']} does not fit dtype {meta['dtype']}."
            )
        _ = (
            meta["content_sha256"],
            meta["tokenizer"]["name"],
            meta["tokenizer"]["sha256"],
            meta["shard_tokens"],
            meta["splits"]["train"],
            meta["splits"]["validation"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data.path={source.path!r}: {META} cannot be read ({type(error).__name__}: {error})."
        ) from None
    return dict(meta)


@cache
def _splits(source: Prepared) -> tuple[ShardedTokens, ShardedTokens]:
    meta = _meta(source)
    return _open(source, meta, "train"), _open(source, meta, "validation")


def _open(source: Prepared, meta: dict[str, Any], split: str) -> ShardedTokens:
    folder, dtype = Path(source.path).expanduser(), np.dtype(meta["dtype"]).newbyteorder("<")
    shards: list[NDArray[np.integer]] = []
    for shard in meta["splits"][split]["shards"]:
        path = folder / shard["file"]
        wanted = shard["tokens"] * dtype.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            state = "is missing" if found is None else f"has {found} bytes instead of {wanted}"
            raise UserError(f"data.path={source.path!r}: {shard['file']} {state}; prepare it again.")
        if shard["tokens"]:
            shards.append(np.memmap(path, dtype=dtype, mode="r"))
    if not shards:
        raise UserError(f"data.path={source.path!r}: the {split} split is empty.")
    _check_range(source, shards, split, int(meta["vocab_size"]), int(meta["shard_tokens"]))
    return ShardedTokens(shards, int(meta["shard_tokens"]))


def _check_range(
    source: Prepared, shards: list[NDArray[np.integer]], split: str, vocab_size: int, shard_tokens: int
) -> None:
    """The last shard's end is looked at: a whole check is `content_check`'s, which reads every byte."""
    tail = np.asarray(shards[-1][-(1 << 20) :])
    if tail.max() >= vocab_size:
        first = int(np.flatnonzero(tail >= vocab_size)[0])
        at = (len(shards) - 1) * shard_tokens + shards[-1].size - tail.size + first
        raise UserError(
            f"data.path={source.path!r}: token {int(tail[first])} at index {at} of the {split} split, outside the "
            f"vocabulary of {vocab_size}."
        )


def shard_sha256(path: Path) -> str:
    """Checksum of one shard."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(shard_sums: list[str]) -> str:
    """One checksum over those of all shards, train first."""
    return hashlib.sha256("".join(shard_sums).encode()).hexdigest()


def content_check(path: str) -> list[str]:
    """What is wrong with a prepared folder, each shard read as a whole; empty where nothing is."""
    source = Prepared(path)
    meta, bad = _meta(source), []
    for split in ("train", "validation"):
        for shard in meta["splits"][split]["shards"]:
            if shard_sha256(Path(path).expanduser() / shard["file"]) != shard["sha256"]:
                bad.append(f"{shard['file']} is not what was written (its checksum differs)")
    return bad
