"""Fact coverage of a corpus: how often facts are stated, and what share of statements is about facts already seen.

With Zipf frequencies of slope 0 every decade of frequency contributes the same share of statements, so each tenfold
increase in text covers the same additional share: the idealized table below, and the exact expectation for the facts of
`zipf_facts`, with its exponent in the amount of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.core.sources.zipf_facts import ZipfFacts


@dataclass(frozen=True)
class DecadeWorld:
    """Frequency decades with equal shares of all statements: a coarse version of slope 0.

    Each fact of the first decade appears in one of `one_in` statements, each of the next decade in a tenth as many.
    """

    decades: int = 10
    one_in: int = 1000

    def rarity(self) -> tuple[int, ...]:
        """For each decade, the number of statements per mention of any one of its facts."""
        return tuple(self.one_in * 10**i for i in range(self.decades))

    def facts(self) -> tuple[int, ...]:
        """The number of facts in each decade that gives it its share of the statements."""
        return tuple(rarity // self.decades for rarity in self.rarity())

    def times_seen(self, statements: int) -> tuple[float, ...]:
        """Mean number of mentions of a fact of each decade in a corpus of this many statements."""
        return tuple(statements / rarity for rarity in self.rarity())

    def share_known(self, statements: int) -> float:
        """Share of statements whose fact was seen at least once, if every fact is stated exactly its mean number of times."""
        return sum(statements >= rarity for rarity in self.rarity()) / self.decades

    def share_known_at_random(self, statements: int) -> float:
        """The same for independently drawn statements: a fact expected once is missed with probability 1/e."""
        missed = np.exp(statements * np.log1p(-1.0 / np.array(self.rarity(), dtype=np.float64)))
        return float((1.0 - missed).mean())


def expected_share_known(source: ZipfFacts, statements: float) -> float:
    """Exact expected share of new statements whose fact was seen in D = `statements`: sum_k p_k (1 - (1 - p_k)^D)."""
    p = source.probability(np.arange(1, source.facts + 1))
    return float(-(p * np.expm1(statements * np.log1p(-p))).sum())


def expected_share_unknown(source: ZipfFacts, statements: float) -> float:
    """1 - `expected_share_known`, without cancellation: sum_k p_k (1 - p_k)^D."""
    p = source.probability(np.arange(1, source.facts + 1))
    return float((p * np.exp(statements * np.log1p(-p))).sum())


def unknown_exponent(source: ZipfFacts, statements: float) -> float:
    """Local exponent of the unknown share, -d ln(share unknown) / d ln D, at D = `statements`.

    Close to `asymptotic_exponent` while D is between the rarities of the most and the least frequent fact; larger once
    most facts have been seen.
    """
    p = source.probability(np.arange(1, source.facts + 1))
    log_missed = np.log1p(-p)
    unknown = p * np.exp(statements * log_missed)
    return float(-statements * (unknown * log_missed).sum() / unknown.sum())


def asymptotic_exponent(slope: float) -> float:
    """s / (1 + s): the exponent in D for infinitely many facts (Michaud et al. 2023, arXiv 2303.13506, section 2)."""
    return slope / (1.0 + slope)


def exposure_lines(world: DecadeWorld, corpora: Sequence[int], source: ZipfFacts) -> list[str]:
    """The table as text: mentions by decade and corpus size, then the shares of known facts."""
    sizes = "".join(f"{f'D = {corpus:,}':>16}" for corpus in corpora)
    lines = [f"{'frequency of a fact':<22}{'share of text':>14}{sizes}"]
    seen = [world.times_seen(corpus) for corpus in corpora]
    for i, rarity in enumerate(world.rarity()):
        cells = "".join(f"{f'{times[i]:g} x':>16}" for times in seen)
        lines.append(f"{f'1 in {rarity:,}':<22}{f'{1 / world.decades:.0%}':>14}{cells}")
    rows = {
        "known (seen once)": [world.share_known(c) for c in corpora],
        "known, random draws": [world.share_known_at_random(c) for c in corpora],
        f"{source.facts:,} facts, slope {source.slope:g}": [expected_share_known(source, c) for c in corpora],
    }
    for name, shares in rows.items():
        lines.append(f"{name:<36}" + "".join(f"{share:>16.1%}" for share in shares))
    return lines
