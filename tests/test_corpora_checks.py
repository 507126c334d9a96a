"""Corpora that do not fit the plan or each other are refused when it is made, in one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.sweeps import settings
from scaling_lab.core.errors import UserError
from scaling_lab.core.evaluation import EvalSpec
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.core.sources.prepared import Prepared
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.sources.tokens import TokenFile
from scaling_lab.corpora.documents import LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, prepare
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.settings import ModelSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text of some thousand tokens as bytes, under a tokenizer, again under the same one, and under another."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = [f"{i} times {i} is {i * i}" for i in range(300)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    for name, tokenizer, vocab_size in (
        ("bytes", "bytes", 0),
        ("bpe", "bpe", 300),
        ("same", str(folder / "bpe" / "tokenizer.json"), 0),
        ("smaller", "bpe", 280),
    ):
        chosen = PrepareSettings(tokenizer=tokenizer, vocab_size=vocab_size, validation_fraction=0.2)
        prepare(LocalText(folder / "a.jsonl"), folder / name, chosen)
    return folder


def refused(**changes) -> str:
    with pytest.raises(UserError) as error:
        make_plan(settings(max_epochs=1e9, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def sets(*sources) -> EvalSpec:
    return EvalSpec(sets=tuple({"name": f"set{k}", "source": s} for k, s in enumerate(sources)))


def of(source) -> dict:
    return {"kind": source.kind, **vars(source)}


def test_a_context_longer_than_the_validation_split(folder):
    source = Prepared(str(folder / "bytes"))
    tokens = source.n_tokens("validation")
    assert source.n_tokens("train") > tokens + 2
    message = refused(data=source, model=ModelSettings(context=tokens))
    assert (
        f"data=prepared: the validation split has {tokens:,} tokens, fewer than one window of model.context={tokens}"
        in message
    )
    # One token less fits: a window and its last target.
    make_plan(settings(data=source, model=ModelSettings(context=tokens - 1), max_epochs=1e9))
    message = refused(eval=sets(of(source)), data=PySource(), model=ModelSettings(context=tokens))
    assert message.startswith(f"eval.sets: set0: the validation split has {tokens:,} tokens")
    mixture = Mixture((ContextTree(), source))
    message = refused(data=mixture, model=ModelSettings(context=tokens))
    assert message.startswith(f"data=mixture, prepared: the validation split has {tokens:,} tokens")


def test_an_evaluation_set_beyond_the_models_vocabulary():
    message = refused(data=ContextTree(), eval=sets(of(PySource())))
    assert (
        "eval.sets: set0 has a vocabulary of 256, larger than the model's 33 (that of data=context_tree)"
        in message
    )


def test_an_evaluation_set_of_another_tokenizer(folder):
    bpe = Prepared(str(folder / "bpe"))
    for other, theirs in ((Prepared(str(folder / "smaller")), "sha256 "), (PySource(), "bytes")):
        message = refused(data=bpe, eval=sets(of(other)))
        assert f"eval.sets: set0 has a different tokenizer ({theirs}" in message
        assert "tokenizer=FOLDER/tokenizer.json" in message
    same = Prepared(str(folder / "same"))
    assert same.tokenizer == bpe.tokenizer
    assert make_plan(settings(data=bpe, eval=sets(of(same)), max_epochs=1e9)).runs
    # Bytes match bytes, with or without a separator token.
    by_bytes = Prepared(str(folder / "bytes"))
    assert make_plan(settings(data=by_bytes, eval=sets(of(PySource())), max_epochs=1e9)).runs


def test_the_tokenizer_of_a_users_token_file_is_unknown(tmp_path):
    np.save(tmp_path / "t.npy", (np.arange(20_000) % 50).astype(np.uint8))
    source = TokenFile(str(tmp_path / "t.npy"), 50)
    assert make_plan(settings(eval=sets(of(source)))).runs


def test_a_missing_folder_is_named_as_the_evaluation_sets(tmp_path):
    message = refused(eval=sets({"kind": "prepared", "path": str(tmp_path / "nowhere")}))
    assert message.startswith(f"eval.sets: set0: path='{tmp_path}/nowhere' has no meta.json")
