"""The `context_tree` source: a variable-order Markov language whose true log-probabilities are known exactly.

A context is the sequence of symbols before a token. The empty context has a Zipf distribution over the symbols; a longer
one mixes its parent's distribution (the same context without its oldest symbol) with a Zipf distribution of its own, of
weight `own_mass_percent`. A context of symbols with ranks r1, r2, ... (1 for the most frequent) is in the tree if
r1 * r2 * ... is at most `max_rank_product`, so that contexts, like words, have Zipf-like frequencies: rare ones need more
data to be seen and more parameters to be stored.

All tables are integers computed by integer arithmetic, so the tokens are the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.generation.counter_random import draw_u32, draw_u64, stream_key
from scaling_lab.core.sources.generation.documents import UNLIMITED_TOKENS
from scaling_lab.core.sources.generation.integer_zipf import ONE, zipf_weights

MAX_STATES = 2_000_000


@dataclass(frozen=True)
class ContextTree:
    """Documents of symbols 0 .. symbols - 1 that start with the beginning-of-document token `symbols`."""

    kind: ClassVar[str] = "context_tree"

    symbols: int = 32
    """Number of symbols. The vocabulary has one more token."""
    order: int = 3
    """Length of the longest context, in tokens."""
    max_rank_product: int = 128
    """A context has its own distribution if the product of its symbols' ranks is at most this."""
    zipf: float = 2.0
    """Zipf exponent of every distribution over the symbols' ranks."""
    own_mass_percent: int = 70
    """Weight of a context's own distribution, in percent; the rest is its parent's."""
    seed: int = 0
    """Seed of the language and of the documents."""

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise UserError(f"data.symbols={self.symbols} must be at least 2.")
        if self.order < 1 or (self.symbols + 1) ** self.order > MAX_STATES:
            most = int(math.log(MAX_STATES) / math.log(self.symbols + 1))
            raise UserError(
                f"data.order={self.order} must be in 1 .. {most} with data.symbols={self.symbols}."
            )
        if self.max_rank_product < 1:
            raise UserError(f"data.max_rank_product={self.max_rank_product} must be at least 1.")
        if not 0 <= self.own_mass_percent <= 100:
            raise UserError(f"data.own_mass_percent={self.own_mass_percent} must be in 0 .. 100.")
        if not 0 <= self.zipf <= 8:
            raise UserError(f"data.zipf={self.zipf!r} must be in [0, 8].")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def bytes_per_token(self) -> float | None:
        return None

    def n_tokens(self, split: str) -> int:
        return UNLIMITED_TOKENS

    def documents(self, split: str, indices: NDArray[np.integer], length: int) -> NDArray[np.int32]:
        """Documents `indices` of a split, (n, length): the beginning-of-document token, then `length - 1` symbols."""
        tables = language_tables(self)
        key = stream_key("context_tree documents", self.seed, split)
        index = np.asarray(indices, dtype=np.uint64)
        out = np.full((index.size, length), self.symbols, dtype=np.int32)
        state = np.full(index.size, tables.first_state)
        for t in range(1, length):
            u = draw_u32(key, index, t)
            leaf = tables.leaf[state]
            # The last bound is 2^32, above every draw.
            symbol = (tables.bounds[leaf] <= u[:, None]).sum(1, dtype=np.int64)
            out[:, t] = symbol
            state = (state * self.vocab_size + symbol) % tables.leaf.size
        return out

    def log_probs(self, documents: NDArray[np.integer]) -> NDArray[np.float64]:
        """True ln p of each token after the first given the preceding ones, nats: (n, length) -> (n, length - 1).

        -inf for a token that is not a symbol of this language.
        """
        tables = language_tables(self)
        state = np.full(len(documents), tables.first_state)
        out = np.empty((len(documents), documents.shape[1] - 1))
        for t in range(1, documents.shape[1]):
            token = documents[:, t].astype(np.int64)
            possible = (token >= 0) & (token < self.symbols)
            symbol = np.where(possible, token, 0)
            out[:, t - 1] = np.where(possible, tables.log_p[tables.leaf[state], symbol], -np.inf)
            state = (state * self.vocab_size + symbol) % tables.leaf.size
        return out

    def entropy_nats(self, length: int) -> float:
        """Exact mean entropy per predicted token of a document of `length` tokens: a lower bound on any model's loss.

        Computed by propagating the distribution over contexts from the start of a document through its positions.
        """
        tables = language_tables(self)
        v, n = self.vocab_size, tables.leaf.size
        probability = np.zeros((n, v))
        probability[:, : self.symbols] = np.exp(tables.log_p)[tables.leaf]
        entropy_of_leaf = -(np.exp(tables.log_p) * tables.log_p).sum(1)
        at = np.zeros(n)
        at[tables.first_state] = 1.0
        total = 0.0
        for _ in range(length - 1):
            total += float(at @ entropy_of_leaf[tables.leaf])
            # State (oldest, ..., newest) -> (..., newest, symbol): sum over the oldest symbol, which is dropped.
            joint = (at[:, None] * probability).reshape(v, n // v, v).sum(0)
            at = joint.reshape(n)
        return total / (length - 1)

    def fingerprint(self) -> str:
        """sha256 over the tables and the first documents: equal fingerprints mean the same language and documents."""
        tables = language_tables(self)
        digest = hashlib.sha256(tables.leaf.tobytes() + tables.bounds.tobytes())
        for split in ("train", "validation"):
            digest.update(self.documents(split, np.arange(64), 64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Tables:
    leaf: NDArray[np.int32]
    """State (the last `order` tokens as digits in base vocab_size, newest last) -> row of `bounds` and `log_p`, (states,)."""
    bounds: NDArray[np.uint64]
    """Cumulative probabilities times `ONE`, (rows, symbols)."""
    log_p: NDArray[np.float64]
    """ln p of each symbol, (rows, symbols)."""
    first_state: int
    """The state of only beginning-of-document tokens."""


@cache
def language_tables(source: ContextTree) -> _Tables:
    """The language as integers; built once per process."""
    v, symbols = source.vocab_size, source.symbols
    zipf = zipf_weights(symbols, source.zipf)
    key = stream_key("context_tree language", source.seed)
    root = np.zeros(symbols, dtype=np.int64)
    root[_ranking(key, (), symbols)] = zipf
    rank = np.empty(symbols, dtype=np.int64)
    rank[np.argsort(-root, kind="stable")] = np.arange(1, symbols + 1)
    rows: list[NDArray[np.int64]] = [root]
    row_of: dict[tuple[int, ...], int] = {(): 0}
    level: list[tuple[int, ...]] = [()]
    share = source.own_mass_percent
    for _ in range(source.order):
        longer = []
        for context in level:
            product = math.prod(int(rank[s]) for s in context)
            for symbol in range(symbols):
                if product * int(rank[symbol]) > source.max_rank_product:
                    continue
                # Contexts grow backward in time: (symbol, *context) prepends an older symbol to `context`.
                child = (symbol, *context)
                own = np.zeros(symbols, dtype=np.int64)
                own[_ranking(key, child, symbols)] = zipf
                mixed: NDArray[np.int64] = (own * share + rows[row_of[context]] * (100 - share)) // 100
                mixed[np.argmax(mixed)] += ONE - mixed.sum()
                row_of[child] = len(rows)
                rows.append(mixed)
                longer.append(child)
        level = longer
    leaf = np.zeros((v,) * source.order, dtype=np.int32)
    # Shorter contexts first, so that longer ones in the tree override their parents.
    for context, row in sorted(row_of.items(), key=lambda item: len(item[0])):
        ending: tuple[Any, ...] = (..., *context)
        leaf[ending] = row
    table = np.array(rows)
    bounds = np.cumsum(table, axis=1).astype(np.uint64)
    first = sum(symbols * v**i for i in range(source.order))
    return _Tables(leaf.reshape(-1), bounds, np.log(table / ONE), first)


def _ranking(key: int, context: tuple[int, ...], symbols: int) -> NDArray[np.int64]:
    """A pseudorandom permutation of the symbols for one context: element r is the symbol of rank r + 1."""
    code = 0
    for symbol in context:
        code = code * (symbols + 1) + symbol + 1
    return np.argsort(draw_u64(key, code, np.arange(symbols)), kind="stable")
