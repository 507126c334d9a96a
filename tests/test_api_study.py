"""Tests of `sl.plan`, `sl.train` and `sl.Sweep`: the command line's plans, runs trained in this process and in workers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import scaling_lab as sl
from helpers.synthetic import QUICKSTART_LAW, make_record, make_spec, shape_near
from scaling_lab.api.options import arguments, text
from scaling_lab.cli.main import main
from scaling_lab.cli.options.values import read_value
from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import failed_record

TINY = {
    "data": {"max_mb": 1},
    "eval": {"tokens": 1024},
    "device": "cpu",
    "compile": "false",
    "design": {"budgets_flops": [1e8], "sizes_per_budget": 4, "noise_seeds": 1, "sizes": {"max_width": 64}},
}
COMMAND_LINE = [
    "data.max_mb=1", "eval.tokens=1024", "device=cpu", "compile=false", "design.budgets_flops=[1e8]",
    "design.sizes_per_budget=4", "design.noise_seeds=1", "design.sizes.max_width=64",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny sweep, trained in this process."""
    results = tmp_path_factory.mktemp("results")
    return sl.train(sl.plan(sweep="tiny", results_dir=results, **TINY), workers=0, progress=False)


def test_a_plan_is_the_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = sl.plan(sweep="tiny", **TINY)
    assert not list(tmp_path.iterdir())
    assert main(["plan", "sweep=tiny", *COMMAND_LINE, "--json"]) == 0
    assert made.to_dict() == json.loads(capsys.readouterr().out)
    with pytest.raises(sl.UserError, match="sweep='other': there is no plan"):
        sl.plan(sweep="other")
    assert sl.plan(sweep="tiny").to_dict() == made.to_dict()
    assert made.save() == made.folder / "plan.json"
    assert json.loads(made.save().read_text()) == made.to_dict()


def test_an_experiment_and_a_choice_with_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {
        "data": {"kind": "context_tree", "seed": 2},
        "model": "gpt2",
        "results_dir": "r",
        "device": "cpu",
    }
    made = sl.plan("quickstart", **options, design={"budgets_flops": [1e9, 4e9]}, seed=3)
    assert made.sweep == "quickstart"
    command = "experiment=quickstart data=context_tree data.seed=2 model=gpt2 results_dir=r device=cpu seed=3"
    assert main(["plan", *command.split(), "design.budgets_flops=[1e9,4e9]", "--json"]) == 0
    assert made.to_dict() == json.loads(capsys.readouterr().out)


def test_what_a_plan_shows(tmp_path):
    made = sl.plan(sweep="tiny", results_dir=tmp_path, **TINY)
    frame = made.to_frame()
    assert frame.index.tolist() == list(made.run_ids)
    assert len(frame) == 4
    assert (frame["budget_flops"] == 1e8).all()
    assert frame["n_params"].is_monotonic_increasing
    assert repr(made).startswith("plan tiny: 4 runs, 4.1e+08 FLOPs (six_n_with_head), about ")
    assert len(repr(made).splitlines()) == 1
    assert made.seconds(workers=1) >= made.seconds(workers=4) > 0
    assert "4 runs" in made.summary()
    assert made.notes
    assert made._repr_html_().count("<tr>") == 5


