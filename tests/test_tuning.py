"""Excess loss from mistuned learning rates: recovered where it is known, with calibrated intervals, refused where unknown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from helpers.synthetic import QUICKSTART_LAW, synthetic_records
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.sweep_records import SweepRecords, split_by_role
from scaling_lab.analysis.settings import ApproachSettings
from scaling_lab.analysis.studies.shared.excess_loss import TrainedRuns, measure_excess_loss, tuned_exponents
from scaling_lab.analysis.studies.shared.lr_quadratic import (
    fit_quadratic,
    near_best,
    quadratic_rise,
    underdetermined_reason,
)
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError
from scaling_lab.core.parametrization import MuP
from scaling_lab.core.record import RunRecord
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.core.storage.store import RunStore, curve_line

BUDGETS = (5e10, 2e11, 8e11)
LR = np.log(2) * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
CURVATURE = 0.06


def used_lr(n):
    """A recipe: LR ~ N^-0.4."""
    return 0.02 * (n / 1e4) ** -0.4


def best_over_used(n):
    """Too low by 2 at 5e3 parameters, too high by 2 at 2e5: the excess is nothing in between, and tilts the law."""
    return np.exp(np.log(2) * (1 - 2 * np.log(n / 5e3) / np.log(2e5 / 5e3)))


def loss_of(n, budget, lr):
    return QUICKSTART_LAW.loss_nats(n, budget / (6 * n)) + excess_of(n, lr)


def excess_of(n, lr):
    return 0.5 * CURVATURE * np.log(lr / (used_lr(n) * best_over_used(n))) ** 2


def trained(
    n, budget, lr, noise=0.0, rng=None, batch=512.0, seed=0.0, loss=None, prefix="run"
) -> TrainedRuns:
    n, budget, lr, batch, seed = (
        np.asarray(v, float) for v in np.broadcast_arrays(n, budget, lr, batch, seed)
    )
    value = loss_of(n, budget, lr) if loss is None else loss
    if rng is not None:
        value = value + noise * rng.standard_normal(n.shape)
    names = np.array(
        [f"{prefix}-{a:.6g}-{b:.3g}-{c:.4g}-{d:g}-{e:g}" for a, b, c, d, e in zip(n, budget, lr, batch, seed)]
    )
    return TrainedRuns(names.astype(object), n, budget, lr, batch, value, seed)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """(n, budget) of an IsoFLOP sweep of six sizes a budget, around its optimum."""
    n, c = [], []
    for budget in BUDGETS:
        center = 2e4 * (budget / 5e10) ** 0.45
        n += list(center * np.exp(np.linspace(-1.2, 1.2, 6)))
        c += [budget] * 6
    return np.array(n), np.array(c)


def lr_sweep(noise=0.0, rng=None, seeds=1, log_lr=LR):
    """The smallest, third and largest size of every budget, at every LR and seed."""
    n, c = grid()
    at = [6 * b + i for b in range(len(BUDGETS)) for i in (0, 2, 5)]
    n, c, x, seed = (v.ravel() for v in np.meshgrid(n[at], [0.0], log_lr, np.arange(seeds), indexing="ij"))
    c = np.repeat(np.asarray(grid()[1])[at], len(log_lr) * seeds)
    return trained(n, c, used_lr(n) * np.exp(x), noise, rng, seed=seed)


def observations(sweep: TrainedRuns) -> Observations:
    return Observations.from_arrays(
        n_params=sweep.n_params,
        n_tokens=sweep.budget_flops / (6 * sweep.n_params),
        loss_nats=sweep.loss_nats,
        budget_flops=sweep.budget_flops,
        run_id=[f"{i:03d}" for i in range(len(sweep))],
        convention="six_n_total",
    )


def test_a_parabola_by_hand():
    """L = 2 + 3 (x - 0.5)^2 at x = -1, 0, 1: minimum at 0.5, curvature 6, and an excess of 0.75 at x = 0."""
    x = np.array([[-1.0], [0.0], [1.0]])
    fit = fit_quadratic(x, (2 + 3 * (x[:, 0] - 0.5) ** 2)[None])
    assert fit.optimum[0, 0] == pytest.approx(0.5)
    assert fit.hessian[0, 0, 0] == pytest.approx(6.0)
    assert fit.floor_nats == pytest.approx(2.0)
    assert fit.excess_nats[0] == pytest.approx(0.75)


def test_a_quadratic_in_two_settings_by_hand():
    """L = 1 + (x - .3)^2 + 2 (y + .2)^2 + (x - .3)(y + .2) on nine points: excess at the origin .09 + .08 - .06."""
    x, y = (v.ravel() for v in np.meshgrid([-0.7, 0.0, 0.7], [-0.7, 0.0, 0.7]))
    loss = 1 + (x - 0.3) ** 2 + 2 * (y + 0.2) ** 2 + (x - 0.3) * (y + 0.2)
    fit = fit_quadratic(np.stack([x, y], axis=1), loss[None])
    assert fit.optimum[0] == pytest.approx([0.3, -0.2])
    assert fit.excess_nats[0] == pytest.approx(0.09 + 0.08 - 0.06)
    assert quadratic_rise(-fit.optimum, fit.hessian)[0] == pytest.approx(fit.excess_nats[0])


@pytest.mark.parametrize(
    ("loss", "said"),
    [((1.0, 2.0, 1.0), "do not bend up"), ((1.0, 2.0, 4.0), "outside of what was tried")],
)
def test_a_missing_minimum_is_reported(loss, said):
    found = fit_quadratic(np.array([[-1.0], [0.0], [1.0]]), np.array([loss]))
    assert isinstance(found, str)
    assert said in found


def test_points_that_determine_no_quadratic():
    assert underdetermined_reason(np.array([[0.0], [0.7]])) == "2 settings are near enough, 3 are needed"
    line = np.stack([np.linspace(-1, 1, 7), np.linspace(-1, 1, 7)], axis=1)
    assert underdetermined_reason(line) == "the settings lie on a line"
    assert underdetermined_reason(np.array([[-1.0], [0.0], [1.0]])) is None


def test_settings_far_from_the_best_are_excluded():
    """Best at 2 times, reference at 1: from 1/2.3 to 4.6 times."""
    x = np.log([[0.25], [0.5], [1.0], [2.0], [4.0], [8.0]])
    assert near_best(x, np.array([9.0, 3.0, 2.0, 1.0, 2.0, 30.0])).tolist() == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]


def test_one_lucky_seed_does_not_choose_the_window():
    """At half the rate one of three seeds is lucky; their mean is worse than the reference, which stays the center."""
    x = np.log([[0.25], [0.5], [0.5], [0.5], [1.0], [2.0]])
    assert near_best(x, np.array([5.0, 0.5, 3.0, 3.0, 1.0, 2.0])).tolist() == [
        False,
        True,
        True,
        True,
        True,
        True,
    ]


def test_a_known_excess_is_recovered_at_every_run():
    """Without noise. The excess is linear in the interpolated quantities, so it is exact at intermediate sizes too."""
    n, c = grid()
    sweep = trained(n, c, used_lr(n))
    tuning, samples = measure_excess_loss(sweep, lr_sweep())
    inside = tuning.excess_nats
    assert tuning.varied == ("LR",)
    assert [cell.status for cell in tuning.cells] == ["ok"] * 9
    np.testing.assert_allclose(inside, excess_of(n, used_lr(n)), atol=1e-9)
    assert inside.max() > 0.01
    assert inside.min() < 1e-3
    for cell in tuning.cells:
        assert cell.best_over_used[0] == pytest.approx(best_over_used(cell.n_params), rel=1e-6)
    assert samples.shape[1] == len(n)


def test_the_exponents_without_the_excess_are_those_of_tuned_runs():
    n, c = grid()
    sweep = trained(n, c, used_lr(n))
    best = trained(n, c, used_lr(n) * best_over_used(n))
    points, tuned_points = observations(sweep), observations(best)
    approaches = ApproachSettings().all()[:2]
    plain = [a.estimate(points) for a in approaches]
    truth = [a.estimate(tuned_points) for a in approaches]
    tuning, samples = measure_excess_loss(sweep, lr_sweep())
    found = tuned_exponents(tuning, samples, points, approaches, plain).exponents
    assert found[0].status == "not_applicable"
    for e, was, true in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert e.params_exponent == was.frontier.params.exponent
        assert e.tuned_params_exponent == pytest.approx(true.frontier.params.exponent, abs=1e-4)
        assert e.tuned_tokens_exponent == pytest.approx(true.frontier.tokens.exponent, abs=1e-4)
        assert abs(e.tuned_params_exponent - e.params_exponent) > 0.01


def test_intervals_of_the_excess_cover():
    """200 sweeps with seed noise of 0.004 nats: 90% intervals contain the truth about nine times in ten."""
    n, c = grid()
    held, noises, total = 0, [], 0
    for study in range(200):
        rng = np.random.default_rng(study)
        sweep = trained(n, c, used_lr(n), 0.004, rng)
        tuning, _ = measure_excess_loss(sweep, lr_sweep(0.004, rng, seeds=2), seed=study)
        noises.append(tuning.noise_nats)
        for cell in tuning.cells:
            # At zero excess, the interval of a square cannot reach below zero.
            if cell.fit is not None and excess_of(cell.n_params, used_lr(cell.n_params)) > 0.004:
                total += 1
                held += cell.excess_interval.contains(excess_of(cell.n_params, used_lr(cell.n_params)))
    assert np.mean(noises) == pytest.approx(0.004, rel=0.05)
    assert total > 500
    assert 0.84 < held / total < 0.95


def test_a_seeds_offset_of_every_setting_is_not_noise_of_the_excess():
    """The second seed is worse by 0.1 nats everywhere: its parabolas shift, without any excess."""
    tuned = lr_sweep(seeds=2)
    tuned = replace(tuned, loss_nats=tuned.loss_nats + 0.1 * tuned.seed)
    n, c = grid()
    tuning, _ = measure_excess_loss(trained(n, c, used_lr(n)), tuned)
    assert tuning.noise_nats < 1e-9
    assert "less what a seed does" in tuning.noise_source


def test_without_seeds_the_noise_comes_from_residuals_if_there_are_any():
    n, c = grid()
    rng = np.random.default_rng(1)
    tuning, _ = measure_excess_loss(trained(n, c, used_lr(n), 0.004, rng), lr_sweep(0.004, rng))
    assert "distances" in tuning.noise_source
    assert 0.001 < tuning.noise_nats < 0.01
    assert tuning.cells[0].excess_interval is not None
    bare, _ = measure_excess_loss(trained(n, c, used_lr(n)), lr_sweep(log_lr=LR[[1, 3]]))
    assert bare.noise_nats is None
    assert "not known" in bare.noise_source
    assert bare.cells[0].excess_nats is not None
    assert bare.cells[0].excess_interval is None
    assert np.isnan(bare.excess_standard_error).all()


def test_a_varied_batch_is_part_of_the_excess():
    """The best batch is 1.5 times the sweep's: varying the LR alone would miss that part."""
    n, c = grid()
    at = [0, 5, 12, 15]
    cells = [(n[i], c[i], x, y) for i in at for x in LR[1:4] for y in np.log([0.5, 1.0, 2.0])]
    size, budget, x, y = (np.array(v) for v in zip(*cells, strict=True))

    def loss(size, budget, x, y):
        d = np.log(best_over_used(size))
        u, v = x - d, y - np.log(1.5)
        return (
            QUICKSTART_LAW.loss_nats(size, budget / (6 * size))
            + 0.5 * (0.06 * u**2 + 0.04 * v**2)
            - 0.01 * u * v
        )

    tuned = trained(
        size, budget, used_lr(size) * np.exp(x), batch=512 * np.exp(y), loss=loss(size, budget, x, y)
    )
    sweep = trained(n, c, used_lr(n), loss=loss(n, c, 0.0, 0.0))
    tuning, _ = measure_excess_loss(sweep, tuned)
    assert [c.message for c in tuning.cells] == [None] * 4
    assert tuning.varied == ("LR", "batch")
    d = -np.log(best_over_used(n[at]))
    true = 0.5 * (0.06 * d**2 + 0.04 * np.log(1.5) ** 2) + 0.01 * d * np.log(1.5)
    np.testing.assert_allclose([cell.excess_nats for cell in tuning.cells], true, atol=1e-9)
    assert tuning.cells[0].best_over_used[1] == pytest.approx(1.5)


