"""Corpora with a known answer: probabilities sum to one, floors are exact, and tokens are the same on every machine."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.sources.generation.counter_random import draw_u32, draw_u64, mix, stream_key
from scaling_lab.core.sources.generation.documents import GeneratedSource, floor_nats
from scaling_lab.core.sources.generation.integer_zipf import ONE, zipf_sum, zipf_weights
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.sources.zipf_facts import ZipfFacts

SMALL_TREE = ContextTree(symbols=3, order=2, max_rank_product=4, own_mass_percent=60)
SMALL_FACTS = ZipfFacts(facts=5, symbols=3, value_tokens=1, slope=0.5)
EXACT = [
    SMALL_TREE,
    SMALL_FACTS,
    ContextTree(symbols=2, order=3),
    ZipfFacts(facts=3, symbols=2, value_tokens=2),
]


def every_document(source: GeneratedSource, length: int) -> np.ndarray:
    """All token sequences of `length` after the source's own first token."""
    first = int(source.documents("train", np.arange(1), 1)[0, 0])
    rest = np.array(list(itertools.product(range(source.vocab_size), repeat=length - 1)))
    return np.concatenate([np.full((len(rest), 1), first), rest], axis=1)


@pytest.mark.parametrize("source", EXACT, ids=repr)
def test_document_probabilities_sum_to_one_and_have_the_stated_entropy(source):
    length = 6
    documents = every_document(source, length)
    log_p = source.log_probs(documents).sum(1)
    possible = np.isfinite(log_p)
    p = np.exp(log_p[possible])
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    entropy = -(p * log_p[possible]).sum() / (length - 1)
    assert source.entropy_nats(length) == pytest.approx(entropy, rel=1e-12)


@pytest.mark.parametrize(
    "source",
    [
        ContextTree(),
        ZipfFacts(),
        ZipfFacts(facts=300, slope=1.0, symbols=7),
        ContextTree(symbols=50, order=2),
    ],
    ids=repr,
)
def test_floor_over_a_million_tokens(source):
    """The mean true -log p of what is generated equals the stated entropy within 4 standard errors, by document."""
    length = 65
    documents = source.documents("validation", np.arange(16_000), length)
    per_document = floor_nats(source, documents)
    assert documents[:, 1:].size >= 1e6
    error = per_document.std(ddof=1) / math.sqrt(per_document.size)
    assert abs(per_document.mean() - source.entropy_nats(length)) < 4 * error
    # The test detects an error of 2% of a floor.
    assert 4 * error < 0.02 * source.entropy_nats(length)


def test_a_context_tree_by_hand():
    """Probabilities of a language of three symbols, recomputed as fractions from the construction in the docstring."""
    source = SMALL_TREE
    key = stream_key("context_tree language", source.seed)
    zipf = zipf_weights(3, source.zipf).tolist()

    def own(context):
        code = 0
        for symbol in context:
            code = code * 4 + symbol + 1
        order = np.argsort(draw_u64(key, code, np.arange(3)), kind="stable")
        out = [0] * 3
        for r, symbol in enumerate(order):
            out[symbol] = zipf[r]
        return out

    root = own(())
    rank = {s: r + 1 for r, s in enumerate(sorted(range(3), key=lambda s: -root[s]))}

    def distribution(context):
        if not context:
            return [Fraction(x) for x in root]
        parent = distribution(context[1:])
        if math.prod(rank[s] for s in context) > 4:
            return parent
        return [Fraction(6, 10) * a + Fraction(4, 10) * b for a, b in zip(own(context), parent, strict=True)]

    documents = source.documents("train", np.arange(200), 8)
    log_p = source.log_probs(documents)
    for document, row in zip(documents.tolist(), log_p, strict=True):
        for t in range(1, 8):
            context = tuple(document[max(1, t - 2) : t])
            assert row[t - 1] == pytest.approx(math.log(distribution(context)[document[t]] / ONE), abs=1e-7)


def test_documents_are_functions_of_split_and_index():
    for source in (ContextTree(), ZipfFacts(), Mixture(("context_tree", "zipf_facts"))):
        many = source.documents("train", np.arange(100), 33)
        some = source.documents("train", np.array([70, 3]), 33)
        np.testing.assert_array_equal(some, many[[70, 3]])
        # A shorter document is a prefix of the longer one.
        np.testing.assert_array_equal(source.documents("train", np.arange(100), 9), many[:, :9])
        assert (source.documents("validation", np.arange(100), 33) != many).any(1).all()
        far = source.documents("train", np.array([2**50]), 33)
        assert far.shape == (1, 33)
        assert many.min() >= 0
        assert many.max() < source.vocab_size


def test_generated_tokens_are_the_same_on_every_machine():
    """Golden values: the tokens are made from integers only, so these must never change."""
    assert ContextTree().fingerprint()[:16] == "71102d413375a2ac"
    assert ZipfFacts().fingerprint()[:16] == "3698348694e87e0c"
    assert int(mix(np.array([1], dtype=np.uint64))[0]) == 0x5692161D100B05E5
    assert draw_u32(stream_key("a"), np.arange(3)).tolist() == draw_u32(stream_key("a"), [0, 1, 2]).tolist()


