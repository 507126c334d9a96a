"""The `zipf_facts` source: documents made of statements of facts, each a key and its value.

    . k1 k2 k3 is v1 v2 . k1 k2 k3 is v1 v2 . ...

Keys are drawn from a Zipf law over the facts, p_k ~ k^-(1 + slope); each key has a fixed value. A model must have seen a
fact (limited by D) and have the capacity to store it (limited by N), so the loss follows power laws with known exponents:
the quantization model of Michaud et al. 2023 (arXiv 2303.13506) gives alpha_N = slope and alpha_D = slope / (1 + slope)
for infinitely many facts. At slope = 0 every decade of frequency has the same mass, and the loss falls logarithmically.

The loss floor is the entropy of the keys alone: the values have no entropy given the facts.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.generation.counter_random import draw_u32, draw_u64, stream_key
from scaling_lab.core.sources.generation.documents import UNLIMITED_TOKENS
from scaling_lab.core.sources.generation.integer_zipf import ONE, zipf_weights

MAX_FACTS = 4_000_000


@dataclass(frozen=True)
class ZipfFacts:
    """Tokens 0 .. symbols - 1 spell keys and values; `symbols` is the word "is", `symbols + 1` the period."""

    kind: ClassVar[str] = "zipf_facts"

    facts: int = 10_000
    slope: float = 0.0
    """s in p_k ~ k^-(1 + s)."""
    symbols: int = 32
    """Size of the alphabet of keys and values."""
    value_tokens: int = 2
    seed: int = 0
    """Seed of the facts and of the documents."""

    def __post_init__(self) -> None:
        if not 2 <= self.facts <= MAX_FACTS:
            raise UserError(f"data.facts={self.facts} must be in 2 .. {MAX_FACTS}.")
        if not 0 <= self.slope <= 4:
            raise UserError(f"data.slope={self.slope!r} must be in [0, 4].")
        if self.symbols < 2:
            raise UserError(f"data.symbols={self.symbols} must be at least 2.")
        if not 1 <= self.value_tokens <= 16:
            raise UserError(f"data.value_tokens={self.value_tokens} must be in 1 .. 16.")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def bytes_per_token(self) -> float | None:
        return None

    @property
    def key_tokens(self) -> int:
        """Length of a key: the shortest that gives every fact its own."""
        n, possible = 1, self.symbols
        while possible < self.facts:
            n, possible = n + 1, possible * self.symbols
        return n

    @property
    def statement_tokens(self) -> int:
        """Key, "is", value, period."""
        return self.key_tokens + 1 + self.value_tokens + 1

    def n_tokens(self, split: str) -> int:
        return UNLIMITED_TOKENS

    def probability(self, ranks: NDArray[np.integer]) -> NDArray[np.float64]:
        """Probability that a statement is about the fact of each rank (from 1)."""
        return fact_tables(self).mass[np.asarray(ranks) - 1] / ONE

    def stated_ranks(self, split: str, indices: NDArray[np.integer], statements: int) -> NDArray[np.int64]:
        """Rank (from 1) of each statement's fact, (n, statements)."""
        key = stream_key("zipf_facts documents", self.seed, split)
        u = draw_u32(key, np.asarray(indices, dtype=np.uint64)[:, None], np.arange(statements)[None, :])
        return np.searchsorted(fact_tables(self).bounds, u, side="right") + 1

    def documents(self, split: str, indices: NDArray[np.integer], length: int) -> NDArray[np.int32]:
        """Documents `indices` of a split, (n, length): a period, then statements, the last one truncated."""
        tables, size = fact_tables(self), self.statement_tokens
        statements = -(-(length - 1) // size)
        ranks = self.stated_ranks(split, indices, statements)
        text = tables.spelled[ranks - 1].reshape(len(ranks), statements * size)
        period = np.full((len(ranks), 1), self.symbols + 1, dtype=np.int32)
        return np.concatenate([period, text], axis=1)[:, :length]

    def log_probs(self, documents: NDArray[np.integer]) -> NDArray[np.float64]:
        """True ln p of each token after the first given the preceding ones, nats: (n, length) -> (n, length - 1).

        -inf for an impossible token and for everything after it in its statement.
        """
        tables, size = fact_tables(self), self.statement_tokens
        n, scored = len(documents), documents.shape[1] - 1
        statements = -(-scored // size)
        padded = np.full((n, statements * size), -1, dtype=np.int64)
        padded[:, :scored] = documents[:, 1:]
        parts = padded.reshape(n * statements, size)
        out = np.full(parts.shape, -np.inf)
        node = np.zeros(len(parts), dtype=np.int64)
        for j in range(self.key_tokens):
            letter = parts[:, j]
            known = (node >= 0) & (letter >= 0) & (letter < self.symbols)
            child = np.where(known, node * self.symbols + np.where(known, letter, 0), 0)
            mass_here, mass_child = (
                tables.prefix_mass[j][np.maximum(node, 0)],
                tables.prefix_mass[j + 1][child],
            )
            possible = known & (mass_child > 0)
            out[possible, j] = np.log(mass_child[possible] / mass_here[possible])
            node = np.where(possible, child, -1)
        rank = np.where(node >= 0, tables.rank_of_code[np.maximum(node, 0)], 0)
        rest = np.where(
            (rank > 0)[:, None], tables.spelled[np.maximum(rank, 1) - 1][:, self.key_tokens :], -2
        )
        correct = np.cumprod(parts[:, self.key_tokens :] == rest, axis=1).astype(bool)
        out[:, self.key_tokens :][correct] = 0.0
        return out.reshape(n, statements * size)[:, :scored]

    def entropy_nats(self, length: int) -> float:
        """Exact mean entropy per predicted token of a document of `length` tokens."""
        tables, size = fact_tables(self), self.statement_tokens
        prefix_entropy = [_entropy(mass) for mass in tables.prefix_mass]
        by_position = [b - a for a, b in itertools.pairwise(prefix_entropy)] + [0.0] * (
            size - self.key_tokens
        )
        return sum(by_position[t % size] for t in range(length - 1)) / (length - 1)

    def value_positions(self, length: int) -> NDArray[np.int64]:
        """Positions (among the predicted tokens, from 0) of each whole statement's value, (statements, value_tokens)."""
        size = self.statement_tokens
        starts = np.arange((length - 1) // size) * size + self.key_tokens + 1
        return starts[:, None] + np.arange(self.value_tokens)

    def fingerprint(self) -> str:
        """sha256 over the facts and the first documents: equal fingerprints mean the same facts and documents."""
        tables = fact_tables(self)
        digest = hashlib.sha256(tables.spelled.tobytes() + tables.bounds.tobytes())
        for split in ("train", "validation"):
            digest.update(self.documents(split, np.arange(64), 64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Tables:
    mass: NDArray[np.int64]
    """Probability of each fact times `ONE`, by rank, (facts,)."""
    bounds: NDArray[np.uint64]
    """Cumulative `mass`, (facts,)."""
    spelled: NDArray[np.int32]
    """Each fact's statement as tokens, by rank, (facts, statement_tokens)."""
    prefix_mass: tuple[NDArray[np.float64], ...]
    """Total mass of the keys with each prefix, by prefix length: element j is (symbols^j,)."""
    rank_of_code: NDArray[np.int64]
    """Key (as a number in base `symbols`) -> rank from 1, or 0 if it is not a fact, (symbols^key_tokens,)."""


@cache
def fact_tables(source: ZipfFacts) -> _Tables:
    """The facts as integers; built once per process."""
    facts, symbols, k = source.facts, source.symbols, source.key_tokens
    mass = zipf_weights(facts, 1.0 + source.slope)
    key = stream_key("zipf_facts language", source.seed)
    # Keys are assigned to ranks pseudorandomly, so that their letters carry no information about frequency.
    codes = np.argsort(draw_u64(key, 0, np.arange(symbols**k)), kind="stable")[:facts]
    letters = (codes[:, None] // symbols ** np.arange(k - 1, -1, -1)) % symbols
    values = draw_u64(key, 1, np.arange(facts)[:, None], np.arange(source.value_tokens)[None, :]) % np.uint64(
        symbols
    )
    spelled = np.concatenate(
        [letters, np.full((facts, 1), symbols), values.astype(np.int64), np.full((facts, 1), symbols + 1)],
        axis=1,
    ).astype(np.int32)
    by_code = np.zeros(symbols**k)
    by_code[codes] = mass
    prefix_mass = tuple(by_code.reshape(symbols**j, -1).sum(1) for j in range(k + 1))
    rank_of_code = np.zeros(symbols**k, dtype=np.int64)
    rank_of_code[codes] = np.arange(1, facts + 1)
    return _Tables(mass, np.cumsum(mass).astype(np.uint64), spelled, prefix_mass, rank_of_code)


def _entropy(mass: NDArray[np.float64]) -> float:
    p = mass[mass > 0] / mass.sum()
    return float(-(p * np.log(p)).sum())
