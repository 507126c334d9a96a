"""The `prepared` source: a folder written by `scaling-lab prepare-data`, and its metadata.

meta.json                 tokenizer and its hash, dtype, counts, source, checksums; written last
tokenizer.json            unless the tokenizer is bytes
train-00000.bin ...       flat token ids in `dtype`, little-endian; every shard but the last has `shard_tokens` tokens
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

from scaling_lab.core.errors import MissingCorpus, UserError
from scaling_lab.core.sources.files.shard_check import Shard, find_fault

META = "meta.json"
META_VERSION = 1
DTYPES = ("uint16", "uint32")
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Prepared:
    """Token files with metadata, memory-mapped rather than loaded."""

    kind: ClassVar[str] = "prepared"

    path: str = ""
    """The folder written by prepare-data."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "data.path is missing: data=prepared requires data.path=FOLDER (from scaling-lab prepare-data)."
            )

    @property
    def vocab_size(self) -> int:
        return int(_meta(self)["vocab_size"])

    @property
    def bytes_per_token(self) -> float | None:
        """Of the validation split, counting separators as tokens. Bits per byte = nats per token / (this * ln 2)."""
        split = _meta(self)["splits"]["validation"]
        return float(split["bytes"] / split["tokens"])

    @property
    def tokenizer(self) -> str:
        """Identifies the tokenizer: bytes, or the first digits of the tokenizer file's checksum."""
        found = _meta(self)["tokenizer"]
        return "bytes" if found["name"] == "bytes" else f"sha256 {found['sha256'][:12]}"

    @property
    def tokenizer_file(self) -> Path:
        """Where its tokenizer is, unless that is bytes."""
        return Path(self.path).expanduser() / "tokenizer.json"

    def tokens(self, split: str) -> ShardedTokens:
        return _splits(self)[0 if split == "train" else 1]

    def n_tokens(self, split: str) -> int:
        return self.tokens(split).size

    def fingerprint(self) -> str:
        """sha256 of the shards' checksums: equal fingerprints mean the same tokens in the same order.

        Raises `UserError` if the shards do not match their checksums.
        """
        _splits(self)
        return str(_meta(self)["content_sha256"])


class ShardedTokens:
    """Several memory-mapped files as one flat array with `size`, `dtype`, and indexing by slices and integer arrays."""

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
        index = np.asarray(at)
        if len(self._shards) == 1:
            return np.asarray(self._shards[0][index])
        out = np.empty(index.shape, dtype=self.dtype)
        shard = index // self._shard_tokens
        for k in np.unique(shard):
            here = shard == k
            out[here] = self._shards[k][index[here] - k * self._shard_tokens]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.integer]:
        whole = np.concatenate(self._shards)
        return whole if dtype is None else whole.astype(dtype)


@cache
def _meta(source: Prepared) -> dict[str, Any]:
    path = Path(source.path).expanduser() / META
    if not path.is_file():
        unfinished = (path.parent / "progress.json").is_file()
        why = "is incomplete: repeat the prepare-data command" if unfinished else f"has no {META}"
        raise MissingCorpus(
            f"data.path={source.path!r} {why} (expected a folder from scaling-lab prepare-data)."
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format_version"] != META_VERSION:
            raise UserError(
                f"data.path={source.path!r} has format version {meta['format_version']}; this version of scaling-lab reads "
                f"{META_VERSION}."
            )
        if meta["dtype"] not in DTYPES:
            raise UserError(
                f"data.path={source.path!r}: {META} has an unknown dtype {meta['dtype']!r}. Choices: {', '.join(DTYPES)}."
            )
        if meta["vocab_size"] > np.iinfo(meta["dtype"]).max + 1:
            raise UserError(
                f"data.path={source.path!r}: a vocabulary of {meta['vocab_size']} does not fit in dtype {meta['dtype']}."
            )
        _ = meta["tokenizer"]["name"], meta["tokenizer"]["sha256"]
        if wrong := _contradiction(meta):
            raise UserError(f"data.path={source.path!r}: {META} is inconsistent: {wrong}.")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.path={source.path!r}: {META} cannot be read ({type(error).__name__}: {error})."
        ) from None
    return dict(meta)


