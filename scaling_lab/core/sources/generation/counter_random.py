"""Counter-based random numbers: pure functions of integers, without state, the same on every machine and in any order.

In generated corpora token t of document i depends only on (seed, split, i, t).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Finalizer constants and increment of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
MIX_1, MIX_2, GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, a bijection of 64-bit integers; relies on wraparound modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def stream_key(*parts: object) -> int:
    """A 64-bit key for a stream of draws, from values with a stable string form: a seed, a split, a name."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(f"scaling_lab {text}".encode()).digest()[:8], "little")


def draw_u64(key: int, *counters: ArrayLike) -> NDArray[np.uint64]:
    """Uniform 64-bit integers at `counters` (integer arrays, broadcast together) of the stream `key`."""
    x = np.full(np.broadcast_shapes(*(np.shape(c) for c in counters)), key, dtype=np.uint64)
    for counter in counters:
        x = mix(x + np.asarray(counter, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(GOLDEN))
    return x


def draw_u32(key: int, *counters: ArrayLike) -> NDArray[np.uint32]:
    """The upper half of `draw_u64`: uniform 32-bit integers."""
    return (draw_u64(key, *counters) >> np.uint64(32)).astype(np.uint32)
