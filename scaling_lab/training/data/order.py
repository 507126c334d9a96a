"""The order of training data: which window of the corpus a run sees at which position.

A batch is a pure function of (seed, position): any step of any run can be rebuilt without the steps before it, so
resuming needs no state. Within an epoch no window is repeated; each epoch has its own order.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.sources.generation.counter_random import mix

# Four rounds of a Feistel network turn a pseudorandom function into a pseudorandom permutation (Luby & Rackoff 1988).
FEISTEL_ROUNDS = 4


class WindowOrder:
    """A pseudorandom order of `n_windows` windows for each epoch, in O(1) memory (no table of the permutation)."""

    def __init__(self, n_windows: int, seed: int) -> None:
        if n_windows < 1:
            raise ValueError(f"n_windows={n_windows} must be at least 1")
        self.n_windows = n_windows
        self.seed = seed
        # The network permutes numbers of 2 * half bits; results beyond n_windows are permuted again (cycle walking).
        self._half_bits = max(1, (max(1, n_windows - 1).bit_length() + 1) // 2)

    def windows(self, first: int, count: int) -> NDArray[np.int64]:
        """Window indices at positions first .. first + count - 1 of the run, (count,)."""
        positions = np.arange(first, first + count, dtype=np.int64)
        out = np.empty(count, dtype=np.int64)
        epochs = positions // self.n_windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permute(positions[here] - epoch * self.n_windows, int(epoch))
        return out

    def _permute(self, values: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        keys = self._round_keys(epoch)
        x = self._feistel(values.astype(np.uint64), keys)
        outside = x >= self.n_windows
        while outside.any():
            x[outside] = self._feistel(x[outside], keys)
            outside = x >= self.n_windows
        return x.astype(np.int64)

    def _round_keys(self, epoch: int) -> list[np.uint64]:
        digest = hashlib.sha256(f"scaling_lab order {self.seed} {epoch}".encode()).digest()
        return [np.uint64(int.from_bytes(digest[8 * i : 8 * i + 8], "little")) for i in range(FEISTEL_ROUNDS)]

    def _feistel(self, x: NDArray[np.uint64], keys: list[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = x >> bits, x & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << bits) | right


def n_windows(n_tokens: int, context: int) -> int:
    """Number of windows of `context` inputs in a corpus; a window's last target is the next window's first input."""
    return (n_tokens - 1) // context
