"""Owns what a generated corpus is: documents as a pure function of (split, index), with known probabilities.

A training window is one document from its beginning, so a model sees all that the true distribution conditions on, and
the mean of -log_probs over the validation windows is the loss that no model gets below.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

# Tokens of a split that has no end: far beyond any run, and its number of windows still fits 64 bits.
UNLIMITED_TOKENS = 1 << 60
# Documents whose probabilities are worked out at a time.
FLOOR_BLOCK = 4096


@runtime_checkable
class GeneratedSource(Protocol):
    """A token source whose documents are generated on the fly, in any order, alike on every machine."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    def documents(self, split: str, indices: NDArray[np.integer], length: int) -> NDArray[np.int32]:
        """Documents `indices` of a split, (n, length), from their beginning; the first token is always the same."""
        ...

    def log_probs(self, documents: NDArray[np.integer]) -> NDArray[np.float64]:
        """True ln p of each token after the first given those before it, nats: (n, length) -> (n, length - 1)."""
        ...

    def entropy_nats(self, length: int) -> float | None:
        """Mean entropy per predicted token of documents of `length` tokens; None where no exact value is known."""
        ...


def floor_nats(source: GeneratedSource, documents: NDArray[np.integer]) -> NDArray[np.float64]:
    """Mean true -ln p per predicted token of each document, (n,) nats: what an oracle's loss on them is."""
    parts = [
        -source.log_probs(documents[start : start + FLOOR_BLOCK]).mean(1)
        for start in range(0, len(documents), FLOOR_BLOCK)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def text_documents(
    tokens: NDArray[np.integer], indices: NDArray[np.integer], length: int
) -> NDArray[np.integer]:
    """Windows of a text as documents, (n, length): window i of its length, from the beginning again after the last.

    Raises ValueError for a text shorter than one window.
    """
    count = tokens.size // length
    if count < 1:
        raise ValueError(f"a text of {tokens.size} tokens is shorter than one window of {length}")
    starts = (np.asarray(indices, dtype=np.uint64) % np.uint64(count)).astype(np.int64) * length
    return np.asarray(tokens[starts[:, None] + np.arange(length)])


def knows_its_probabilities(source: object) -> bool:
    """Whether the floor of a source's loss is known: it has `log_probs`, and if it is made of others, they have too."""
    parts = getattr(source, "sources", ())
    return hasattr(source, "log_probs") and all(knows_its_probabilities(part) for part in parts)
