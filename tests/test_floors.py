"""Further measurements, recomputed by hand: floors, other distributions, scores of facts, bits per byte."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.reference_models import reference_logits, reference_loss, split_flat
from helpers.runs import train
from helpers.specs import tiny
from scaling_lab.core.evaluation import EvalSet, EvalSpec
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.context_tree import ContextTree, language_tables
from scaling_lab.core.sources.generation.documents import GeneratedSource
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.core.sources.prepared import Prepared
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.sources.tokens import TokenFile
from scaling_lab.core.sources.zipf_facts import ZipfFacts
from scaling_lab.core.spec import RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.corpora.documents import LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, prepare
from scaling_lab.training.measure.evaluation import ValidationSet, evaluation_steps
from scaling_lab.training.run.checkpoint import kept_path

CPU = torch.device("cpu")
CONTEXT = 16
TREE = ContextTree(symbols=6, order=2)
FACTS = ZipfFacts(facts=8, symbols=5, value_tokens=2)
SHAPE = GPTShape(width=8, depth=1, heads=1, context=CONTEXT, vocab_size=8)
FLOAT32_NATS = 5e-6


def spec_of(data, steps: int = 40, **changes) -> RunSpec:
    batch = 4 * CONTEXT
    return tiny(
        steps,
        **{"data": data, "shape": SHAPE, "batch_tokens": batch, "train_tokens": batch * steps, **changes},
    )


def validation(source, n: int, context: int = CONTEXT) -> np.ndarray:
    return source.documents("validation", np.arange(n), context + 1)


# -- the floor


class TreeOracle(nn.Module):
    """The language's own tables as a model: the logits are ln p of the leaf of the last `order` tokens."""

    def __init__(self, source: ContextTree) -> None:
        super().__init__()
        tables = language_tables(source)
        self.order, self.base, self.symbols = source.order, source.vocab_size, source.symbols
        self.leaf = torch.from_numpy(tables.leaf.astype(np.int64))
        # The start token is never generated, so it has probability 0.
        log_p = np.pad(tables.log_p, ((0, 0), (0, 1)), constant_values=-np.inf)
        self.table = nn.Parameter(torch.from_numpy(log_p), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        before = torch.full((len(tokens), self.order - 1), self.symbols)
        past = torch.cat([before, tokens], dim=1).unfold(1, self.order, 1)
        state = (past * self.base ** torch.arange(self.order - 1, -1, -1)).sum(-1)
        return self.table[self.leaf[state]]


@pytest.mark.parametrize("source", [TREE, ContextTree(), ContextTree(symbols=10, order=1)], ids=repr)
def test_an_oracle_built_from_the_tables_scores_exactly_the_floor(source):
    held_out = ValidationSet(source, 48, EvalSpec(tokens=48 * 300), CPU)
    oracle = TreeOracle(source)
    loss, sem = held_out.loss(oracle, dict(oracle.named_parameters()), vocab_size=source.vocab_size)
    assert loss == pytest.approx(held_out.floor_nats(), abs=1e-6)
    # The floor is the entropy, within the error of this many documents.
    assert abs(loss - source.entropy_nats(49)) < 4 * sem
    # A slightly wrong model is above it: the tables flattened by 5%.
    flatter = {"table": torch.log_softmax(0.95 * oracle.table, -1)}
    assert held_out.loss(oracle, flatter)[0] > loss + 1e-4


class ProbingOracle(nn.Module):
    """Any generated source as a model: it queries the source for ln p of every possible next token."""

    def __init__(self, source: GeneratedSource) -> None:
        super().__init__()
        self.source = source

    def forward(self, tokens: Tensor) -> Tensor:
        n, length = tokens.shape
        out = torch.full((n, length, self.source.vocab_size), -math.inf, dtype=torch.float64)
        for t in range(length):
            for v in range(self.source.vocab_size):
                asked = np.concatenate([tokens[:, : t + 1].numpy(), np.full((n, 1), v)], axis=1)
                out[:, t, v] = torch.from_numpy(self.source.log_probs(asked)[:, -1])
        return out


@pytest.mark.parametrize("source", [FACTS, Mixture((TREE, FACTS), (1.0, 2.0))], ids=["zipf_facts", "mixture"])
def test_an_oracle_that_queries_the_source_scores_exactly_the_floor(source):
    held_out = ValidationSet(source, CONTEXT, EvalSpec(tokens=CONTEXT * 40), CPU)
    oracle = ProbingOracle(source)
    probabilities = oracle(torch.from_numpy(validation(source, 40))[:, :-1].long()).exp().sum(-1)
    assert probabilities.numpy() == pytest.approx(np.ones((40, CONTEXT)), abs=1e-9)
    assert held_out.loss(oracle, {})[0] == pytest.approx(held_out.floor_nats(), abs=1e-6)


def test_the_recorded_floor_is_that_of_the_validation_windows(tmp_path):
    spec = spec_of(TREE, eval=EvalSpec(tokens=CONTEXT * 50))
    record = train(RunStore(tmp_path), spec)
    by_hand = -TREE.log_probs(validation(TREE, 50)).mean()
    assert record.val_floor_nats == pytest.approx(by_hand, rel=1e-12)
    text = train(RunStore(tmp_path), tiny(2))
    assert text.val_floor_nats is None


# -- other distributions


def test_other_sets_are_logged_at_each_visit_and_recorded(tmp_path):
    """Recomputed from the parameters in two checkpoints, an intermediate one and the last."""
    other = ContextTree(symbols=7, order=1, seed=9)
    sets = ("zipf_facts", {"name": "other", "kind": "context_tree", "symbols": 7, "order": 1, "seed": 9})
    shape = replace(SHAPE, vocab_size=34)
    spec = spec_of(
        TREE, shape=shape, keep_steps=(20,), eval=EvalSpec(tokens=CONTEXT * 20, points=3, sets=sets, max_cost_fraction=9)
    )  # fmt: skip
    assert spec.eval.sets == (EvalSet("zipf_facts", ZipfFacts()), EvalSet("other", other))
    store = RunStore(tmp_path)
    record = train(store, spec)
    visits = {p.step: p for p in record.curve if p.val_loss_nats is not None}
    assert list(visits) == list(evaluation_steps(spec)) == [20, 28, 40]
    assert all({"zipf_facts", "other", "zipf_facts.exact_match"} <= p.evals.keys() for p in visits.values())
    assert all(p.evals is None for p in record.curve if p.step not in visits)
    folder = store.run_folder(spec.run_id()) / "checkpoint"
    for step, path in ((20, kept_path(folder, 20)), (40, folder / "step-40.pt")):
        last = split_flat(spec, torch.load(path, weights_only=True)["flat"])
        for name, source in (("zipf_facts", ZipfFacts()), ("other", other)):
            by_hand = reference_loss(shape, last, validation(source, 20))
            assert visits[step].evals[name] == pytest.approx(by_hand, abs=FLOAT32_NATS)
        assert visits[step].val_loss_nats == pytest.approx(
            reference_loss(shape, last, validation(TREE, 20)), abs=FLOAT32_NATS
        )
    for name in ("zipf_facts", "other"):
        assert record.metrics[f"eval.{name}"] == visits[40].evals[name]
    assert record.metrics["zipf_facts.exact_match"] == visits[40].evals["zipf_facts.exact_match"]
    assert store.read_record(spec.run_id()) == record
    assert len({visits[40].evals["zipf_facts"], visits[40].evals["other"], visits[40].val_loss_nats}) == 3


# -- facts


def test_exact_match_and_value_loss_by_hand(tmp_path):
    """Values are the tokens between "is" and the full stop; a truncated statement does not count."""
    context = 25
    shape = replace(SHAPE, context=context, vocab_size=FACTS.vocab_size, width=16)
    spec = spec_of(
        FACTS, shape=shape, batch_tokens=8 * context, train_tokens=8 * context * 120, eval=EvalSpec(tokens=context * 30)
    )  # fmt: skip
    store = RunStore(tmp_path)
    record = train(store, spec)
    path = store.run_folder(spec.run_id()) / "checkpoint" / f"step-{spec.steps}.pt"
    last = split_flat(spec, torch.load(path, weights_only=True)["flat"])
    matches, nats = [], []
    word_is, full_stop = FACTS.symbols, FACTS.symbols + 1
    for document in validation(FACTS, 30, context):
        logits = reference_logits(shape, last, document[:-1])
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        for at in np.flatnonzero(document == word_is):
            if at + 3 >= document.size or document[at + 3] != full_stop:
                continue
            value = document[at + 1 : at + 3]
            # Position t predicts the token after it.
            predicted = log_p[at : at + 2]
            matches.append((predicted.argmax(1) == value).all())
            nats += [-predicted[k, value[k]] for k in range(2)]
    assert record.metrics["exact_match"] == pytest.approx(np.mean(matches), abs=1e-6)
    assert record.metrics["value_loss_nats"] == pytest.approx(np.mean(nats), abs=FLOAT32_NATS)
    assert 0.02 < record.metrics["exact_match"] < 0.98
    assert record.curve[-1].evals["exact_match"] == record.metrics["exact_match"]


# -- bits per byte


def test_bits_per_byte_by_hand(tmp_path):
    texts = [f"{i} times {i} is {i * i} and so on, naïve as it is" for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    settings = PrepareSettings(tokenizer="bpe", vocab_size=300, validation_fraction=0.2, shard_tokens=500)
    prepare(LocalText(tmp_path / "a.jsonl"), tmp_path / "out", settings)
    source = Prepared(str(tmp_path / "out"))
    spec = spec_of(source, shape=replace(SHAPE, vocab_size=source.vocab_size))
    record = train(RunStore(tmp_path / "runs"), spec)
    from tokenizers import Tokenizer

    tokens = np.concatenate(
        [np.fromfile(p, "<u2") for p in sorted((tmp_path / "out").glob("validation-*.bin"))]
    )
    decoded = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).decode(tokens.tolist())
    nats_per_byte = record.final_val_loss_nats * tokens.size / len(decoded.encode())
    assert record.metrics["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-9)
    assert len(decoded.encode()) > 1.3 * tokens.size
    # The same tokens as a user's array: known only if the user gives bytes per token.
    np.asarray(source.tokens("train")).tofile(tmp_path / "train.bin")
    tokens.tofile(tmp_path / "validation.bin")
    mine = TokenFile(
        str(tmp_path / "train.bin"), source.vocab_size, validation_path=str(tmp_path / "validation.bin")
    )
    known = replace(mine, bytes_per_token=len(decoded.encode()) / tokens.size)
    said = train(RunStore(tmp_path / "runs"), replace(spec, data=known))
    assert said.metrics["bits_per_byte"] == pytest.approx(record.metrics["bits_per_byte"], rel=1e-12)
    assert "bits_per_byte" not in train(RunStore(tmp_path / "runs"), replace(spec, data=mine)).metrics
    # One byte is one token of Python source.
    text = train(RunStore(tmp_path / "runs"), tiny(3))
    assert text.spec.data == PySource()
    assert text.metrics["bits_per_byte"] == pytest.approx(text.final_val_loss_nats / math.log(2), rel=1e-12)
    # A generated language has no text, so no bytes.
    assert "bits_per_byte" not in train(RunStore(tmp_path / "runs"), spec_of(TREE, 3)).metrics