def _contradiction(meta: dict[str, Any]) -> str | None:
    """An internal inconsistency of the metadata; None if there is none."""
    full = meta["shard_tokens"]
    for split in SPLITS:
        shards = meta["splits"][split]["shards"]
        if len({s["file"] for s in shards}) < len(shards):
            return f"a file is listed twice in the {split} split"
        if any(s["tokens"] != full for s in shards[:-1]) or any(not 0 <= s["tokens"] <= full for s in shards):
            return f"a shard of the {split} split does not have shard_tokens={full} tokens"
        if sum(s["tokens"] for s in shards) != meta["splits"][split]["tokens"]:
            return f"the {split} split does not have {meta['splits'][split]['tokens']} tokens"
    checksums = [s["sha256"] for split in SPLITS for s in meta["splits"][split]["shards"]]
    if content_sha256(checksums) != meta["content_sha256"]:
        return "content_sha256 does not match the shards' checksums"
    return None


@cache
def _splits(source: Prepared) -> tuple[ShardedTokens, ShardedTokens]:
    meta = _meta(source)
    shards = {split: _open(source, meta, split) for split in SPLITS}
    _check(source, meta, shards, again=False)
    train, validation = (
        ShardedTokens([shard.tokens for shard in shards[split]], int(meta["shard_tokens"]))
        for split in SPLITS
    )
    return train, validation


def _open(source: Prepared, meta: dict[str, Any], split: str) -> list[Shard]:
    folder, dtype = Path(source.path).expanduser(), np.dtype(meta["dtype"]).newbyteorder("<")
    shards: list[Shard] = []
    for shard in meta["splits"][split]["shards"]:
        path = folder / shard["file"]
        expected = shard["tokens"] * dtype.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise UserError(f"data.path={source.path!r}: {shard['file']} {state}; prepare it again.")
        if shard["tokens"]:
            shards.append(Shard(path, np.memmap(path, dtype=dtype, mode="r"), str(shard["sha256"])))
    if not shards:
        raise UserError(f"data.path={source.path!r}: the {split} split is empty.")
    return shards


def _check(source: Prepared, meta: dict[str, Any], shards: dict[str, list[Shard]], *, again: bool) -> None:
    """Raise `UserError` for a token outside the vocabulary or a file that does not match its checksum."""
    everything = [(split, k, shard) for split in SPLITS for k, shard in enumerate(shards[split])]
    fault = find_fault([shard for _, _, shard in everything], int(meta["vocab_size"]), again=again)
    if fault is None:
        return
    split, k, shard = everything[fault.shard]
    if fault.index is None:
        raise UserError(
            f"data.path={source.path!r}: {shard.path.name} has changed since it was written (its checksum differs); prepare "
            "it again."
        )
    at = k * int(meta["shard_tokens"]) + fault.index
    raise UserError(
        f"data.path={source.path!r}: token {fault.token} at index {at} of the {split} split ({shard.path.name}) is outside "
        f"the vocabulary of {meta['vocab_size']}."
    )


def verify(path: str) -> dict[str, Any]:
    """Check every file of a prepared folder, ignoring cached results; returns the metadata.

    Raises `UserError` naming the first token outside the vocabulary or the first file that does not match its checksum.
    """
    source = Prepared(path)
    meta = _meta(source)
    _check(source, meta, {split: _open(source, meta, split) for split in SPLITS}, again=True)
    return meta


def shard_sha256(path: Path) -> str:
    """Checksum of a shard."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(shard_sums: list[str]) -> str:
    """Checksum of all shards' checksums, train first."""
    return hashlib.sha256("".join(shard_sums).encode()).hexdigest()