def test_a_best_setting_at_the_edge_gives_no_excess_there():
    """At the smallest size nothing above the sweep's LR was tried, so its best lies outside; the other sizes count."""
    n, c = grid()
    tuned = lr_sweep()
    tuned = tuned.at((tuned.n_params > n.min() + 1) | (tuned.peak_lr < used_lr(tuned.n_params) * 1.01))
    tuning, _ = measure_excess_loss(trained(n, c, used_lr(n)), tuned)
    assert tuning.cells[0].status == "outside"
    assert tuning.cells[0].excess_nats is None
    assert np.isfinite(tuning.excess_nats).all()
    nothing, samples = measure_excess_loss(trained(n, c, used_lr(n)), tuned.at(tuned.n_params < n.min() + 1))
    assert "No size has a best setting" in nothing.message
    assert np.isnan(samples).all()


def test_a_size_tuned_only_at_another_batch_is_reported():
    """Its reference is interpolated from other sizes, because none of its runs has that batch."""
    n, c = grid()
    tuned = lr_sweep()
    other = np.where(tuned.n_params < n.min() + 1, 2048.0, 512.0)
    sweep = trained(n, c, used_lr(n)).at(n > n.min() + 1)
    tuning, _ = measure_excess_loss(sweep, replace(tuned, batch_tokens=other))
    assert (tuning.cells[0].status, tuning.cells[0].excess_nats) == ("too_few", None)
    assert "0 settings are near enough" in tuning.cells[0].message
    assert np.isfinite(tuning.excess_nats).all()


