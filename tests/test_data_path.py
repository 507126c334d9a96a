"""The path of the data, recomputed by hand: tokens, windows, seeds, precision, learning rates, claims.

Losses are recomputed by `helpers.reference_models.reference_loss` (plain NumPy) from the parameters in the checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.reference_models import model_parameters, reference_loss, split_flat
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.sources.tokens import TokenFile
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.data.feed import device_tokens
from scaling_lab.training.data.order import WindowOrder
from scaling_lab.training.engine.gradient import token_loss
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.models import build_model
from scaling_lab.training.run.loop import train_run
from scaling_lab.training.run.session import open_session, train_block

CONTEXT, VOCAB = 16, 40
TRAIN_WINDOWS, VALIDATION_WINDOWS = 40, 20
SHAPE = GPTShape(width=8, depth=1, heads=2, context=CONTEXT, vocab_size=VOCAB)
# bfloat16 keeps 8 bits: a mean over some hundred tokens differs from float32's by about 1e-4 to 1e-3 nats. Float32
# itself agrees with float64 to a few 1e-7.
FLOAT32_NATS, BFLOAT16_NATS = 5e-6, 0.05


@dataclass(frozen=True)
class Corpus:
    source: TokenFile
    train: np.ndarray
    validation: np.ndarray


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """One file, split at its tail. Training counts up through the ids below 20, validation is noise among the others;
    the last window of each is unlike the rest, so that leaving it out shows. Each ends with its last target."""
    rng = np.random.default_rng(0)
    train = np.arange(TRAIN_WINDOWS * CONTEXT + 1) % 20
    train[-CONTEXT:] = rng.integers(30, VOCAB, CONTEXT)
    validation = rng.integers(20, VOCAB, VALIDATION_WINDOWS * CONTEXT + 1)
    validation[-CONTEXT:] = 3
    path = tmp_path_factory.mktemp("corpus") / "tokens.npy"
    tokens = np.concatenate([train, validation])
    np.save(path, tokens.astype(np.uint16))
    fraction = validation.size / tokens.size
    return Corpus(TokenFile(str(path), VOCAB, validation_fraction=fraction), train, validation)


def spec_of(corpus: Corpus, steps: int = 1, batch_windows: int = 8, **changes) -> RunSpec:
    batch_tokens = batch_windows * CONTEXT
    base = RunSpec(
        sweep="t", role="isoflop", budget_flops=1e6, shape=SHAPE, data=corpus.source, schedule=Cosine(),
        optimizer=OptimizerSpec(peak_lr=0.02), batch_tokens=batch_tokens, train_tokens=batch_tokens * steps,
        eval=EvalSpec(tokens=10**6, points=1),
    )  # fmt: skip
    return replace(base, **changes)


def windows_of(tokens: np.ndarray, which) -> np.ndarray:
    """(n, CONTEXT + 1): window w is the inputs from w * CONTEXT on and one more token, the last target."""
    return np.array([tokens[w * CONTEXT : (w + 1) * CONTEXT + 1] for w in which])


def train(store: RunStore, spec: RunSpec) -> tuple[RunRecord, dict[str, torch.Tensor]]:
    """The record and the tensors of the checkpoint after the last step."""
    claim = store.claim(spec)
    assert claim is not None
    record = train_run(PlannedRun(spec, Execution()), store, claim)
    path = store.run_folder(spec.run_id()) / "checkpoint" / f"step-{spec.steps}.pt"
    return record, torch.load(path, weights_only=True)


def initial_model(spec: RunSpec) -> torch.nn.Module:
    torch.manual_seed(spec.seed_init)
    return build_model(spec.shape)


# -- data


@pytest.mark.parametrize("shape", [SHAPE, GPT2Shape(8, 1, 2, CONTEXT, VOCAB)], ids=["gpt", "gpt2"])
def test_final_loss_is_the_validation_splits_at_the_last_parameters(tmp_path, corpus, shape):
    spec = spec_of(corpus, steps=30, shape=shape)
    record, saved = train(RunStore(tmp_path), spec)
    last = split_flat(spec, saved["flat"])
    by_hand = reference_loss(shape, last, windows_of(corpus.validation, range(VALIDATION_WINDOWS)))
    assert record.final_val_loss_nats == pytest.approx(by_hand, abs=FLOAT32_NATS)
    # The check is sensitive: the training split's loss and that of the validation split without its last window differ.
    assert by_hand > reference_loss(shape, last, windows_of(corpus.train, range(TRAIN_WINDOWS))) + 0.5
    assert abs(by_hand - reference_loss(shape, last, windows_of(corpus.validation, range(19)))) > 0.01


def test_an_epoch_is_every_window_of_the_training_split_once(tmp_path, corpus):
    """A batch of the whole split: the first loss is the mean over all its windows, whatever their order."""
    spec = spec_of(corpus, batch_windows=TRAIN_WINDOWS)
    record, _ = train(RunStore(tmp_path), spec)
    by_hand = reference_loss(
        SHAPE, model_parameters(initial_model(spec)), windows_of(corpus.train, range(TRAIN_WINDOWS))
    )
    assert record.curve[0].train_loss_nats == pytest.approx(by_hand, abs=FLOAT32_NATS)


def test_each_seed_controls_its_own_part(tmp_path, corpus):
    """seed_data selects the windows of the first batch, seed_init the initial parameters."""
    seen = []
    for i, seeds in enumerate(({}, {"seed_init": 1}, {"seed_data": 1})):
        spec = spec_of(corpus, **seeds)
        record, _ = train(RunStore(tmp_path / str(i)), spec)
        first_batch = WindowOrder(TRAIN_WINDOWS, spec.seed_data).windows(0, 8)
        by_hand = reference_loss(
            SHAPE, model_parameters(initial_model(spec)), windows_of(corpus.train, first_batch)
        )
        assert record.curve[0].train_loss_nats == pytest.approx(by_hand, abs=FLOAT32_NATS)
        seen.append(by_hand)
    assert min(abs(a - b) for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2]))) > 1e-3


def test_token_ids_of_every_dtype_survive():
    """The largest ids of each dtype that a vocabulary of 2^17 can hold, of uint16 those beyond int16 among them."""
    for dtype in (np.uint8, np.uint16, np.uint32, np.int32, np.int64):
        largest = min(np.iinfo(dtype).max, 2**17 - 1)
        tokens = np.array([0, 1, 100, largest // 2, largest // 2 + 1, largest - 1, largest], dtype=dtype)
        assert device_tokens(tokens, torch.device("cpu")).tolist() == tokens.tolist()


def test_token_ids_of_a_large_vocabulary_reach_the_model(tmp_path):
    """A uint16 file of a 65,536-token vocabulary: what the step gathers from is the file, and it trains."""
    vocab, context = 65_536, 8
    tokens = np.random.default_rng(0).integers(0, vocab, 401).astype(np.uint16)
    tokens[:4] = (32_767, 32_768, 60_001, 65_535)
    np.save(tmp_path / "t.npy", tokens)
    spec = RunSpec(
        sweep="t", role="isoflop", budget_flops=1e6, shape=GPTShape(2, 1, 1, context, vocab), schedule=Cosine(),
        data=TokenFile(str(tmp_path / "t.npy"), vocab, validation_fraction=0.2),
        optimizer=OptimizerSpec(peak_lr=0.02), batch_tokens=2 * context, train_tokens=2 * context,
    )  # fmt: skip
    session = open_session(spec, Execution())
    assert session.step.tokens.tolist() == tokens[:321].tolist()
    assert train_block(session, 0, 1)[0] == pytest.approx(np.log(vocab), abs=2)


# -- precision


def test_bfloat16_is_used_in_training_and_in_evaluation(tmp_path, corpus):
    """Losses that differ from the float64 ones by more than float32 can, yet by little."""
    spec = spec_of(corpus, steps=10, dtype="bfloat16")
    record, saved = train(RunStore(tmp_path), spec)
    first_batch = windows_of(corpus.train, WindowOrder(TRAIN_WINDOWS, 0).windows(0, 8))
    in_training = reference_loss(SHAPE, model_parameters(initial_model(spec)), first_batch)
    in_evaluation = reference_loss(
        SHAPE, split_flat(spec, saved["flat"]), windows_of(corpus.validation, range(VALIDATION_WINDOWS))
    )
    assert FLOAT32_NATS < abs(record.curve[0].train_loss_nats - in_training) < BFLOAT16_NATS
    assert FLOAT32_NATS < abs(record.final_val_loss_nats - in_evaluation) < BFLOAT16_NATS
    # Parameters and moments stay in float32: only the products are rounded.
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# -- learning rates, decay, clipping

GROUPS = OptimizerSpec(
    peak_lr=0.01, embedding_lr_ratio=3.0, head_lr_ratio=0.5, beta1=0.0, beta2=0.0, eps=1e-20, weight_decay=0.5
)


@pytest.mark.parametrize("shape", [SHAPE, GPT2Shape(8, 1, 2, CONTEXT, VOCAB)], ids=["gpt", "gpt2"])
def test_each_step_moves_each_group_by_its_own_rate(corpus, shape, monkeypatch):
    """With both betas 0 AdamW's update is the sign of the gradient: after the decay every element moves by exactly
    LR(t) * ratio, or, where the gradient is 0 (tokens not in the batch, dead ReLUs), not at all."""
    spec = spec_of(
        corpus, steps=12, shape=shape, optimizer=GROUPS, schedule=Cosine(warmup_fraction=0.25, final_fraction=0.1)
    )  # fmt: skip
    session = open_session(spec, Execution())
    real, path = TrainStep.__call__, [session.step.flat.clone()]

    def watched(self, starts, controls):
        told = real(self, starts, controls)
        path.append(self.flat.clone())
        return told

    monkeypatch.setattr(TrainStep, "__call__", watched)
    train_block(session, 0, 7)
    train_block(session, 7, 12)
    assert [spec.learning_rate(t) for t in (0, 2, 11)] == pytest.approx([0.01 / 3, 0.01, 0.001])
    for t in range(12):
        before, after = split_flat(spec, path[t]), split_flat(spec, path[t + 1])
        for name, p in before.items():
            group = name.split(".")[0]
            rate = spec.learning_rate(t) * {"embedding": 3.0, "positions": 3.0, "head": 0.5}.get(group, 1.0)
            decay = 0.5 if p.ndim == 2 else 0.0
            moved = np.abs(after[name] - p * (1 - rate * decay))
            at_rate, at_zero = np.abs(moved - rate) < 2e-6, moved < 2e-6
            assert (at_rate | at_zero).all(), (t, name)
            assert at_rate.mean() > 0.3, (t, name)


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_the_gradient_is_clipped_to_its_norm(tmp_path, corpus, clip_norm):
    """The first moment after one step is (1 - beta1) times the gradient that AdamW was given."""
    spec = spec_of(corpus, optimizer=OptimizerSpec(peak_lr=0.02, beta1=0.75, clip_norm=clip_norm))
    _, saved = train(RunStore(tmp_path), spec)
    model = initial_model(spec)
    rows = torch.from_numpy(windows_of(corpus.train, WindowOrder(TRAIN_WINDOWS, 0).windows(0, 8)))
    token_loss(model(rows[:, :-1]), rows[:, 1:]).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradient.norm() > 0.1
    expected = gradient * min(1.0, clip_norm / gradient.norm().item())
    torch.testing.assert_close(
        saved["first_moment"] / 0.25, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )


# -- execution


def test_threads_are_set_as_planned(corpus):
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            open_session(spec_of(corpus), Execution(threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_worker_starts_with_the_longest_run(tmp_path, corpus):
    store = RunStore(tmp_path)
    runs = tuple(PlannedRun(spec_of(corpus, steps), Execution()) for steps in (2, 1, 4, 3))
    made = train_pending(store, Plan("t", runs, runs[0].spec.convention, corpus.source.fingerprint()))
    assert [record.spec.steps for record in made] == [4, 3, 2, 1]
    begun = {
        run.spec.steps: json.loads((store.run_folder(run.run_id) / "claim-1.json").read_text())[
            "started_unix_s"
        ]
        for run in runs
    }
    assert sorted(begun, key=begun.__getitem__) == [4, 3, 2, 1]


# -- the store


def test_a_reused_pid_does_not_own_the_claim(tmp_path, corpus):
    """This process's pid, alive, but with another start time: the owner is gone."""
    store, spec = RunStore(tmp_path), spec_of(corpus)
    assert store.claim(spec) is not None
    assert store.state(spec.run_id()).state in ("claimed", "running")
    assert store.claim(spec) is None
    path = store.run_folder(spec.run_id()) / "claim-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getpid(), "pid_started": "1"}))
    assert store.state(spec.run_id()).state == "interrupted"
    claim = store.claim(spec)
    assert claim is not None
    assert claim.generation == 2


def test_a_curve_shorter_than_its_record_is_refused(tmp_path, corpus):
    store, spec = RunStore(tmp_path), spec_of(corpus, steps=3)
    record, _ = train(store, spec)
    path = store.run_folder(spec.run_id()) / "curve.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="2 of 3 points"):
        store.read_record(spec.run_id())
    records, problems = store.load_records()
    assert (records, [run_id for run_id, _ in problems]) == ([], [spec.run_id()])
    # A longer one is harmless: lines after the record's points are not the run's.
    path.write_text("".join([*lines, lines[-1]]))
    assert store.read_record(spec.run_id()) == record


def test_a_record_written_just_before_the_claim_is_respected(tmp_path, corpus, monkeypatch):
    """The former owner finishes while the claim file is being created: the run has ended, and nobody holds it."""
    store, spec = RunStore(tmp_path), spec_of(corpus)
    record = store.run_folder(spec.run_id()) / "record.json"
    real = os.link

    def slow_link(source, target, *args, **kwargs):
        if Path(target).name.startswith("claim-"):
            record.write_text("{}")
        return real(source, target, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", slow_link)
        assert store.claim(spec) is None
    assert record.exists()
    record.unlink()
    assert store.claim(spec) is not None
