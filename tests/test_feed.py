"""How training tokens reach the device: the same windows from every feed, once per epoch, with repetition and noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import scaling_lab.training.data.feed as feed_module
from helpers.feeds import (
    BATCH,
    CHUNK_STEPS,
    CONTEXT,
    CPU,
    GENERATED,
    all_windows,
    gathered,
    spec_of,
)
from helpers.runs import interrupted_at, losses, train
from scaling_lab.cli.main import main
from scaling_lab.core.sources.prepared import Prepared
from scaling_lab.core.sources.tokens import TokenFile
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.corpora.documents import LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, prepare
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.data.feed import ChunkFeed, ResidentFeed, open_feed
from scaling_lab.training.measure.evaluation import EvaluationSuite
from scaling_lab.training.models import build_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict:
    """The same tokens as one file and as a prepared folder of many shards."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"{i} squared is {i * i}, and cubed {i**3}"}) for i in range(220)]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = PrepareSettings(validation_fraction=0.2, shard_tokens=700)
    prepare(LocalText(folder / "a.jsonl"), folder / "out", settings)
    shards = {
        s: np.concatenate([np.fromfile(p, "<u2") for p in sorted((folder / "out").glob(f"{s}-*.bin"))])
        for s in ("train", "validation")
    }
    assert len(list((folder / "out").glob("train-*.bin"))) > 5
    for split, tokens in shards.items():
        np.save(folder / f"{split}.npy", tokens)
    file = TokenFile(str(folder / "train.npy"), 257, validation_path=str(folder / "validation.npy"))
    return {"tokens": file, "prepared": Prepared(str(folder / "out"))}


@pytest.fixture
def in_chunks(monkeypatch):
    """Text is read in chunks of three steps too, like a corpus that is too large for the device."""
    monkeypatch.setattr(feed_module, "RESIDENT_TOKENS", 0)
    monkeypatch.setattr(feed_module, "CHUNK_TOKENS", CHUNK_STEPS * BATCH * CONTEXT + 5)


# -- the same windows


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", ["tokens", "prepared"])
def test_resident_and_chunked_feeds_give_the_same_windows(sources, monkeypatch, name, noise):
    """Two slots with different seeds, over more than an epoch; from the start and from the middle."""
    specs = [spec_of(sources[name], 400, noise=noise, seed_data=seed) for seed in (0, 7)]
    resident = open_feed(specs, CPU)
    assert isinstance(resident, ResidentFeed)
    monkeypatch.setattr(feed_module, "RESIDENT_TOKENS", 0)
    monkeypatch.setattr(feed_module, "CHUNK_TOKENS", 2 * CHUNK_STEPS * BATCH * CONTEXT + 5)  # of two slots
    chunked = open_feed(specs, CPU)
    assert isinstance(chunked, ChunkFeed)
    assert chunked.max_block_steps == CHUNK_STEPS
    wanted = [all_windows(resident, slot, 400) for slot in (0, 1)]
    assert resident.order(0).n_windows < 400 * BATCH
    assert (wanted[0] != wanted[1]).any(1).mean() > 0.9
    for slot in (0, 1):
        np.testing.assert_array_equal(all_windows(chunked, slot, 400), wanted[slot])
        np.testing.assert_array_equal(chunked.windows(slot, 10, 9).numpy(), wanted[slot][10:19])
        np.testing.assert_array_equal(resident.windows(slot, 10, 9).numpy(), wanted[slot][10:19])
    again = open_feed(specs, CPU)
    for first in (107, 2, 3, 106, 399):  # resumed anywhere, with the slots at different steps
        for slot in (1, 0):
            steps = min(2, 400 - first)
            part = wanted[slot].reshape(400, BATCH, -1)[first : first + steps]
            np.testing.assert_array_equal(gathered(again, slot, first, steps), part)


