"""Generated corpora made by torch on the device are numpy's, token for token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scaling_lab.training.data.feed as feed_module
from helpers.feeds import BATCH, CHUNK_STEPS, CONTEXT, CPU, GENERATED, all_windows, spec_of
from helpers.runs import losses, train
from scaling_lab.core.sources.context_tree import ContextTree, language_tables
from scaling_lab.core.sources.generation import counter_random as host
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.sources.zipf_facts import ZipfFacts, fact_tables
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.data.feed import open_feed
from scaling_lab.training.data.generated import counter_random as on_device
from scaling_lab.training.data.generated import device_documents

SOURCES = [
    ContextTree(),
    ContextTree(symbols=2, order=1, seed=3),
    ContextTree(symbols=6, order=4, own_mass_percent=100),
    ZipfFacts(),
    ZipfFacts(facts=70_000, slope=1.3, symbols=9, value_tokens=3, seed=8),
    Mixture((ContextTree(), ZipfFacts(), ContextTree(seed=2)), (0.2, 3.0, 1.0), seed=4),
]
INDICES = np.concatenate([np.arange(500), 2**53 + np.arange(50), [2**60 - 1, 2**62]])


def test_draws_are_the_same_64_bits():
    counters = np.array([0, 1, 2**31, 2**32 + 7, 2**62 + 3, 2**63 - 1])
    for key in (0, 1, host.stream_key("a"), 2**64 - 1):
        ours = on_device.draw_u64(key, torch.from_numpy(counters)[:, None], torch.arange(40))
        wanted = host.draw_u64(key, counters[:, None], np.arange(40))
        np.testing.assert_array_equal(ours.numpy().view(np.uint64), wanted)
        upper = on_device.draw_u32(key, torch.from_numpy(counters))
        np.testing.assert_array_equal(upper.numpy(), host.draw_u32(key, counters))
        assert (upper >= 1 << 31).any()  # with the sign bit set


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_documents_are_the_same_token_for_token(source):
    made = device_documents(source, CPU)
    assert made is not None
    for split, length in (("train", 65), ("validation", 18), ("train", 2)):
        ours = made.documents(split, torch.from_numpy(INDICES), length)
        assert ours.dtype == torch.int32
        np.testing.assert_array_equal(ours.numpy(), source.documents(split, INDICES, length))


@pytest.mark.parametrize("source", [SOURCES[2], SOURCES[4]], ids=["context_tree", "zipf_facts"])
def test_a_draw_that_meets_a_bound_exactly_goes_the_same_way(monkeypatch, source):
    """One in 2^32: draws are put on every bound of the first token, just below and just above it."""
    tables = fact_tables(source) if isinstance(source, ZipfFacts) else language_tables(source)
    bounds = tables.bounds if tables.bounds.ndim == 1 else tables.bounds[tables.leaf[tables.first_state]]
    draws = (bounds[:-1, None].astype(np.int64) + np.array([-1, 0, 1])).ravel()
    draws = np.concatenate([[0], draws, [2**32 - 1]])
    indices = np.arange(draws.size)

    def on_host(key, index, *rest):
        return np.broadcast_to(
            draws[np.asarray(index, dtype=np.int64)], np.broadcast_shapes(*map(np.shape, (index, *rest)))
        ).astype(np.uint32)

    def in_torch(key, index, *rest):
        return torch.from_numpy(on_host(key, index.numpy(), *(r.numpy() for r in rest)).astype(np.int64))

    for module in ("core.sources", "training.data.generated"):
        fake = on_host if module == "core.sources" else in_torch
        monkeypatch.setattr(f"scaling_lab.{module}.{source.kind}.draw_u32", fake)
    wanted = source.documents("train", indices, 2)
    assert (np.diff(np.unique(wanted[:, 1])) > 0).sum() > 1
    ours = device_documents(source, CPU).documents("train", torch.from_numpy(indices), 2)
    np.testing.assert_array_equal(ours.numpy(), wanted)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 1e-9])
def test_noise_is_the_same(share):
    spec = spec_of(GENERATED["context_tree"], noise=share)
    places = INDICES[:, None] % 2**40 * 17 + np.arange(17)
    tokens = np.zeros(places.shape, dtype=np.int32)
    ours = on_device.add_noise(
        torch.from_numpy(tokens), torch.from_numpy(places), share, spec.data.vocab_size
    )
    np.testing.assert_array_equal(ours.numpy(), feed_module.add_noise(spec, tokens, places))


@pytest.mark.parametrize("name", GENERATED)
def test_feeds_and_losses_are_the_same(tmp_path, monkeypatch, name):
    """As a GPU does it, on CPU tensors: chunks of three steps, two slots, noise."""
    monkeypatch.setattr(feed_module, "CHUNK_TOKENS", 2 * CHUNK_STEPS * BATCH * CONTEXT)
    specs = [spec_of(GENERATED[name], 20, noise=0.2, seed_data=seed) for seed in (0, 5)]
    before = open_feed(specs, CPU)
    wanted = [all_windows(before, slot, 20) for slot in (0, 1)]
    loss = losses(train(RunStore(tmp_path / "host"), specs[0]))
    made = []
    monkeypatch.setattr(feed_module, "GENERATING_DEVICES", ("cuda", "cpu"))
    real = feed_module.device_reader
    monkeypatch.setattr(feed_module, "device_reader", lambda *given: made.append(given) or real(*given))
    feed = open_feed(specs, CPU)
    assert len(made) == 2
    for slot in (0, 1):
        np.testing.assert_array_equal(all_windows(feed, slot, 20), wanted[slot])
        np.testing.assert_array_equal(feed.windows(slot, 3, 5).numpy(), wanted[slot][3:8])
    assert losses(train(RunStore(tmp_path / "device"), specs[0])) == loss


def test_a_mixture_with_text_is_made_on_the_host():
    assert device_documents(Mixture((ContextTree(), PySource())), CPU) is None
    assert device_documents(PySource(), CPU) is None


@pytest.mark.gpu
@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_documents_on_a_gpu(source):
    device = torch.device("cuda")
    made = device_documents(source, device)
    assert made is not None
    ours = made.documents("train", torch.from_numpy(INDICES).to(device), 65)
    assert ours.device.type == "cuda"
    np.testing.assert_array_equal(ours.cpu().numpy(), source.documents("train", INDICES, 65))


@pytest.mark.gpu
@pytest.mark.parametrize("name", GENERATED)
def test_feeds_on_a_gpu(name):
    specs = [spec_of(GENERATED[name], 20, noise=0.2, seed_data=seed) for seed in (0, 5)]
    host_feed, feed = open_feed(specs, CPU), open_feed(specs, torch.device("cuda"))
    offsets = torch.arange(CONTEXT + 1)
    for slot in (0, 1):
        for first in (0, 10):
            here, there = (f.starts(slot, first, 10)[..., None] + offsets for f in (host_feed, feed))
            wanted, ours = host_feed.tokens[here], feed.tokens[there.to(feed.tokens.device)]
            np.testing.assert_array_equal(ours.cpu().numpy(), wanted.numpy())