def test_missing_measurements_are_one_clear_error():
    n, c = grid()
    with pytest.raises(UserError, match="learning-rate sweep has no completed run"):
        measure_excess_loss(trained(n, c, used_lr(n)), trained([], [], []))


def at_lr(record: RunRecord, multiplier: float) -> RunRecord:
    """The record's run at another LR, as in a learning-rate sweep: best at 1.5 times the sweep's."""
    excess = 0.5 * CURVATURE * (math.log(multiplier / 1.5) ** 2 - math.log(1.5) ** 2)
    optimizer = replace(record.spec.optimizer, peak_lr=record.spec.optimizer.peak_lr * multiplier)
    spec = replace(record.spec, optimizer=optimizer, role="lr_sweep", sweep="tuned")
    return replace(
        record, run_id=spec.run_id(), spec=spec, final_val_loss_nats=record.final_val_loss_nats + excess
    )


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return synthetic_records(curve_points=40)


@pytest.fixture(scope="module")
def tuned_records(records: list[RunRecord]) -> list[RunRecord]:
    """Of the first and last size of each budget; the sweep's own runs are at the center of the parabolas."""
    by_budget: dict[float, list[RunRecord]] = {}
    for r in records:
        by_budget.setdefault(r.spec.budget_flops, []).append(r)
    ends = [group[i] for group in by_budget.values() for i in (0, -1)]
    return [at_lr(r, m) for r in ends for m in (0.5, 2.0, 4.0)]


