"""A plan before its corpus is there: what it says, what refuses to train on it, and that its runs stay once it is prepared."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

import scaling_lab as sl
from scaling_lab.cli import main as console
from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching import worker

SMALL = [
    *("model.context=32", "design.budgets_flops=[2e8]", "design.sizes_per_budget=4", "design.noise_seeds=1"),
    *("device=cpu", "compile=false", "eval.tokens=2048", "design.n_opt_at_1e12=2e5"),
]
EXPECTED = ["data=prepared", "data.path=OUT", "data.expected_vocab_size=300"]


def main(argv: list[str]) -> int:
    """The command line, with OUT as the folder of this test (sources are cached in a process by their path)."""
    return console.main([word.replace("OUT", str(Path("prepared").absolute())) for word in argv])


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch) -> Path:
    """A file of text that is not prepared yet: 500 pieces of the standard library as documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALING_LAB_CACHE_DIR", str(tmp_path / "cache"))
    library = PySource().text("train")[:500_000].decode("utf-8", "ignore").replace("\0", "")
    pieces = [library[k : k + 1000].strip() for k in range(0, len(library), 1000)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(pieces), encoding="utf-8")
    return tmp_path / "text.txt"


def command_in(message: str, name: str) -> list[str]:
    """The words of the last `scaling-lab NAME ...` in a message."""
    line = message[message.rindex(f"scaling-lab {name}") :].splitlines()[0].partition(" (about")[0]
    return shlex.split(line)[1:]


