"""Tests of the share of facts that a corpus shows: the slide's table by hand, by simulation, and for `zipf_facts` documents."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from scaling_lab.core.sources.generation.counter_random import draw_u64, stream_key
from scaling_lab.core.sources.generation.zipf_exposure import DecadeWorld, expected_share_known
from scaling_lab.core.sources.zipf_facts import ZipfFacts

SCRIPT = Path(__file__).parent.parent / "scripts" / "zipf_table.py"
CORPORA = (1_000, 10_000, 100_000)


def test_the_table_of_the_slide() -> None:
    world = DecadeWorld()
    assert [world.share_known(d) for d in CORPORA] == [0.1, 0.2, 0.3]
    assert [world.times_seen(d)[:4] for d in CORPORA] == [
        (1, 0.1, 0.01, 0.001),
        (10, 1, 0.1, 0.01),
        (100, 10, 1, 0.1),
    ]
    # Every decade has a tenth of the statements.
    assert {n / rarity for n, rarity in zip(world.facts(), world.rarity())} == {0.1}
    assert world.share_known(999) == 0.0
    assert world.share_known(10**13) == 1.0


def simulated_counts(world: DecadeWorld, statements: int, seed: int) -> list[np.ndarray]:
    """One corpus, drawn statement by statement: for each decade, how often each of its stated facts occurs."""
    key = stream_key("zipf_exposure", seed)
    at = np.arange(statements)
    decade = draw_u64(key, at, 0) % np.uint64(world.decades)
    counts = []
    for i, facts in enumerate(world.facts()):
        which = draw_u64(key, at[decade == i], 1) % np.uint64(facts)
        counts.append(np.unique(which, return_counts=True)[1].astype(np.int64))
    return counts


@pytest.mark.parametrize("statements", CORPORA)
def test_statements_drawn_one_by_one_agree(statements: int) -> None:
    world = DecadeWorld()
    runs = 40
    shares, seen = np.empty(runs), np.empty((runs, world.decades))
    for seed in range(runs):
        counts = simulated_counts(world, statements, seed)
        assert sum(c.sum() for c in counts) == statements
        shares[seed] = sum(c.size / n for c, n in zip(counts, world.facts())) / world.decades
        seen[seed] = [c.sum() / n for c, n in zip(counts, world.facts())]
    wanted = world.share_known_at_random(statements)
    assert abs(shares.mean() - wanted) < 4 * shares.std(ddof=1) / np.sqrt(runs)
    # How often a fact is stated, averaged over a decade: a binomial share of the statements over the number of facts.
    for i, times in enumerate(world.times_seen(statements)):
        error = np.sqrt(statements * 0.1 * 0.9 / runs) / world.facts()[i]
        assert abs(seen[:, i].mean() - times) < 4 * error


def test_each_tenfold_adds_a_tenth_in_simulations_too() -> None:
    world = DecadeWorld()
    at = [world.share_known_at_random(d) for d in CORPORA]
    assert np.diff(at) == pytest.approx([0.1, 0.1], abs=1e-4)
    assert at[0] == pytest.approx(0.1 * (1 - np.exp(-1) + 1 - np.exp(-0.1) + 0.0111), abs=2e-4)


@pytest.mark.parametrize(
    "source",
    [ZipfFacts(), ZipfFacts(facts=300, slope=1.0, symbols=7), ZipfFacts(facts=50, slope=0.5, symbols=4)],
    ids=repr,
)
def test_share_known_of_documents_is_the_expected_one(source: ZipfFacts) -> None:
    documents, statements, corpora = 50, 8, 60
    size, k = source.statement_tokens, source.key_tokens
    shares = np.empty(corpora)
    for i in range(corpora):
        text = source.documents("train", np.arange(documents) + i * documents, 1 + statements * size)
        parts = text[:, 1:].reshape(-1, size)
        log_p = source.log_probs(text).reshape(-1, size)[:, :k].sum(1)
        # A key has the probability of its fact, so the keys that were seen give the known mass.
        _, first = np.unique(parts[:, :k], axis=0, return_index=True)
        shares[i] = np.exp(log_p[first]).sum()
    wanted = expected_share_known(source, documents * statements)
    assert abs(shares.mean() - wanted) < 4 * shares.std(ddof=1) / np.sqrt(corpora)
    assert 0.02 < wanted < 1.0


def test_the_exact_share_by_hand() -> None:
    source = ZipfFacts(facts=2, symbols=2, slope=0.0)
    p, q = source.probability(np.array([1, 2]))
    assert (p, q) == pytest.approx((2 / 3, 1 / 3), abs=1e-9)
    assert expected_share_known(source, 0) == 0.0
    assert expected_share_known(source, 1) == pytest.approx(p * p + q * q)
    assert expected_share_known(source, 2) == pytest.approx(p * (1 - q * q) + q * (1 - p * p))


def test_the_script_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    known = next(line for line in lines if line.startswith("known (seen once)"))
    assert known.split()[-3:] == ["10.0%", "20.0%", "30.0%"]
    assert next(line for line in lines if line.startswith("1 in 10,000")).split()[-6:] == [
        "0.1",
        "x",
        "1",
        "x",
        "10",
        "x",
    ]