def test_facts_occur_at_their_stated_rate():
    source = ZipfFacts(facts=50, symbols=5)
    ranks = source.stated_ranks("train", np.arange(20_000), 5)
    seen = np.bincount(ranks.ravel(), minlength=51)[1:]
    expected = source.probability(np.arange(1, 51)) * ranks.size
    assert (((seen - expected) ** 2 / expected).sum() - 49) / math.sqrt(2 * 49) < 5
    np.testing.assert_allclose(expected * np.arange(1, 51), expected[0], rtol=1e-5)


def test_every_fact_has_one_key_and_one_value():
    source = ZipfFacts(facts=60, symbols=8, value_tokens=2)
    size, length = source.statement_tokens, 1 + 10 * source.statement_tokens
    statements = source.documents("train", np.arange(3000), length)[:, 1:].reshape(-1, size)
    distinct = np.unique(statements, axis=0)
    keys = np.unique(statements[:, : source.key_tokens], axis=0)
    assert len(distinct) == len(keys) == 60
    places = source.value_positions(length)
    assert places.shape == (10, 2)
    # The value positions are those after "is".
    document = source.documents("train", np.array([0]), length)[0, 1:]
    np.testing.assert_array_equal(document[places - 1][:, 0], np.full(10, source.symbols))


def test_mixture_floor_is_that_of_the_mixture():
    """Equal to an enumeration: -log of the weighted sum of the probabilities of whole documents."""
    sources = (ContextTree(symbols=3, order=1), ContextTree(symbols=3, order=2, seed=5))
    mixture = Mixture(sources, (3.0, 1.0))
    rest = np.array(list(itertools.product(range(4), repeat=5)))
    documents = np.concatenate([np.full((len(rest), 1), 4), rest], axis=1)
    with np.errstate(divide="ignore"):
        by_hand = np.log(
            0.75 * np.exp(sources[0].log_probs(documents).sum(1))
            + 0.25 * np.exp(sources[1].log_probs(documents).sum(1))
        )
    got = mixture.log_probs(documents).sum(1)
    np.testing.assert_allclose(got[np.isfinite(by_hand)], by_hand[np.isfinite(by_hand)], atol=1e-9)
    assert np.exp(got[np.isfinite(got)]).sum() == pytest.approx(1.0, abs=1e-9)
    assert not np.isfinite(got[~np.isfinite(by_hand)]).any()
    drawn = mixture.documents("validation", np.arange(8000), 33)
    floor = floor_nats(mixture, drawn).mean()
    parts = 0.75 * sources[0].entropy_nats(33) + 0.25 * sources[1].entropy_nats(33)
    # Above the mean of the floors by the cost of identifying the source, at most the entropy of the choice.
    choice = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 32
    assert parts < floor < parts + choice + 0.01


def test_mixture_of_text_has_documents_but_no_floor():
    mixture = Mixture(({"kind": "pysource", "max_mb": 1.0}, "context_tree"), (1.0, 1.0))
    documents = mixture.documents("train", np.arange(200), 17)
    chosen = mixture.source_indices("train", np.arange(200))
    assert 60 < chosen.sum() < 140
    assert (documents[:, 0] == mixture.vocab_size - 1).all()
    text = PySource(max_mb=1.0).tokens("train")
    np.testing.assert_array_equal(documents[chosen == 0][0, 1:], _window(text, chosen)[1:])
    assert mixture.vocab_size == 257
    with pytest.raises(UserError, match="pysource has no known probabilities"):
        mixture.log_probs(documents)


def _window(text, chosen):
    first = int(np.flatnonzero(chosen == 0)[0])
    return text[first * 17 : first * 17 + 17]


def test_zipf_weights_are_those_of_exact_arithmetic():
    for n, exponent in [(3, 1.0), (50, 1.0), (51, 1.3), (900, 2.0), (900, 0.0), (700, 0.5)]:
        with localcontext() as context:
            context.prec = 50
            power = Decimal(str(exponent))
            total = sum(Decimal(k) ** -power for k in range(1, n + 1))
            assert abs(zipf_sum(n, power) - total) < total * Decimal("1e-24")
            wanted = [1 + int((ONE - n) / total * Decimal(k) ** -power) for k in range(1, n + 1)]
        wanted[0] += ONE - sum(wanted)
        assert zipf_weights(n, exponent).tolist() == wanted
    assert zipf_weights(10_000, 1.2).sum() == ONE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextTree(symbols=1), "data.symbols=1"),
        (lambda: ContextTree(order=9), "data.order=9 must be in 1 .. 4"),
        (lambda: ContextTree(own_mass_percent=101), "own_mass_percent=101"),
        (lambda: ZipfFacts(facts=1), "data.facts=1"),
        (lambda: ZipfFacts(slope=-0.1), "data.slope=-0.1"),
        (lambda: Mixture(), "data.sources is missing"),
        (lambda: Mixture(("context_tree",), (1.0, 2.0)), "2 values for 1"),
        (lambda: Mixture(("context_tree", "nonsense")), "nonsense"),
        (lambda: Mixture(({"kind": "context_tree", "colour": 1},)), "colour"),
        (lambda: Mixture(("context_tree", "zipf_facts"), (1.0, 0.0)), "must be positive"),
    ],
)
def test_bad_options_are_one_clear_error(make, message):
    with pytest.raises(UserError, match=message):
        make()
