"""Owns how much of a world of facts a corpus shows: how often facts are stated, and what share of statements is then known.

With Zipf frequencies of slope 0 every decade of frequency has the same mass of statements, so each tenfold of text adds the
same share: the stylised table below, and the exact expectation for the facts of `zipf_facts`, with its exponent in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.sources.generation.counter_random import draw_u64, stream_key
from scaling_lab.core.sources.zipf_facts import ZipfFacts


@dataclass(frozen=True)
class DecadeWorld:
    """Decades of frequency, each with the same share of all statements: slope 0 in the roughest of terms.

    Facts of the first decade are one in `one_in` statements each, those of the next one in ten times as many.
    """

    decades: int = 10
    one_in: int = 1000

    def rarity(self) -> tuple[int, ...]:
        """Of each decade: one statement in so many is about a given fact of it."""
        return tuple(self.one_in * 10**i for i in range(self.decades))

    def facts(self) -> tuple[int, ...]:
        """How many facts each decade has: as many as give it its share of the statements."""
        return tuple(rarity // self.decades for rarity in self.rarity())

    def times_seen(self, statements: int) -> tuple[float, ...]:
        """How often a fact of each decade is stated on average in a corpus of so many statements."""
        return tuple(statements / rarity for rarity in self.rarity())

    def share_known(self, statements: int) -> float:
        """Share of all statements whose fact was stated at least once, if each is stated as often as on average."""
        return sum(statements >= rarity for rarity in self.rarity()) / self.decades

    def share_known_at_random(self, statements: int) -> float:
        """The same where statements are drawn independently: a fact that is due once is missed with probability 1/e."""
        missed = np.exp(statements * np.log1p(-1.0 / np.array(self.rarity(), dtype=np.float64)))
        return float((1.0 - missed).mean())

    def simulated_counts(self, statements: int, seed: int = 0) -> list[NDArray[np.int64]]:
        """One corpus, drawn statement by statement: for each decade how often each of its stated facts came."""
        key = stream_key("zipf_exposure", seed)
        at = np.arange(statements)
        decade = draw_u64(key, at, 0) % np.uint64(self.decades)
        counts = []
        for i, facts in enumerate(self.facts()):
            which = draw_u64(key, at[decade == i], 1) % np.uint64(facts)
            counts.append(np.unique(which, return_counts=True)[1].astype(np.int64))
        return counts


def expected_share_known(source: ZipfFacts, statements: float) -> float:
    """Expected share of further statements whose fact is among `statements` seen: sum_k p_k (1 - (1 - p_k)^D), exactly."""
    p = source.probability(np.arange(1, source.facts + 1))
    return float(-(p * np.expm1(statements * np.log1p(-p))).sum())


def expected_share_unknown(source: ZipfFacts, statements: float) -> float:
    """1 - `expected_share_known`, without cancellation: sum_k p_k (1 - p_k)^D."""
    p = source.probability(np.arange(1, source.facts + 1))
    return float((p * np.exp(statements * np.log1p(-p))).sum())


def unknown_exponent(source: ZipfFacts, statements: float) -> float:
    """Local exponent of the unknown share in the corpus, -d ln(share unknown) / d ln D, at D = `statements`.

    Between the most and the least frequent fact it is near `asymptotic_exponent`; where facts run out it is above.
    """
    p = source.probability(np.arange(1, source.facts + 1))
    log_missed = np.log1p(-p)
    unknown = p * np.exp(statements * log_missed)
    return float(-statements * (unknown * log_missed).sum() / unknown.sum())


def asymptotic_exponent(slope: float) -> float:
    """s / (1 + s): the exponent in D for facts without end (Michaud et al. 2023, arXiv 2303.13506, section 2)."""
    return slope / (1.0 + slope)


def exposure_lines(world: DecadeWorld, corpora: Sequence[int], source: ZipfFacts) -> list[str]:
    """The table as text: decades by corpus sizes, then the shares that are known."""
    sizes = "".join(f"{f'D = {corpus:,}':>16}" for corpus in corpora)
    lines = [f"{'frequency of a fact':<22}{'share of text':>14}{sizes}"]
    seen = [world.times_seen(corpus) for corpus in corpora]
    for i, rarity in enumerate(world.rarity()):
        cells = "".join(f"{f'{times[i]:g} x':>16}" for times in seen)
        lines.append(f"{f'1 in {rarity:,}':<22}{f'{1 / world.decades:.0%}':>14}{cells}")
    rows = {
        "known (seen once)": [world.share_known(c) for c in corpora],
        "known, drawn at random": [world.share_known_at_random(c) for c in corpora],
        f"{source.facts:,} facts, slope {source.slope:g}": [expected_share_known(source, c) for c in corpora],
    }
    for name, shares in rows.items():
        lines.append(f"{name:<36}" + "".join(f"{share:>16.1%}" for share in shares))
    return lines