def test_planning_loads_no_torch(tmp_path):
    code = (
        "import sys, scaling_lab as sl\n"
        "sl.plan(sweep='x', data='context_tree', device='cpu', design={'budgets_flops': [1e9]}).to_frame()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_trained_sweep(trained):
    assert trained.counts == {"completed": 4}
    assert trained.is_finished
    assert repr(trained) == f"sweep tiny in {trained.folder}: 4 completed"
    runs = trained.to_frame()
    assert (runs["state"] == "completed").all()
    assert runs["loss"].between(1.0, 6.0).all()
    assert runs.index.tolist() == [run.run_id for run in trained.plan.runs]
    curves = trained.to_frame("curves")
    assert set(curves["run_id"]) == set(runs.index)
    last = curves.groupby("run_id")["tokens"].max()
    assert last.to_dict() == runs["tokens"].to_dict()
    assert {r.run_id: r.final_val_loss_nats for r in trained.records} == runs["loss"].to_dict()
    assert trained._repr_html_().count("completed") >= 4
    with pytest.raises(sl.UserError, match="'curve'.*Did you mean 'curves'"):
        trained.to_frame("curve")


def test_a_trained_sweep_is_not_trained_again(trained):
    before = trained.to_frame()
    for again in (trained, trained.folder, str(trained.folder)):
        assert sl.train(again, workers=0, progress=False).to_frame().equals(before)


def test_workers_give_the_same_losses(trained, tmp_path, capfd):
    made = sl.plan(sweep="tiny", results_dir=tmp_path, **TINY)
    swept = sl.train(made, workers=2)
    assert swept.to_frame()["loss"].equals(trained.to_frame()["loss"])
    assert "4 runs on 2 workers" in capfd.readouterr().out


def test_a_sweep_is_analyzed_and_reported(trained, tmp_path):
    quick = {"bootstrap": {"resamples": 50}, "sensitivity": False, "backtest": False, "profile": False}
    result = trained.analyze(**quick)
    assert result.n_runs == 4
    assert result.to_dict()["observations"]["convention"] == "six_n_with_head"
    for same in (sl.analyze(trained, **quick), sl.analyze(trained.folder, **quick)):
        assert same.to_frame().equals(result.to_frame())
    assert sl.load(trained.folder).n_runs == 4
    recounted = trained.analyze(convention="six_n_non_embedding", **quick)
    assert recounted.to_frame("points")["params"].max() < result.to_frame("points")["params"].max()
    page = trained.report(tmp_path / "report")
    assert "gpt-w" in page.read_text()
    assert (tmp_path / "report" / "figures" / "training_curves.svg").exists()
    with pytest.raises(sl.UserError, match="loss: this option is for tables"):
        sl.analyze(trained, loss="val_loss")


def test_one_run(tmp_path):
    options = {
        "data": {"max_mb": 1},
        "device": "cpu",
        "compile": "false",
        "results_dir": tmp_path,
        "sweep": "single",
    }
    one = sl.train(model={"width": 16, "depth": 1}, train_tokens=20_000, progress=False, **options)
    assert one.folder == tmp_path / "single"
    assert one.plan is None
    (run,) = one.to_frame().itertuples()
    assert (run.state, run.width, run.depth) == ("completed", 16, 1)
    again = sl.train(model={"width": 16, "depth": 1}, train_tokens=20_000, progress=False, **options)
    assert again.to_frame().equals(one.to_frame())


def test_a_run_that_fails_is_a_warning_and_can_be_tried_again(tmp_path):
    made = sl.plan(sweep="tiny", results_dir=tmp_path, **TINY)
    made.save()
    store, bad = RunStore(made.folder), made.plan.runs[0]
    claim = store.claim(bad.spec)
    assert store.write_record(failed_record(bad, store, made.plan.data_fingerprint, "out of luck"))
    claim.release()
    with pytest.warns(UserWarning, match=f"{bad.run_id} failed: out of luck"):
        swept = sl.train(made, workers=0, progress=False)
    assert swept.counts == {"completed": 3, "failed": 1}
    assert swept.to_frame().loc[bad.run_id, "reason"] == "out of luck"
    assert sl.train(made, workers=0, progress=False, retry="failed").counts == {"completed": 4}


def test_another_plan_that_has_begun_is_refused(trained):
    other = sl.plan(sweep="tiny", results_dir=trained.folder.parent, **{**TINY, "seed": 5})
    with pytest.raises(
        sl.UserError, match=r"sweep='tiny' has started with another plan.*seed \(on disk 0, now 5\)"
    ):
        sl.train(other)


def test_a_sweep_of_learning_rates_has_findings_and_no_law(tmp_path):
    store = RunStore(tmp_path / "rates")
    shape = shape_near(2e4)
    for lr, excess in ((0.002, 0.08), (0.004, 0.02), (0.008, 0.0), (0.016, 0.02), (0.032, 0.08)):
        spec = make_spec(shape, 1e10, 0, 512, Convention.SIX_N_WITH_HEAD, "rates")
        spec = replace(spec, role="lr_sweep", optimizer=OptimizerSpec(peak_lr=lr))
        made = make_record(spec, QUICKSTART_LAW, np.random.default_rng(0), noise=0.0)
        made = replace(made, final_val_loss_nats=made.final_val_loss_nats + excess)
        store.run_folder(made.run_id).mkdir(parents=True)
        (store.run_folder(made.run_id) / "spec.json").write_text(json.dumps(spec.to_dict()))
        store.start_curve(made.run_id, made.curve).close()
        assert store.write_record(made)
    result = sl.load(store.folder)
    assert [f.name for f in result.findings] == ["lr_transfer"]
    assert "only runs of a learning-rate sweep" in result.problem
    assert repr(result).startswith("rates: findings of lr_transfer; no scaling law: ")
    for use in (lambda: result.isoflop, lambda: result.predict(1e12), lambda: result.plot.isoflop()):
        with pytest.raises(sl.UserError, match="no scaling law.*learning-rate sweep"):
            use()
    assert result.finding("lr_transfer").answer in result.summary()
    assert result.to_frame().empty
    page = result.report(tmp_path / "out")
    assert result.finding("lr_transfer").title in page.read_text()
    assert sl.load(tmp_path / "out").findings == result.findings


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: sl.plan("quick"), "experiment='quick'.*Did you mean 'quickstart'.*known_entropy"),
        (lambda: sl.plan(sweep="x", design={"budget_flops": [1]}), r"'design\.budget_flops'.*Did you mean design\.budgets_flops"),
        (lambda: sl.plan(sweep="x", design={"kind": "iso"}), "design='iso'.*isoflop, learning_rate"),
        (lambda: sl.plan(sweep="x", seed="a"), "seed='a'.*integer such as 64"),
        (lambda: sl.plan(design={"budgets_flops": [1e9]}), "sweep=NAME is missing"),
        (lambda: sl.plan(sweep="x", data={"kind": "tokens"}), r"data\.path"),
        (lambda: sl.plan(sweep="x", **{"seed": 1, "seed ": 1}), "'seed '"),
        (lambda: sl.train("nowhere"), "folder='nowhere' has neither"),
        (lambda: sl.train(model={"width": 16}), "train_tokens is missing"),
        (lambda: sl.train(workers=-1), "workers=-1"),
        (lambda: sl.train(retry="all"), "retry='all'.*failed"),
    ],
)  # fmt: skip
def test_errors(call, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sl.UserError, match=told) as error:
        call()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_errors_of_a_sweep(trained):
    with pytest.raises(sl.UserError, match=r"seed: .*sl\.plan"):
        sl.train(trained, seed=3)
    with pytest.raises(sl.UserError, match="tracker='wb'.*none, wandb"):
        sl.train(trained, tracker="wb")


@pytest.mark.parametrize(
    "value", [None, True, 3, 2.5e11, "a b", "it's", '"x"', "a,b", "[x]", "", " x", "a: b", "1e9"]
)
def test_values_are_read_back_as_they_were(value):
    wanted = type(value) if value is not None else int | None
    assert read_value("key", text(value), wanted) == value


def test_lists_and_groups_are_written_as_the_command_line_has_them():
    given = {
        "eval": {"sets": ["pysource", {"name": "x", "kind": "prepared", "path": "a b"}]},
        "model": "gpt2",
        "x": (1, 2),
    }
    written = {a.key: a.value for a in arguments("plan", given).assignments}
    assert written == {
        "eval.sets": "[pysource,{name: x, kind: prepared, path: a b}]",
        "model": "gpt2",
        "x": "[1,2]",
    }
    with pytest.raises(sl.UserError, match=r"model\.width is given twice"):
        arguments("plan", {"model": {"width": 1}, "model.width": 2})
