"""Sweeps planned or partly trained by an earlier version continue as planned.

`data/earlier_revision` was made by revision 883e3a6 (November 2026): `earlier`, 12 runs of which 5 are finished and one was
interrupted after a checkpoint; `large`, planned only, under rules of `recipe=default` that have changed since.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scaling_lab.cli.main import main
from scaling_lab.core.record import RunStatus
from scaling_lab.core.storage.store import RunStore

DATA = Path(__file__).parent / "data" / "earlier_revision"
COMMON = ["data=context_tree", "device=cpu", "compile=false", "design.sizes_per_budget=4"]
EARLIER = [
    *COMMON,
    "design.budgets_flops=[2e8,4e8]",
    "design.sizes.max_width=32",
    "model.context=32",
    "eval.tokens=2048",
]
LARGE = [*COMMON, "design.budgets_flops=[1e14,4e14]"]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    shutil.copytree(DATA, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def test_an_unfinished_sweep_continues_with_the_same_runs(results, capsys):
    store = RunStore(results / "earlier")
    plan = (results / "earlier/plan.json").read_bytes()
    finished = {r: (store.run_folder(r) / "record.json").read_bytes() for r in store.run_ids_with_record()}
    assert len(finished) == 5
    assert main(["sweep", "sweep=earlier", *EARLIER, "workers=1"]) == 0
    assert "7 to go" in capsys.readouterr().out
    assert (results / "earlier/plan.json").read_bytes() == plan
    records = store.load_records()[0]
    assert {r.run_id for r in records} == {run["run_id"] for run in json.loads(plan)["runs"]}
    assert {r.status for r in records} == {RunStatus.COMPLETED}
    for run_id, record in finished.items():
        assert (store.run_folder(run_id) / "record.json").read_bytes() == record
    assert main(["analyze", "sweep=earlier", "bootstrap.resamples=20"]) == 0
    assert main(["report", "sweep=earlier"]) == 0
    assert (results / "earlier/report/report.html").is_file()


def test_changed_rules_do_not_affect_a_started_sweep(results, capsys):
    """The same options would give other runs today; the sweep continues as planned, with a one-line note."""
    before = (results / "large/plan.json").read_bytes()
    assert main(["plan", "sweep=large", *LARGE]) == 0
    printed = capsys.readouterr().out
    assert printed.count("planned by an earlier version") == 1
    assert (results / "large/plan.json").read_bytes() == before
    # A new sweep is planned differently.
    assert main(["plan", "sweep=new", *LARGE, "--quiet"]) == 0
    new, old = (json.loads((results / name / "plan.json").read_text()) for name in ("new", "large"))
    assert {r["run_id"] for r in new["runs"]}.isdisjoint(r["run_id"] for r in old["runs"])


def test_one_option_given_is_the_one_named(results, capsys):
    assert main(["sweep", "sweep=large", "seed=5"]) == 2
    error = capsys.readouterr().err
    assert "Differences: seed (on disk 0, now 5). Give the new plan its own name (sweep=large-2)" in error
    assert len(error) < 400
    shutil.copytree(results / "large", results / "large-2")
    assert main(["sweep", "sweep=large", "recipe=kaplan"]) == 2
    error = capsys.readouterr().err
    assert 'Differences: recipe (on disk "default", now "kaplan"). ' in error
    assert "(sweep=large-3)" in error


def test_an_omitted_option_replaces_a_plan_without_runs(results, capsys):
    assert main(["plan", "sweep=mine", *LARGE, "model.context=128", "--quiet"]) == 0
    assert main(["plan", "sweep=mine", *LARGE]) == 0
    assert "model.context (no longer given)" in capsys.readouterr().err
    assert json.loads((results / "mine/plan.json").read_text())["settings"]["model"]["context"] == 64
