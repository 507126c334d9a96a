"""Owns checking token shards: that each is what was written, and every token a row of the vocabulary.

Reading every byte of 10 billion tokens takes a minute, so what was found good is remembered in the user's cache folder
by each file's place, size and time of change, and not read again until one of them differs.
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

# Tokens that are looked at together, then forgotten: 8 to 16 MB.
BLOCK_TOKENS = 1 << 22
CHECKS_AT_ONCE = 8
# Of the environment: where to remember, if not in ~/.cache/scaling_lab.
CACHE_VARIABLE = "SCALING_LAB_CACHE_DIR"


@dataclass(frozen=True)
class Shard:
    """One file of flat token ids, memory-mapped, and what is said about it."""

    path: Path
    tokens: NDArray[np.integer]
    sha256: str


@dataclass(frozen=True)
class Fault:
    """What is wrong with one shard."""

    shard: int
    """Its place in the sequence that was checked."""
    token: int | None = None
    """The first that is outside the vocabulary; None: all are inside, but the checksum differs."""
    index: int | None = None
    """Of that token in its shard."""


def find_fault(shards: Sequence[Shard], vocab_size: int, *, again: bool = False) -> Fault | None:
    """The first thing wrong with some shards: a token outside the vocabulary before a wrong checksum; None: nothing.

    Args:
        again: read also what was found good before.
    """
    stamps = {k: _stamp(shard, vocab_size) for k, shard in enumerate(shards)}
    remembered = set() if again else _remembered(shards)
    todo = [k for k in stamps if stamps[k] not in remembered]
    # Checksums and maxima leave Python free: several shards at a time are limited by the memory alone.
    workers = max(1, min(CHECKS_AT_ONCE, os.cpu_count() or 1, len(todo)))
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        found = list(pool.map(lambda k: _check(k, shards[k], vocab_size), todo))
    faults = [fault for fault in found if fault is not None]
    if faults:
        return min(faults, key=lambda fault: (fault.token is None, fault.shard))
    if todo:
        _remember(shards, set(stamps.values()))
    return None


def _check(place: int, shard: Shard, vocab_size: int) -> Fault | None:
    digest = hashlib.sha256()
    for start in range(0, shard.tokens.size, BLOCK_TOKENS):
        block = np.ascontiguousarray(shard.tokens[start : start + BLOCK_TOKENS])
        if block.max() >= vocab_size:
            at = int(np.flatnonzero(block >= vocab_size)[0])
            return Fault(place, int(block[at]), start + at)
        digest.update(block.data)
    return None if digest.hexdigest() == shard.sha256 else Fault(place)


def _stamp(shard: Shard, vocab_size: int) -> str:
    """What was checked of which state of a file, as one line."""
    stat = shard.path.stat()
    return f"{shard.path.name} {stat.st_size} {stat.st_mtime_ns} {shard.sha256} {shard.tokens.dtype.str} below {vocab_size}"


def _memory(shards: Sequence[Shard]) -> Path:
    base = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/scaling_lab").expanduser()
    folder = str(shards[0].path.parent.resolve())
    return base / "checked" / f"{hashlib.sha256(folder.encode()).hexdigest()[:32]}.json"


def _remembered(shards: Sequence[Shard]) -> set[str]:
    """Stamps of what was found good; none where that cannot be read."""
    try:
        return {str(stamp) for stamp in json.loads(_memory(shards).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RuntimeError, IndexError):
        return set()


def _remember(shards: Sequence[Shard], stamps: set[str]) -> None:
    """Where nothing can be written (no home, a full disk), the next process checks again."""
    try:
        path = _memory(shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(sorted(stamps)), durable=False)
    except (OSError, RuntimeError, IndexError):
        pass
