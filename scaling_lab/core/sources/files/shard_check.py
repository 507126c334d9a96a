"""Verification of token shards: each matches its checksum, and every token is inside the vocabulary.

Reading every byte of 10 billion tokens takes a minute, so verified files are cached in the user's cache folder, keyed by
location, size and modification time, and not read again until one of these changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.storage.files import write_atomic

# Tokens read at once: 8 to 16 MB.
BLOCK_TOKENS = 1 << 22
MAX_PARALLEL_CHECKS = 8
# Environment variable for the cache folder; default ~/.cache/scaling_lab.
CACHE_VARIABLE = "SCALING_LAB_CACHE_DIR"


def cache_folder() -> Path:
    """What is kept between commands on this machine and belongs to no sweep."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/scaling_lab").expanduser()


@dataclass(frozen=True)
class Shard:
    """One file of flat token ids, memory-mapped, and its expected checksum."""

    path: Path
    tokens: NDArray[np.integer]
    sha256: str


@dataclass(frozen=True)
class Fault:
    """What is wrong with one shard."""

    shard: int
    """Position of the shard in the sequence that was checked."""
    token: int | None = None
    """The first token outside the vocabulary; None if all are inside but the checksum differs."""
    index: int | None = None
    """Index of that token in its shard."""


def find_fault(shards: Sequence[Shard], vocab_size: int, *, again: bool = False) -> Fault | None:
    """The first fault of some shards, tokens outside the vocabulary before wrong checksums; None if there is none.

    Args:
        again: also read shards that were verified before.
    """
    stamps = {k: _stamp(shard, vocab_size) for k, shard in enumerate(shards)}
    verified = set() if again else _load_verified(shards)
    todo = [k for k in stamps if stamps[k] not in verified]
    # Hashing and NumPy release the GIL, so threads run in parallel.
    workers = max(1, min(MAX_PARALLEL_CHECKS, os.cpu_count() or 1, len(todo)))
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        found = list(pool.map(lambda k: _check(k, shards[k], vocab_size), todo))
    faults = [fault for fault in found if fault is not None]
    if faults:
        return min(faults, key=lambda fault: (fault.token is None, fault.shard))
    if todo:
        _save_verified(shards, set(stamps.values()))
    return None


def _check(position: int, shard: Shard, vocab_size: int) -> Fault | None:
    digest = hashlib.sha256()
    for start in range(0, shard.tokens.size, BLOCK_TOKENS):
        block = np.ascontiguousarray(shard.tokens[start : start + BLOCK_TOKENS])
        if block.max() >= vocab_size:
            at = int(np.flatnonzero(block >= vocab_size)[0])
            return Fault(position, int(block[at]), start + at)
        digest.update(block.data)
    return None if digest.hexdigest() == shard.sha256 else Fault(position)


def _stamp(shard: Shard, vocab_size: int) -> str:
    """One line that identifies a file's state and the check."""
    stat = shard.path.stat()
    return f"{shard.path.name} {stat.st_size} {stat.st_mtime_ns} {shard.sha256} {shard.tokens.dtype.str} below {vocab_size}"


def _cache_file(shards: Sequence[Shard]) -> Path:
    folder = str(shards[0].path.parent.resolve())
    return cache_folder() / "checked" / f"{hashlib.sha256(folder.encode()).hexdigest()[:32]}.json"


def _load_verified(shards: Sequence[Shard]) -> set[str]:
    """Stamps of verified files; empty if the cache cannot be read."""
    try:
        return {str(stamp) for stamp in json.loads(_cache_file(shards).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RuntimeError, IndexError):
        return set()


def _save_verified(shards: Sequence[Shard], stamps: set[str]) -> None:
    """If the cache cannot be written (no home folder, full disk), the next process checks again."""
    try:
        path = _cache_file(shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(sorted(stamps)), durable=False)
    except (OSError, RuntimeError, IndexError):
        pass