def test_records_of_a_learning_rate_sweep_are_not_fitted_by_the_law(records, tuned_records):
    split = split_by_role([*records, *tuned_records])
    assert split.law == tuple(records)
    assert split.lr_sweep == tuple(tuned_records)
    assert split_by_role(records) == SweepRecords(tuple(records), ())
    with pytest.raises(UserError, match="analyze the sweep that they tune, with tuning=tuned"):
        split_by_role(tuned_records).require_law()
    split.require_law()


def test_rates_under_another_parametrization_are_refused(records, tuned_records):
    other = [replace(r, spec=replace(r.spec, parametrization=MuP())) for r in tuned_records]
    with pytest.raises(
        UserError, match="its runs have parametrization MuP.*those of the sweep have Standard"
    ):
        split_by_role(records, other)
    assert split_by_role(records, tuned_records).lr_sweep == tuple(tuned_records)


def write(store: RunStore, records: list[RunRecord]) -> None:
    for r in records:
        folder = store.run_folder(r.run_id)
        folder.mkdir(parents=True)
        (folder / "curve.jsonl").write_text("".join(curve_line(p) for p in r.curve))
        (folder / "record.json").write_text(dumps(r.to_dict()))


def test_analyze_with_a_learning_rate_sweep(tmp_path, monkeypatch, capsys, records, tuned_records):
    monkeypatch.chdir(tmp_path)
    write(RunStore(Path("results/base")), records)
    write(RunStore(Path("results/base-lr")), tuned_records)
    light = ["sensitivity=false", "backtest=false", "profile=false", "bootstrap.resamples=50"]
    assert main(["analyze", "sweep=base", "tuning=base-lr", *light]) == 0
    out = capsys.readouterr().out
    assert "Checking LR tuning" in out
    assert "if every size were tuned" in out
    data = json.loads(Path("results/base/report/analysis.json").read_text())
    schema = json.loads(resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text())
    jsonschema.validate(data, schema)
    # The factor is the same everywhere: every run's excess is 0.06 / 2 ln(1.5)^2, and the exponents do not change.
    assert len(data["tuning"]["runs"]) == len(records)
    excess = [r["debt_nats"] for r in data["tuning"]["runs"]]
    np.testing.assert_allclose(excess, 0.03 * math.log(1.5) ** 2, atol=1e-4)
    found = [c["best_over_used"]["LR"]["estimate"] for c in data["tuning"]["cells"]]
    assert found == pytest.approx([1.5] * 6, rel=0.02)
    for e in data["tuning"]["exponents"][1:]:
        assert e["tuned_params_exponent"] == pytest.approx(e["params_exponent"], abs=0.01)
    page = Path("results/base/report/report.html").read_text()
    assert "Checking LR tuning" in page
    assert "Loss against learning rate" in page
    assert Path("results/base/report/figures/tuning.png").stat().st_size > 5000
    for argv, said in (
        (
            ["sweep=base-lr", "study=tuning"],
            "study=tuning: its data are missing. It needs a learning-rate sweep",
        ),
        (["sweep=base-lr", "metrics=[loss]", "study=skills"], "study=skills: its data are missing"),
        (["sweep=base", "tuning=nothing"], "tuning='nothing' has no finished runs"),
        (["runs=x.csv", "tuning=base-lr"], "is for a sweep"),
    ):
        assert main(["analyze", *argv]) == 2
        assert said in capsys.readouterr().err
    # A learning-rate sweep alone has no law; its best rates are a finding.
    assert main(["analyze", "sweep=base-lr"]) == 0
    shown = capsys.readouterr()
    assert "contains only runs of a learning-rate sweep" in shown.err
    assert "tuning=tuned" in shown.err
    assert "Transfer of the best learning rate" in shown.out
    alone = json.loads(Path("results/base-lr/report/analysis.json").read_text())
    jsonschema.validate(alone, schema)
    assert alone["estimates"] == []
    assert [f["name"] for f in alone["findings"]] == ["lr_transfer"]
    assert "learning-rate sweep" in alone["problem"]
    # Without the learning-rate sweep the report is unchanged.
    assert main(["analyze", "sweep=base", *light]) == 0
    assert "Checking LR tuning" not in capsys.readouterr().out
    assert json.loads(Path("results/base/report/analysis.json").read_text())["tuning"] is None