def test_plan_then_prepare_then_train_the_same_runs(tmp_path, capsys):
    assert main(["plan", "sweep=s", *SMALL, *EXPECTED, "data.expected_source=text.txt"]) == 0
    printed = capsys.readouterr().out
    store = RunStore(tmp_path / "results/s")
    before = json.loads(store.plan_path.read_text())
    assert before["data_fingerprint"] == "not prepared"
    assert {run["spec"]["shape"]["vocab_size"] for run in before["runs"]} == {300}
    longest = max(run["spec"]["train_tokens"] for run in before["runs"])
    note = next(note for note in before["notes"] if note.startswith("corpus not prepared"))
    assert "of tokenizing on two cores, as measured" in note
    prepare = command_in(note, "prepare-data")
    needed = int(next(w for w in prepare if w.startswith("max_tokens=")).partition("=")[2])
    assert needed == 210_000 >= longest / 4  # 1% of them are the 2,048 tokens of an evaluation
    assert "corpus not prepared" in printed

    # Nothing trains before it is there: the command, a worker, the library.
    assert main(["sweep", "sweep=s"]) == 2
    refusal = capsys.readouterr().err
    assert command_in(refusal, "prepare-data") == prepare
    with pytest.raises(UserError, match="is not prepared"):
        worker.train_pending(store, store.read_plan())
    with pytest.raises(UserError, match="is not prepared"):
        sl.train(store.folder, workers=0, progress=False)
    assert not store.run_ids_with_record()

    # The line works; the plan keeps its runs, which train.
    assert main(prepare) == 0
    sl.train(store.folder, workers=0, progress=False)
    after = json.loads(store.plan_path.read_text())
    assert after["runs"] == before["runs"]
    assert len(after["data_fingerprint"]) == 64
    assert not any(note.startswith("corpus not prepared") for note in after["notes"])
    records = store.load_records(curve=False)[0]
    assert {r.environment.data_fingerprint for r in records} == {after["data_fingerprint"]}
    # With the same options it is the same sweep.
    assert main(["sweep", "sweep=s", *SMALL, *EXPECTED, "data.expected_source=text.txt"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_another_corpus_than_planned_is_refused_with_the_line_that_plans_again(tmp_path, capsys):
    assert main(["plan", "sweep=s", *SMALL, *EXPECTED, "--quiet"]) == 0
    assert main(["prepare-data", "path=text.txt", "out=OUT", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["sweep", "sweep=s"]) == 2
    refusal = capsys.readouterr().err
    assert "the corpus's vocabulary (planned for 300, it has 257)" in refusal
    assert main([*command_in(refusal, "plan"), "--quiet"]) == 0
    plan = RunStore(tmp_path / "results/s").read_plan()
    assert {run.spec.shape.vocab_size for run in plan.runs} == {257}
    assert len(plan.data_fingerprint) == 64


def test_evaluation_sets_are_checked_once_the_corpus_is_there(capsys):
    """Only then is its tokenizer known."""
    assert main(["prepare-data", "path=text.txt", "out=OUT-other", "--quiet"]) == 0
    options = [*EXPECTED, "eval.sets=[{name: other, kind: prepared, path: OUT-other}]", "--quiet"]
    assert main(["plan", "sweep=s", *SMALL, *options]) == 0
    bpe = ["tokenizer=bpe", "vocab_size=300", "tokenizer_mb=0.1"]
    assert main(["prepare-data", "path=text.txt", "out=OUT", *bpe, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["sweep", "sweep=s"]) == 2
    assert "eval.sets: other has a different tokenizer (bytes) than data=prepared" in capsys.readouterr().err


def test_a_corpus_that_is_too_small_is_refused(capsys):
    """The plan needs 0.001 epochs, thousands of times what its longest run reads."""
    options = [*EXPECTED[:2], "data.expected_vocab_size=257", "data.max_epochs=0.001", "--quiet"]
    assert main(["plan", "sweep=s", *SMALL, *options]) == 0
    assert main(["prepare-data", "path=text.txt", "out=OUT", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["sweep", "sweep=s"]) == 2
    assert "the corpus's size (planned for" in capsys.readouterr().err


def test_expected_tokens_limit_the_runs(tmp_path, capsys):
    """As a corpus of that size would: runs of more than 4 epochs are not planned."""
    assert main(["plan", "sweep=s", *SMALL, *EXPECTED, "data.expected_tokens=60k", "data.max_epochs=30"]) == 0
    plan = RunStore(tmp_path / "results/s").read_plan()
    assert max(run.spec.train_tokens for run in plan.runs) <= 30 * 60_000
    assert "assumes 60K training tokens in a vocabulary of 300" in capsys.readouterr().out
    assert main(["plan", "sweep=t", *SMALL, *EXPECTED, "data.expected_tokens=100"]) == 2
    assert "more than data.max_epochs=4 epochs" in capsys.readouterr().err


def test_a_missing_corpus_of_which_nothing_is_known_is_refused(capsys):
    assert main(["plan", "sweep=s", *SMALL, "data=prepared", "data.path=OUT"]) == 2
    assert "has no meta.json" in capsys.readouterr().err
    assert main(["plan", "sweep=s", *SMALL, *EXPECTED[:2], "data.expected_tokens=1M"]) == 2
    assert "data.expected_vocab_size=" in capsys.readouterr().err
    assert main(["train", *EXPECTED, "model.width=16", "train_tokens=10k"]) == 2
    assert "has no meta.json" in capsys.readouterr().err


def test_two_corpora_that_are_not_there_are_two_sweeps(capsys):
    paths = "data.path=prepared/a,prepared/b"
    assert main(["plan", "sweep=s", *SMALL, "data=prepared", paths, "data.expected_vocab_size=300"]) == 2
    assert "different corpora" in capsys.readouterr().err


def test_a_token_file_can_come_later_too(tmp_path, capsys):
    """It names its vocabulary itself; there is nothing to prepare it with."""
    options = ["data=tokens", "data.path=t.npy", "data.vocab_size=300", "data.expected_tokens=10M"]
    assert main(["plan", "sweep=s", *SMALL, *options]) == 0
    assert "corpus not prepared" in capsys.readouterr().out
    assert main(["sweep", "sweep=s"]) == 2
    assert "data.path='t.npy': there is no such file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="paths are compared as text")
@pytest.mark.parametrize("name", ["fineweb_edu_8k", "fineweb_edu_16k", "fineweb_edu_32k"])
def test_fineweb_edu_is_planned_before_it_is_there(name, capsys):
    """Its line is understood by prepare-data, up to the download."""
    assert main(["plan", "sweep=s", "gpu=h100", f"data={name}", "design.budgets_flops=[1e16]"]) == 0
    words = command_in(capsys.readouterr().out, "prepare-data")
    assert words[1:4] == ["source=fineweb_edu", "tokenizer=bpe", f"vocab_size={int(name[12:-1]) * 1024}"]
    assert words[-1] == f"out=prepared/{name}"
    main([*words, "validation_fraction=2"])
    assert "validation_fraction=2.0 must be in (0, 1)" in capsys.readouterr().err
