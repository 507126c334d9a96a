"""Generated corpora: documents as a pure function of (split, index), with known probabilities.

A training window is one document from its start, so a model sees everything that the true distribution conditions on, and
the mean of -log_probs over the validation windows is a lower bound on the loss of any model.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

# Size of an unlimited split: far beyond any run, while the number of windows still fits in 64 bits.
UNLIMITED_TOKENS = 1 << 60
# Documents whose probabilities are computed at once.
FLOOR_BLOCK = 4096


@runtime_checkable
class GeneratedSource(Protocol):
    """A token source whose documents are generated on the fly, in any order, the same on every machine."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    def documents(self, split: str, indices: NDArray[np.integer], length: int) -> NDArray[np.int32]:
        """The first `length` tokens of documents `indices` of a split, (n, length); the first token is always the same."""
        ...

    def log_probs(self, documents: NDArray[np.integer]) -> NDArray[np.float64]:
        """True ln p of each token after the first given the preceding ones, nats: (n, length) -> (n, length - 1)."""
        ...

    def entropy_nats(self, length: int) -> float | None:
        """Mean entropy per predicted token of documents of `length` tokens; None if no exact value is known."""
        ...


def floor_nats(source: GeneratedSource, documents: NDArray[np.integer]) -> NDArray[np.float64]:
    """Mean true -ln p per predicted token of each document, (n,) nats: the loss of an oracle."""
    parts = [
        -source.log_probs(documents[start : start + FLOOR_BLOCK]).mean(1)
        for start in range(0, len(documents), FLOOR_BLOCK)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def text_documents(
    tokens: NDArray[np.integer], indices: NDArray[np.integer], length: int
) -> NDArray[np.integer]:
    """Windows of a text as documents, (n, length): window i of `length` tokens, wrapping around after the last.

    Raises ValueError for a text shorter than one window.
    """
    count = tokens.size // length
    if count < 1:
        raise ValueError(f"a text of {tokens.size} tokens is shorter than one window of {length}")
    starts = (np.asarray(indices, dtype=np.uint64) % np.uint64(count)).astype(np.int64) * length
    return np.asarray(tokens[starts[:, None] + np.arange(length)])


def has_known_probabilities(source: object) -> bool:
    """Whether the loss floor of a source is known: it has `log_probs`, and so do its components, if any."""
    parts = getattr(source, "sources", ())
    return hasattr(source, "log_probs") and all(has_known_probabilities(part) for part in parts)
