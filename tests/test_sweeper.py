"""Tests of `scaling-lab sweep` and `train -m` through Hydra, with real training of the smallest models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from scaling_lab.cli.main import main
from scaling_lab.core.record import RunStatus
from scaling_lab.core.storage.store import RunStore

# Four sizes of 1,000 to 7,000 parameters, tens of steps each.
TINY_LINE = (
    "data.max_mb=1 eval.tokens=1024 device=cpu compile=false design.budgets_flops=[1e8] design.sizes_per_budget=4 "
    "design.noise_seeds=1 design.sizes.min_width=4 design.sizes.max_width=16 design.sizes.width_ratio=1.3 "
    "design.sizes.width_multiple=4 design.sizes.min_depth=1 design.n_opt_at_1e12=200K"
)
TINY = TINY_LINE.split()
BASIC = "hydra/launcher=basic"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def records(sweep):
    found, problems = RunStore(f"results/{sweep}").load_records()
    assert not problems
    return {r.run_id: r for r in found}


def lose(store, run_id):
    """Leaves the run as if its process had been killed before the end."""
    folder = store.run_folder(run_id)
    for path in (folder / "record.json", *folder.glob("claim-*.json")):
        path.unlink()
    (folder / "claim-1.json").write_text("torn")


def written(sweep):
    """When each record was written."""
    return {
        r: RunStore(f"results/{sweep}").run_folder(r).joinpath("record.json").stat().st_mtime_ns
        for r in records(sweep)
    }


def test_a_sweep_trains_its_plan_once_and_resumes_from_disk(capsys):
    assert main(["sweep", "sweep=s", *TINY, BASIC, "hydra.sweeper.runs_per_job=3"]) == 0
    plan = RunStore("results/s").read_plan()
    assert set(records("s")) == {run.run_id for run in plan.runs}
    assert len(plan.runs) == 4
    assert "4 of 4 runs completed" in capsys.readouterr().out
    before = written("s")

    assert main(["sweep", "sweep=s", *TINY, BASIC]) == 0
    assert "nothing to do: all 4 runs" in capsys.readouterr().out
    lost = sorted(before)[1]
    store = RunStore("results/s")
    loss = store.read_record(lost).final_val_loss_nats
    lose(store, lost)
    assert main(["sweep", "sweep=s", BASIC]) == 0
    assert "3 of 4 runs have finished already; 1 to go" in capsys.readouterr().out
    after = written("s")
    assert {r for r in after if after[r] != before[r]} == {lost}
    assert store.read_record(lost).final_val_loss_nats == loss

    assert main(["sweep", "sweep=s", *TINY, BASIC, "recipe.weight_decay=0.2"]) == 2
    error = capsys.readouterr().err
    assert (
        "Differences: recipe.weight_decay (on disk null, now 0.2). Give the new plan its own name (sweep=s-2)"
        in error
    )
    assert "scaling-lab sweep sweep=s" in error
    assert written("s") == after


def test_lists_multiply_the_plan(capsys):
    argv = [
        "sweep",
        "sweep=m",
        *TINY,
        BASIC,
        "seed=0,5",
        "model.mlp=gelu,relu2",
        "hydra.sweeper.runs_per_job=20",
    ]
    assert main(argv) == 0
    made = records("m").values()
    assert len(made) == 4 * 2 * 2
    assert {(r.spec.seed_init, r.spec.shape.mlp) for r in made} == {
        (s, m) for s in (0, 5) for m in ("gelu", "relu2")
    }
    assert len(RunStore("results/m").read_plan().settings["combinations"]) == 4


def test_hydra_writes_nothing_of_its_own(tmp_path):
    assert main(["sweep", "sweep=s", *TINY, BASIC, "hydra.sweeper.runs_per_job=4"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]
    assert sorted(p.name for p in (tmp_path / "results/s").iterdir()) == ["plan.json", "runs"]


def test_failed_runs_decide_the_exit_status_and_are_named(capsys):
    argv = [
        "sweep",
        "sweep=d",
        *TINY,
        BASIC,
        "recipe.peak_lr=1e6",
        "recipe.clip_norm=1e9",
        "hydra.sweeper.runs_per_job=4",
    ]
    assert main(argv) == 1
    diverged = [r for r in records("d").values() if r.status is RunStatus.DIVERGED]
    assert diverged
    err = capsys.readouterr().err
    for record in diverged:
        assert f"{record.run_id} diverged: " in err
    assert main(["status", "sweep=d", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"]["diverged"] == len(diverged)
    assert all(run["reason"] for run in status["runs"] if run["state"] == "diverged")


def test_train_is_one_run_and_with_m_a_hydra_multirun(capsys, tmp_path):
    common = [
        "model.depth=1",
        "train_tokens=4_000",
        "data.max_mb=1",
        "eval.tokens=1024",
        "device=cpu",
        "compile=false",
    ]
    # As in the README, without device=.
    assert main(["train", "model.width=8", *(o for o in common if o != "device=cpu")]) == 0
    assert [r.spec.shape.width for r in records("train").values()] == [8]
    before = written("train")
    assert main(["train", "-m", "model.width=8,12", "recipe.peak_lr=0.02,0.04", *common]) == 0
    made = records("train").values()
    assert sorted((r.spec.shape.width, r.spec.optimizer.peak_lr) for r in made if r.run_id not in before) == [
        (8, 0.02), (8, 0.04), (12, 0.02), (12, 0.04),
    ]  # fmt: skip
    assert all(written("train")[run_id] == when for run_id, when in before.items())
    assert all(r.spec.role == "single" for r in made)
    assert "next: scaling-lab status sweep=train" in capsys.readouterr().out
    assert main(["train", "model.width=8", *common, "sweep=mine", "results_dir=else where"]) == 0
    assert (tmp_path / "else where/mine/runs").is_dir()


def test_report_and_status_of_a_half_done_sweep(capsys):
    assert main(["sweep", "sweep=s", *TINY, BASIC, "hydra.sweeper.runs_per_job=4"]) == 0
    store = RunStore("results/s")
    lost = store.run_ids_with_record()[0]
    lose(store, lost)
    capsys.readouterr()
    assert main(["status", "sweep=s"]) == 0
    out = capsys.readouterr().out
    assert "3 completed" in out
    assert "1 interrupted" in out
    assert "next: scaling-lab sweep sweep=s" in out
    assert main(["report", "sweep=s"]) == 0
    assert (store.report_folder / "report.html").is_file()


def test_a_large_plan_fits_the_screen_and_needs_no_torch():
    code = (
        "import sys; from scaling_lab.cli.main import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "sweep=s", *TINY[:4], "design.budgets_flops=[2e7,4e7]", *TINY[5:], "seed=range(0,30)"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr or "torch was loaded"
    plan = RunStore("results/s").read_plan()
    rounded = [line for line in done.stdout.splitlines() if line.startswith("  rounded: ")]
    assert len(plan.rounding) > 100
    assert len(rounded) == 21
    assert rounded[-1].endswith(f"and {len(plan.rounding) - 20} more; plan.json has them all")