@pytest.mark.slow
def test_a_real_sweep_and_its_learning_rate_sweep(tmp_path, monkeypatch, capsys):
    """Tiny models trained at a quarter of the recipe's rate: the excess is found, and the exponents stay plausible."""
    monkeypatch.chdir(tmp_path)
    tiny = [
        "device=cpu", "compile=false", "data.max_mb=1", "model.context=16", "model.head_dim=4", "eval.tokens=2048",
        "design.budgets_flops=[8e7,1.6e8,3.2e8]", "design.sizes.min_width=4", "design.sizes.max_width=16",
        "design.sizes.width_multiple=2", "design.sizes.min_depth=1", "design.sizes.width_ratio=1.26", "recipe.batch_tokens=128",
        "recipe.lr_at_width_64=0.001",
    ]  # fmt: skip
    assert main(["sweep", "sweep=low", *tiny, "design.sizes_per_budget=4"]) == 0
    tuned = ["design=learning_rate", "design.grid_sizes=4", "design.sizes_per_budget=2"]
    assert main(["sweep", "sweep=low-lr", *tiny, *tuned, "design.lr_multipliers=[2,4,8,16]"]) == 0
    assert "tuning=low-lr" in capsys.readouterr().out
    light = ["sensitivity=false", "backtest=false", "profile=false", "bootstrap.resamples=50"]
    assert main(["analyze", "sweep=low", "tuning=low-lr", *light]) == 0
    found = json.loads(Path("results/low/report/analysis.json").read_text())["tuning"]
    assert len(found["cells"]) == 6
    good = [c for c in found["cells"] if c["status"] == "ok"]
    assert len(good) >= 4
    assert all(c["best_over_used"]["LR"]["estimate"] > 1.5 for c in good)
    assert all(c["debt_nats"] > 0.02 for c in good)
    assert all(r["debt_nats"] > 0 for r in found["runs"])
