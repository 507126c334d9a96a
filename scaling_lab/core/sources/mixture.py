"""The `mixture` source: each document is drawn from one of several sources, with fixed weights.

If all components have known probabilities, so does the mixture: its loss floor is the mean of -ln sum_i w_i p_i(document),
not the mean of the components' floors, because a model has to infer which source a document is from.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources import parse_source
from scaling_lab.core.sources.generation.counter_random import draw_u32, stream_key
from scaling_lab.core.sources.generation.documents import (
    UNLIMITED_TOKENS,
    has_known_probabilities,
    text_documents,
)
from scaling_lab.core.sources.generation.integer_zipf import ONE


@dataclass(frozen=True)
class Mixture:
    """Documents of several sources in one vocabulary; all start with the same token, the last of the vocabulary."""

    kind: ClassVar[str] = "mixture"

    sources: tuple[Any, ...] = ()
    """Names of sources, or {kind: NAME, option: value, ...}."""
    weights: tuple[float, ...] = ()
    """Fraction of the documents from each source; empty: equal fractions."""
    seed: int = 0
    """Seed of the choice of each document's source."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(
                "data.sources is missing: data=mixture requires data.sources=[NAME,...] or [{kind: NAME, ...},...]."
            )
        object.__setattr__(self, "sources", tuple(_part(s) for s in self.sources))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(
                f"data.weights={list(self.weights)} has {len(self.weights)} values for {len(self.sources)} data.sources."
            )
        if any(not 0 < w < float("inf") for w in self.weights):
            raise UserError(f"data.weights={list(self.weights)} must be positive.")

    @property
    def vocab_size(self) -> int:
        return max(source.vocab_size for source in self.sources) + 1

    @property
    def bytes_per_token(self) -> float | None:
        each = {source.bytes_per_token for source in self.sources}
        return each.pop() if len(each) == 1 else None

    def shares(self) -> NDArray[np.float64]:
        """Exact probability of each source, an integer over 2^32, (sources,)."""
        return np.diff(np.concatenate([[0], self.cumulative_shares()])) / ONE

    def n_tokens(self, split: str) -> int:
        return UNLIMITED_TOKENS

    def source_indices(self, split: str, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Index of each document's source, (n,)."""
        key = stream_key("mixture", self.seed, split)
        draws = draw_u32(key, np.asarray(indices, dtype=np.uint64))
        return np.searchsorted(self.cumulative_shares(), draws, side="right").astype(np.int64)

    def documents(self, split: str, indices: NDArray[np.integer], length: int) -> NDArray[np.int32]:
        """Documents `indices` of a split, (n, length): the mixture's first token, then a source's document without its own."""
        indices = np.asarray(indices, dtype=np.uint64)
        out = np.full((indices.size, length), self.vocab_size - 1, dtype=np.int32)
        chosen = self.source_indices(split, indices)
        for i, source in enumerate(self.sources):
            here = chosen == i
            if here.any():
                out[here, 1:] = _documents(source, split, indices[here], length)[:, 1:]
        return out

    def log_probs(self, documents: NDArray[np.integer]) -> NDArray[np.float64]:
        """True ln p of each token after the first given the preceding ones, nats: (n, length) -> (n, length - 1)."""
        prefix = self._log_prefix(documents)
        before = np.concatenate([np.zeros((len(prefix), 1)), prefix[:, :-1]], axis=1)
        # After an impossible token every conditional probability is undefined: -inf as well.
        return np.where(np.isfinite(prefix), prefix, -np.inf) - np.where(np.isfinite(before), before, 0.0)

    def entropy_nats(self, length: int) -> float | None:
        """None: a mixture's entropy has no closed form. On given documents the floor is exact; see `log_probs`."""
        return None

    def fingerprint(self) -> str:
        """sha256 of the sources' fingerprints, their shares and the first draws."""
        digest = hashlib.sha256("".join(source.fingerprint() for source in self.sources).encode())
        digest.update(self.cumulative_shares().tobytes())
        for split in ("train", "validation"):
            digest.update(self.source_indices(split, np.arange(64)).tobytes())
        return digest.hexdigest()

    def cumulative_shares(self) -> NDArray[np.uint64]:
        """Cumulative shares times 2^32, (sources,)."""
        weights = self.weights or (1.0,) * len(self.sources)
        # Summed sequentially, so that vectorized summation cannot change the last bit between machines.
        sums = list(itertools.accumulate(weights))
        return np.array([*(int(ONE * (s / sums[-1])) for s in sums[:-1]), ONE], dtype=np.uint64)

    def _log_prefix(self, documents: NDArray[np.integer]) -> NDArray[np.float64]:
        """ln sum_i w_i p_i(tokens up to each position), (n, length - 1)."""
        if names := [s.kind for s in self.sources if not has_known_probabilities(s)]:
            raise UserError(
                f"data.sources: {', '.join(names)} has no known probabilities, so the mixture has none."
            )
        with np.errstate(invalid="ignore"):
            parts = np.stack([np.cumsum(source.log_probs(documents), axis=1) for source in self.sources])
        parts = np.where(np.isnan(parts), -np.inf, parts) + np.log(self.shares())[:, None, None]
        with np.errstate(divide="ignore"):
            out: NDArray[np.float64] = np.logaddexp.reduce(parts, axis=0)
        return out


def _part(value: Any) -> Any:
    source = parse_source("data.sources", value)
    if isinstance(source, Mixture):
        raise UserError(
            "data.sources: mixtures cannot be nested; list all sources with their weights instead."
        )
    return source


def _documents(source: Any, split: str, indices: NDArray[np.integer], length: int) -> NDArray[np.integer]:
    if hasattr(source, "documents"):
        documents: NDArray[np.integer] = source.documents(split, indices, length)
        return documents
    return text_documents(source.tokens(split), indices, length)
