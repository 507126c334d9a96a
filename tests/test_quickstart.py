"""The whole quickstart, as a newcomer runs it: real training, with every claim of its output checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scaling_lab.core.storage.store import RunStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "scaling-lab"), "quickstart"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = quickstart(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_grid_is_a_real_isoflop_sweep(first):
    records, problems = RunStore(first[0] / "results/quickstart").load_records(curve=False)
    assert not problems
    assert {r.status.value for r in records} == {"completed"}
    budgets = sorted({r.spec.budget_flops for r in records})
    assert len(budgets) >= 3
    assert budgets[-1] / budgets[0] >= 16
    seeds = [len({r.spec.seed_init for r in records if r.spec.budget_flops == b}) for b in budgets]
    assert max(seeds) >= 2
    for budget in budgets:
        runs = [r for r in records if r.spec.budget_flops == budget and r.spec.seed_init == 0]
        assert len(runs) >= 5
        runs.sort(key=lambda r: r.spec.n_params())
        losses = [r.final_val_loss_nats for r in runs]
        best = losses.index(min(losses))
        assert 0 < best < len(losses) - 1, f"the best size of {budget:.3g} FLOPs is at an edge: {losses}"


def test_the_output_ends_with_the_answer_and_the_next_step(first):
    folder, done = first
    report = folder / "results/quickstart/report/report.html"
    assert report.is_file()
    assert str(report.relative_to(folder)) in done.stdout
    for word in ("envelope", "IsoFLOP", "parametric", "alpha", "beta", "predicted", "next"):
        assert word.lower() in done.stdout.lower(), word
    analysis = json.loads((report.parent / "analysis.json").read_text())
    by_name = {e["approach"]: e for e in analysis["estimates"]}
    for approach in ("isoflop", "parametric"):
        low, high = by_name[approach]["interval"]["params_exponent"]
        assert low < by_name[approach]["params_exponent"] < high
    assert analysis["backtest"]


def test_a_second_run_trains_nothing(first):
    folder, _ = first
    before = {p: p.stat().st_mtime_ns for p in (folder / "results/quickstart/runs").rglob("*")}
    again = quickstart(folder)
    assert again.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "results/quickstart/runs").rglob("*")} == before


def test_another_folder_gives_the_same_losses(first, tmp_path):
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = []
    for folder in (first[0], tmp_path):
        records, _ = RunStore(folder / "results/quickstart").load_records()
        losses.append(
            {r.run_id: [p.train_loss_nats for p in r.curve] + [r.final_val_loss_nats] for r in records}
        )
    assert losses[0] == losses[1]
