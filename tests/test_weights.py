"""What a finished run keeps: its weights, enough to load it and get the record's loss; nothing; or a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import scaling_lab as sl
from helpers.runs import train
from helpers.specs import tiny
from scaling_lab.cli.main import main
from scaling_lab.core.parametrization import MuP
from scaling_lab.core.schedules import Constant
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import Execution, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.models import build_model
from scaling_lab.training.run.weights import WEIGHTS, load_model, read_safetensors, write_safetensors

TIED = tiny(20, shape=GPT2Shape(width=16, depth=2, heads=2))
SPECS = {"gpt": tiny(20, parametrization=MuP()), "tied": TIED}
# Loads a run folder in a process of its own, and prints the validation loss.
LOADER = """
import sys, torch
import scaling_lab as sl
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.measure.evaluation import EvaluationSuite
folder, run_id = sys.argv[1:]
store = RunStore(folder)
spec = store.read_record(run_id).spec
torch.set_num_threads(1)
model = sl.load_model(store.run_folder(run_id))
windows = EvaluationSuite(spec, torch.device("cpu")).set(None)
print(repr(windows.loss(model, dict(model.named_parameters()), dtype=spec.dtype, vocab_size=spec.shape.vocab_size)[0]))
"""


def files(store: RunStore, spec: RunSpec) -> list[str]:
    folder = store.run_folder(spec.run_id())
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", SPECS)
def test_a_fresh_process_loads_a_run_and_gets_the_loss_of_its_record(tmp_path, name):
    spec, store = SPECS[name], RunStore(tmp_path)
    record = train(store, spec, Execution(keep="weights"), checkpoint_every_s=0.0)
    assert files(store, spec) == ["claim-1.json", "curve.jsonl", "record.json", "spec.json", WEIGHTS]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), spec.run_id()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == record.final_val_loss_nats


def test_a_tied_head_is_stored_once_and_tensors_share_no_memory(tmp_path):
    store = RunStore(tmp_path)
    train(store, TIED, Execution(keep="weights"))
    path = store.run_folder(TIED.run_id()) / WEIGHTS
    tensors, about = read_safetensors(path)
    params = TIED.count().params.total
    assert sum(t.numel() for t in tensors.values()) == params
    assert path.stat().st_size < 4 * params + 4096
    assert json.loads(about["shape"])["kind"] == "gpt2"
    assert about["run_id"] == TIED.run_id()
    ends = {name: build_model(TIED.shape).get_parameter(name).shape for name in tensors}
    assert {name: t.shape for name, t in tensors.items()} == ends


def test_every_member_of_a_stack_keeps_its_own_weights(tmp_path):
    specs = [tiny(20, seed_init=seed) for seed in (0, 1)]
    runs = tuple(PlannedRun(s, Execution(stack="s", stack_size=2, keep="weights")) for s in specs)
    store = RunStore(tmp_path)
    train_pending(store, Plan("t", runs, specs[0].convention, specs[0].data.fingerprint()))
    flat = [
        torch.cat([p.flatten() for p in load_model(store.run_folder(s.run_id())).parameters()]) for s in specs
    ]
    assert not torch.equal(*flat)
    assert all(len(f) == s.count().params.total for f, s in zip(flat, specs, strict=True))


@pytest.mark.parametrize(
    ("keep", "left"), [("none", []), ("resume", ["checkpoint/step-20.json", "checkpoint/step-20.pt"])]
)
def test_other_choices(tmp_path, keep, left):
    spec, store = tiny(20), RunStore(tmp_path)
    train(store, spec, Execution(keep=keep), checkpoint_every_s=0.0)
    assert files(store, spec) == [*left, "claim-1.json", "curve.jsonl", "record.json", "spec.json"]
    folder = store.run_folder(spec.run_id())
    if keep == "resume":  # as runs of earlier versions do
        assert sum(p.numel() for p in sl.load_model(folder).parameters()) == spec.count().params.total
        return
    with pytest.raises(sl.UserError, match="planned with keep=weights"):
        sl.load_model(folder)


def test_a_diverged_run_keeps_no_weights(tmp_path):
    base = tiny(60)
    spec = replace(base, optimizer=replace(base.optimizer, peak_lr=1e30))
    store = RunStore(tmp_path)
    assert train(store, spec, Execution(keep="weights"), checkpoint_every_s=0.0).reason
    assert files(store, spec) == ["claim-1.json", "curve.jsonl", "record.json", "spec.json"]


def test_a_file_of_the_safetensors_library(tmp_path):
    """Written by safetensors 0.8.0: save_file({"b": arange(3), "a": [[-1.5]]}, path, {"shape": "x"}), float32."""
    theirs = bytes.fromhex(
        "90000000000000007b225f5f6d657461646174615f5f223a7b227368617065223a2278227d2c2261223a7b2264747970"
        "65223a22463332222c227368617065223a5b312c315d2c22646174615f6f666673657473223a5b302c345d7d2c226222"
        "3a7b226474797065223a22463332222c227368617065223a5b335d2c22646174615f6f666673657473223a5b342c3136"
        "5d7d7d20202020200000c0bf000000000000803f00000040"
    )
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(theirs)
    tensors, about = read_safetensors(path)
    assert about == {"shape": "x"}
    assert {name: t.tolist() for name, t in tensors.items()} == {"a": [[-1.5]], "b": [0.0, 1.0, 2.0]}
    write_safetensors(tmp_path / "ours.safetensors", tensors, about)
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs


@pytest.mark.parametrize("damage", ["truncated", "empty", "header"])
def test_damaged_weights_are_one_line(tmp_path, damage):
    spec, store = tiny(5), RunStore(tmp_path)
    train(store, spec, Execution(keep="weights"))
    path = store.run_folder(spec.run_id()) / WEIGHTS
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "empty": b"", "header": data[:8] + b"}" + data[9:]}[damage])
    with pytest.raises(sl.UserError, match=r"weights\.safetensors cannot be read \("):
        sl.load_model(path)


def test_a_corpus_with_a_tokenizer_leaves_a_copy(tmp_path, monkeypatch):
    """The run folder alone is enough to use the model on text."""
    spec = tiny(5)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/tokenizer.json").write_text("{}")
    monkeypatch.setattr(type(spec.data), "tokenizer_file", tmp_path / "corpus/tokenizer.json", raising=False)
    store = RunStore(tmp_path)
    train(store, spec, Execution(keep="weights"))
    assert (store.run_folder(spec.run_id()) / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("keep", ["weights", "resume"])
def test_a_parents_checkpoint_stays_until_the_last_of_its_children_is_completed(tmp_path, keep):
    parent = tiny(20, keep_steps=(10,), schedule=Constant())
    branch = replace(parent, keep_steps=(), parent=parent.run_id(), parent_step=10)
    specs = [parent, *(replace(branch, train_tokens=256 * steps) for steps in (14, 16))]
    runs = tuple(PlannedRun(s, Execution(keep=keep)) for s in specs)
    plan, store = Plan("t", runs, parent.convention, parent.data.fingerprint()), RunStore(tmp_path)
    store.write_plan(plan)
    kept = store.run_folder(parent.run_id()) / "checkpoint/kept-10.pt"
    for spec, there in zip(specs, (True, True, keep == "resume"), strict=True):
        assert [r.run_id for r in train_pending(store, plan, [spec.run_id()])] == [spec.run_id()]
        assert kept.exists() == kept.with_suffix(".json").exists() == there
    assert kept.parent.exists() == (keep == "resume")


def test_keep_changes_no_run_and_can_be_changed_at_any_time(tmp_path, monkeypatch, capsys):
    """`keep=` of a sweep that has begun: the same plan, without a question about differences."""
    monkeypatch.chdir(tmp_path)
    options = ["sweep=k", "design.budgets_flops=[1e8]", "data.max_mb=1", "device=cpu"]
    assert main(["plan", *options]) == 0
    store = RunStore("results/k")
    before = store.read_plan()
    assert {run.execution.keep for run in before.runs} == {"weights"}
    store.run_folder(before.runs[0].run_id).mkdir(parents=True)
    assert store.claim(before.runs[0].spec) is not None  # it has begun
    for given in (["keep=none"], [*options, "keep=resume"], options):
        assert main(["plan", *dict.fromkeys(["sweep=k", *given])]) == 0
        plan = store.read_plan()
        expected = given[-1].partition("=")[2] if given[-1].startswith("keep") else "resume"
        assert {run.execution.keep for run in plan.runs} == {expected}
        assert [r.run_id for r in plan.runs] == [r.run_id for r in before.runs]
        assert [replace(r.execution, keep="weights") for r in plan.runs] == [r.execution for r in before.runs]
    out = capsys.readouterr().out
    assert "(float32 weights)" in out
    assert "(no weights)" in out
    assert main(["plan", "sweep=k", "keep=all"]) == 2
    assert "keep='all'" in capsys.readouterr().err


def test_a_checkpoint_goes_on_under_another_keep():
    assert Execution(keep="none").continues(Execution(keep="weights"))
    assert not Execution(keep="none", threads=2).continues(Execution())
