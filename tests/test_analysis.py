"""Tests of the whole analysis: analysis.json against its schema and against the numbers it was made from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib import resources

import jsonschema
import numpy as np
import pytest

from helpers.known_truth import PUBLISHED, Truth
from helpers.synthetic import QUICKSTART_LAW, synthetic_records
from scaling_lab.analysis.analysis import AnalysisSettings, analyze, observations_of_sweep, read_observations
from scaling_lab.analysis.approaches import IsoFlopSettings, ParametricSettings
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.settings import ApproachSettings
from scaling_lab.core.errors import UserError

FAST = AnalysisSettings(bootstrap=BootstrapSettings(resamples=60))


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text())


@pytest.fixture(scope="module")
def sweep() -> dict:
    observations = observations_of_sweep(synthetic_records(), FAST)
    return json.loads(
        json.dumps(analyze(observations, FAST).to_json_dict("scaling-lab analyze"), allow_nan=False)
    )


def walk(value: object) -> list[object]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in walk(v)]
    if isinstance(value, list):
        return [x for v in value for x in walk(v)]
    return [value]


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("chinchilla_epoch245", {}),
        ("gemstones_curves", {}),
        ("misfitting_final", {"points": "all"}),
        ("porian_isoflop_refinedweb", {"where": {"experiment": "rw_tuned_short_const_standard_val"}}),
    ],
)
def test_published_tables_give_a_valid_analysis(file: str, settings: dict, schema: dict) -> None:
    s = replace(FAST, **settings)
    analysis = analyze(read_observations(PUBLISHED / f"{file}.csv", s), s)
    data = json.loads(json.dumps(analysis.to_json_dict("x"), allow_nan=False))
    jsonschema.validate(data, schema)
    assert [e["approach"] for e in data["estimates"]] == ["envelope", "isoflop", "parametric"]
    for estimate in data["estimates"]:
        assert (estimate["params_exponent"] is None) == (
            estimate["status"] in ("not_applicable", "not_identified")
        )
        assert estimate["message"]


def test_the_analysis_of_a_sweep_is_valid_and_correct(sweep: dict, schema: dict) -> None:
    jsonschema.validate(sweep, schema)
    by_name = {e["approach"]: e for e in sweep["estimates"]}
    for name in ("isoflop", "parametric"):
        estimate = by_name[name]
        lo, hi = estimate["interval"]["params_exponent"]
        assert estimate["params_exponent"] == pytest.approx(QUICKSTART_LAW.params_exponent, abs=0.04)
        assert lo < estimate["params_exponent"] < hi
        at = estimate["at_mean_compute"]
        # N_opt(C) = coefficient * C^exponent, as the format says.
        n = estimate["params_coefficient"] * at["compute_flops"] ** estimate["params_exponent"]
        assert at["params_opt"]["estimate"] == pytest.approx(n, rel=1e-9)
        assert at["params_opt"]["interval"][0] < n < at["params_opt"]["interval"][1]
    assert set(by_name["parametric"]["parameters"]) == {"E", "A", "B", "alpha", "beta"}
    assert set(by_name["parametric"]["standard_errors"]) >= {
        "E",
        "A",
        "B",
        "alpha",
        "beta",
        "params_exponent",
    }
    assert sweep["observations"]["convention"] == "six_n_with_head"
    assert len(by_name["isoflop"]["budgets"]) == 3
    kinds = {row["kind"] for row in sweep["sensitivity"]}
    assert kinds == {"convention", "data", "method", "influence"}
    conventions = {row["choice"] for row in sweep["sensitivity"] if row["kind"] == "convention"}
    assert "convention=six_n_non_embedding" in conventions


def test_the_backtest_predicts_the_largest_budget_without_seeing_it(sweep: dict) -> None:
    by_name = {b["approach"]: b for b in sweep["backtest"]}
    parametric = by_name["parametric"]
    assert parametric["budget_flops"] == pytest.approx(1.6e12, rel=0.05)
    assert parametric["predicted"]["extrapolation_factor"] > 3
    reached = parametric["observed"]["loss_opt"]
    assert parametric["predicted"]["loss_opt"]["estimate"] == pytest.approx(reached, abs=0.03)
    # Without the largest budget two are left, which do not show a floor, so no loss is extrapolated from them.
    assert by_name["isoflop"]["predicted"]["loss_opt"]["estimate"] is None
    assert "two" in by_name["isoflop"]["message"]

    records = synthetic_records()
    worse = [
        replace(r, final_val_loss_nats=r.final_val_loss_nats + 0.2) if r.spec.budget_flops > 1e12 else r
        for r in records
        if r.final_val_loss_nats is not None
    ]
    s = replace(FAST, sensitivity=False)
    changed = analyze(observations_of_sweep(worse, s), s).to_json_dict()["backtest"]
    again = {b["approach"]: b for b in changed}["parametric"]
    assert again["predicted"]["loss_opt"]["estimate"] == pytest.approx(
        parametric["predicted"]["loss_opt"]["estimate"], rel=1e-9
    )
    assert again["observed"]["loss_opt"] == pytest.approx(reached + 0.2, abs=1e-6)


def test_nothing_is_nan_and_missing_is_null(sweep: dict) -> None:
    assert all(not isinstance(x, float) or math.isfinite(x) for x in walk(sweep))


def test_a_changed_loss_changes_the_numbers() -> None:
    records = synthetic_records()
    s = replace(FAST, sensitivity=False, backtest=False)
    one = analyze(observations_of_sweep(records, s), s).to_json_dict()
    records[0] = replace(records[0], final_val_loss_nats=(records[0].final_val_loss_nats or 0) + 0.05)
    two = analyze(observations_of_sweep(records, s), s).to_json_dict()
    for a, b in zip(one["estimates"][1:], two["estimates"][1:]):
        assert a["params_exponent"] != b["params_exponent"]


def test_agreement_is_judged_by_intervals_and_disagreement_is_explained() -> None:
    law = Truth(0.34, 0.28)
    clean = law.isoflop(np.array([1e18, 4e18, 1.6e19, 6.4e19]), np.geomspace(0.25, 4, 7))
    rng = np.random.default_rng(0)
    noise = 0.003 * rng.standard_normal(clean.n_points)
    # A valley that drifts sideways with the budget: IsoFLOP finds it, and no L(N, D) of this form can.
    tilt = (
        0.1 * np.log(clean.n_params / law.params_opt(clean.budget_flops)) * np.log(clean.budget_flops / 1e19)
    )
    for extra, agree in ((0.0, True), (tilt, False)):
        obs = Observations.from_arrays(
            n_params=clean.n_params,
            n_tokens=clean.n_tokens,
            loss_nats=clean.loss_nats + noise + extra,
            budget_flops=clean.budget_flops,
        )
        s = replace(FAST, sensitivity=False, backtest=False, bootstrap=BootstrapSettings(resamples=200))
        found = analyze(obs, s).agreement
        if agree:
            assert found.agree is True
        else:
            assert found.agree is False or any(p.agree is None for p in found.pairs)
            assert found.message


def test_weights_need_standard_errors_and_change_the_fit() -> None:
    obs = observations_of_sweep(synthetic_records(noise=0.02), FAST)
    s = replace(FAST, weights="loss_sem", sensitivity=False, backtest=False)
    sem = np.where(obs.compute_flops > 1e12, 0.001, 0.1)
    weighted = analyze(replace(obs, loss_sem_nats=sem), s)
    plain = analyze(obs, replace(s, weights=None))
    assert weighted.estimate("parametric").frontier != plain.estimate("parametric").frontier
    with pytest.raises(UserError, match="weights=loss_sem needs"):
        analyze(replace(obs, loss_sem_nats=np.full(obs.n_points, np.nan)), s)


def test_options_reach_the_approaches() -> None:
    s = replace(
        FAST,
        sensitivity=False,
        backtest=False,
        approach=ApproachSettings(
            isoflop=IsoFlopSettings(minimum="akima"), parametric=ParametricSettings(huber_delta=1e-4)
        ),
    )
    table = PUBLISHED / "gemstones_10b.csv"
    analysis = analyze(read_observations(table, s), replace(s, points="all"))
    assert analysis.estimate("parametric").fits[0].objective == pytest.approx(0.000692329, rel=1e-5)
    for bad, option in (
        ({"points": "last"}, "points"),
        ({"weights": "sem"}, "weights"),
        ({"convention": "6nd"}, "convention"),
    ):
        with pytest.raises(UserError, match=option):
            AnalysisSettings(**bad)  # type: ignore[arg-type]


def test_importing_the_analysis_loads_no_heavy_package() -> None:
    code = (
        "import sys, scaling_lab.analysis.analysis; "
        "print([m for m in ('torch', 'hydra', 'wandb', 'datasets', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