def test_a_shard_boundary_inside_a_window_changes_nothing(sources):
    """Windows computed from the flat file: window w has the context + 1 tokens from w * context on."""
    flat = np.load(sources["tokens"].path)
    spec = spec_of(sources["prepared"], 200)
    feed = open_feed([spec], CPU)
    order = feed.order(0).windows(0, 200 * BATCH)
    by_hand = np.array([flat[w * CONTEXT : (w + 1) * CONTEXT + 1] for w in order])
    np.testing.assert_array_equal(all_windows(feed, 0, 200), by_hand)
    assert (700 // CONTEXT) in order  # this one spans two shards


@pytest.mark.parametrize("name", GENERATED)
def test_generated_windows_start_with_their_documents(in_chunks, name):
    source = GENERATED[name]
    feed = open_feed([spec_of(source, 10, seed_data=3)], CPU)
    assert isinstance(feed, ChunkFeed)
    wanted = source.documents("train", feed.order(0).windows(0, 10 * BATCH), CONTEXT + 1)
    np.testing.assert_array_equal(all_windows(feed, 0, 10), wanted)


# -- the same losses


def test_training_from_chunks_is_the_same_bit_for_bit(sources, tmp_path, monkeypatch):
    spec = spec_of(sources["prepared"], noise=0.1)
    resident = train(RunStore(tmp_path / "resident"), spec)
    monkeypatch.setattr(feed_module, "RESIDENT_TOKENS", 0)
    monkeypatch.setattr(feed_module, "CHUNK_TOKENS", CHUNK_STEPS * BATCH * CONTEXT)
    assert losses(train(RunStore(tmp_path / "chunks"), spec)) == losses(resident)
    store = RunStore(tmp_path / "stopped")
    interrupted_at(store, spec, 7)
    assert store.state(spec.run_id()).state == "interrupted"
    assert losses(train(store, spec)) == losses(resident)


@pytest.mark.parametrize("name", ["tokens", "context_tree"])
def test_stacks_read_each_members_own_windows(sources, tmp_path, in_chunks, name):
    """Three members, one of them shorter: the same as if each were trained alone."""
    data = {**sources, **GENERATED}[name]
    execution = Execution(stack="s", stack_size=3)
    specs = [
        spec_of(data, seed_data=1, seed_init=1),
        spec_of(data, seed_data=2),
        spec_of(data, 11, seed_data=3),
    ]
    runs = tuple(PlannedRun(spec, execution) for spec in specs)
    store = RunStore(tmp_path / "stack")
    train_pending(store, Plan("t", runs, specs[0].convention, data.fingerprint()))
    for spec in specs:
        alone = train(RunStore(tmp_path / "alone"), spec)
        record = store.read_record(spec.run_id())
        ours = [p.train_loss_nats for p in record.curve]
        assert ours == pytest.approx([p.train_loss_nats for p in alone.curve], rel=5e-5)
        assert record.final_val_loss_nats == pytest.approx(alone.final_val_loss_nats, rel=5e-5)


# -- epochs and repetition


@pytest.mark.parametrize("chunks", [False, True], ids=["resident", "chunks"])
def test_every_window_occurs_exactly_once_per_epoch(sources, request, chunks):
    if chunks:
        request.getfixturevalue("in_chunks")
    flat = np.load(sources["tokens"].path)
    n = (flat.size - 1) // CONTEXT
    feed = open_feed([spec_of(sources["tokens"], -(-2 * n // BATCH))], CPU)
    assert isinstance(feed, ChunkFeed) == chunks
    seen = all_windows(feed, 0, -(-2 * n // BATCH))
    everything = sorted(flat[w * CONTEXT : (w + 1) * CONTEXT + 1].tolist() for w in range(n))
    for epoch in (0, 1):
        assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == everything
    assert (seen[:n] != seen[n : 2 * n]).any()


@pytest.mark.parametrize("name", ["tokens", "prepared", "context_tree", "zipf_facts"])
def test_unique_tokens_are_repeated_equally_often(sources, name):
    """U unique tokens for D/U epochs: the first U / context windows of the corpus, D/U times each."""
    data, unique, epochs = {**sources, **GENERATED}[name], 12 * CONTEXT, 5
    spec = spec_of(data, 12 * epochs // BATCH, unique_tokens=unique)
    assert spec.train_tokens == epochs * unique
    feed = open_feed([spec], CPU)
    order = feed.order(0).windows(0, 12 * epochs)
    windows, counts = np.unique(order, return_counts=True)
    assert windows.tolist() == list(range(12))
    assert counts.tolist() == [epochs] * 12
    if hasattr(data, "documents"):
        wanted = data.documents("train", np.arange(12), CONTEXT + 1)
    else:
        flat = np.asarray(data.tokens("train"))
        wanted = np.array([flat[w * CONTEXT : (w + 1) * CONTEXT + 1] for w in range(12)])
    seen = all_windows(feed, 0, spec.steps)
    assert sorted(seen.tolist()) == sorted(np.repeat(wanted, epochs, axis=0).tolist())


@pytest.mark.parametrize("command", ["plan", "train", "sweep"])
def test_too_many_epochs_are_refused_with_the_missing_tokens(tmp_path, capsys, command):
    """20,480 tokens from 2,048 unique ones, at most 4 epochs: 20,480 / 4 = 5,120 are needed, 3,072 more."""
    sizes = ["model.width=16", "model.depth=1", "train_tokens=20480", "recipe.batch_tokens=512"]
    if command != "train":
        sizes = [
            "design.budgets_flops=[2e9]", "design.sizes.width_multiple=4", "design.sizes.min_depth=1",
            "design.n_opt_at_1e12=100K",
        ]  # fmt: skip
    options = [f"sweep={command}", f"results_dir={tmp_path}", "device=cpu", "data.unique_tokens=2048", *sizes]
    assert main([command, *options]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    if command == "train":
        assert (
            "10.0 epochs over a corpus of 2,048 (data.unique_tokens=2048, data.max_epochs=4); 3,072 more"
            in said.err
        )
    else:
        assert "more than data.max_epochs=4 epochs over the 2,048 tokens of data=pysource" in said.err
    assert not list(tmp_path.glob("*/runs/*/record.json"))


# -- noise


@pytest.mark.parametrize("name", ["tokens", "context_tree"])
def test_noise_replaces_the_same_share_in_every_epoch_and_feed(sources, request, name):
    data, share = {**sources, **GENERATED}[name], 0.25
    windows, epochs = 160, 3
    clean = spec_of(data, windows * epochs // BATCH, unique_tokens=windows * CONTEXT)
    noisy = replace(clean, noise=share)

    def by_window(spec) -> np.ndarray:
        """(epochs, windows, context + 1), in the order of the corpus."""
        feed = open_feed([spec], CPU)
        order = feed.order(0).windows(0, windows * epochs).reshape(epochs, windows)
        seen = all_windows(feed, 0, spec.steps).reshape(epochs, windows, -1)
        return np.stack([e[np.argsort(o)] for e, o in zip(seen, order, strict=True)])

    before, after = by_window(clean)[0], by_window(noisy)
    for epoch in after:
        np.testing.assert_array_equal(epoch, after[0])
    request.getfixturevalue("in_chunks")
    np.testing.assert_array_equal(by_window(noisy), after)
    # A random token equals the replaced one with probability 1 / vocabulary.
    changed = before[:, 1:] != after[0][:, 1:]
    expected = share * (1 - 1 / data.vocab_size)
    assert abs(changed.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / changed.size)
    assert after[0].max() < data.vocab_size
    new = after[0][:, 1:][changed]
    assert len(np.unique(new)) > 0.6 * min(data.vocab_size, new.size)
    if name == "context_tree":
        np.testing.assert_array_equal(
            after[0][:, 0], before[:, 0]
        )  # the first token of a document is never replaced
    else:
        np.testing.assert_array_equal(
            after[0][1:, 0], after[0][:-1, -1]
        )  # a token is the same as target and as input
    # A larger share replaces the same tokens and more.
    more = by_window(replace(clean, noise=2 * share))[0][:, 1:]
    np.testing.assert_array_equal(more[changed], after[0][:, 1:][changed])


@pytest.mark.parametrize("name", ["tokens", "prepared", "context_tree", "zipf_facts", "mixture"])
def test_validation_has_no_noise(sources, name):
    clean = spec_of({**sources, **GENERATED}[name])
    a, b = (EvaluationSuite(s, CPU) for s in (clean, replace(clean, noise=1.0)))
    model = build_model(clean.shape)
    parameters = dict(model.named_parameters())
    assert a.main.loss(model, parameters, vocab_size=300) == b.main.loss(model, parameters, vocab_size=300)
    assert a.floor_nats == b.floor_nats


def test_noise_costs_loss(tmp_path):
    """On a language with known entropy the noisy run ends with a higher loss on the same clean validation set."""
    spec = spec_of(GENERATED["context_tree"], 150)
    clean, noisy = (
        train(RunStore(tmp_path / n), s) for n, s in (("a", spec), ("b", replace(spec, noise=0.5)))
    )
    assert clean.val_floor_nats == noisy.val_floor_nats
    assert noisy.final_val_loss_nats > clean.final_val_loss_nats + 0.05
    assert clean.final_val_loss_nats > clean.val_floor_nats
