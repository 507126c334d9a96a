"""Tests of the bias from IsoFLOP's grid: estimated from the fitted law, reported, and corrected for."""

from __future__ import annotations

import json
import re
from importlib import resources

import jsonschema
import numpy as np
import pytest

from helpers.known_truth import Truth
from scaling_lab.analysis.analysis import AnalysisSettings, analyze
from scaling_lab.analysis.approaches import IsoFlop, IsoFlopSettings, Parametric
from scaling_lab.analysis.approaches.isoflop.grid_bias import grid_bias
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.settings import ApproachSettings

LAW = Truth(0.45, 0.25)
BUDGETS = np.geomspace(1e18, 2.56e20, 5)


def drifting(noise_nats: float = 0.0) -> Observations:
    """Valleys with unequal exponents, whose sizes are less and less centered on the optimum."""
    n, c = [], []
    for k, budget in enumerate(BUDGETS):
        factors = np.geomspace(0.2, 5.0, 9) * 1.7 ** (k - 2)
        n.append(LAW.params_opt(budget) * factors)
        c.append(np.full(9, budget))
    sizes, compute = np.concatenate(n), np.concatenate(c)
    tokens = compute / 6 / sizes
    noise = noise_nats * np.random.default_rng(0).standard_normal(sizes.size)
    return Observations.from_arrays(
        n_params=sizes, n_tokens=tokens, loss_nats=LAW.loss(sizes, tokens) + noise, budget_flops=compute
    )


@pytest.mark.parametrize("minimum", ["parabola", "cubic", "akima"])
def test_the_bias_of_a_method_on_its_grid_is_estimated_and_corrected(minimum: str) -> None:
    obs = drifting()
    isoflop, parametric = IsoFlop(IsoFlopSettings(minimum=minimum)), Parametric()  # type: ignore[arg-type]
    found, fitted = isoflop.estimate(obs), parametric.estimate(obs)
    bias = grid_bias(isoflop, found, parametric, fitted, obs, 1e19)
    assert bias is not None
    assert found.frontier is not None
    wrong = found.frontier.params.exponent - LAW.a
    assert bias.params_exponent == pytest.approx(wrong, abs=2e-4)
    assert found.frontier.params.exponent - bias.params_exponent == pytest.approx(LAW.a, abs=2e-4)
    n = float(found.frontier.params(1e19)) * np.exp(-bias.log_params_opt)
    assert n == pytest.approx(float(LAW.params_opt(1e19)), rel=2e-3)
    if minimum == "parabola":
        assert abs(wrong) > 0.004


def test_the_diagnostics_state_the_bias_and_the_corrected_numbers() -> None:
    def said(minimum: str) -> str:
        approach = ApproachSettings(isoflop=IsoFlopSettings(minimum=minimum))  # type: ignore[arg-type]
        settings = AnalysisSettings(
            approach=approach, bootstrap=BootstrapSettings(resamples=0), sensitivity=False, backtest=False
        )
        notes = analyze(drifting(0.002), settings).estimate("isoflop").diagnostics
        return next(t for t in notes if t.startswith("On noise-free losses of the fitted chinchilla law"))

    plain, shared = said("parabola"), said("shared")
    assert "may be biased" in plain
    assert "may be biased" not in shared
    corrected = re.search(r"N as C\^(\d\.\d+)", plain)
    assert corrected is not None
    assert float(corrected[1]) == pytest.approx(LAW.a, abs=0.01)


def test_analysis_json_has_the_bias_and_the_answer_without_it() -> None:
    settings = AnalysisSettings(bootstrap=BootstrapSettings(resamples=0), sensitivity=False, backtest=False)
    analysis = analyze(drifting(), settings)
    data = json.loads(json.dumps(analysis.to_json_dict(), allow_nan=False))
    schema = json.loads(
        resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text("utf-8")
    )
    jsonschema.validate(data, schema)
    envelope, isoflop, parametric = data["estimates"]
    assert envelope["grid_bias"] is None
    assert parametric["grid_bias"] is None
    bias, corrected = isoflop["grid_bias"], isoflop["grid_bias"]["corrected"]
    for name in ("params_exponent", "tokens_exponent"):
        assert corrected[name] == pytest.approx(isoflop[name] - bias[name], abs=1e-12)
    at = bias["compute_flops"]
    assert at == isoflop["at_mean_compute"]["compute_flops"]
    found = isoflop["at_mean_compute"]["params_opt"]["estimate"]
    assert corrected["params_opt"] == pytest.approx(found * np.exp(-bias["log_params_opt"]))
    assert corrected["params_exponent"] == pytest.approx(LAW.a, abs=2e-4)
    assert corrected["tokens_exponent"] == pytest.approx(1 - LAW.a, abs=2e-4)
    assert corrected["params_opt"] == pytest.approx(float(LAW.params_opt(at)), rel=2e-3)


def test_an_unknown_bias_is_null() -> None:
    settings = AnalysisSettings(bootstrap=BootstrapSettings(resamples=0), sensitivity=False, backtest=False)
    obs = drifting()
    one = obs.points(obs.budget_flops == BUDGETS[0])
    data = analyze(one, settings).to_json_dict()
    assert [e["grid_bias"] for e in data["estimates"]] == [None, None, None]


def test_without_a_frontier_or_a_fit_there_is_no_bias() -> None:
    obs = drifting()
    isoflop, parametric = IsoFlop(), Parametric()
    fitted = parametric.estimate(obs)
    one = obs.points(obs.budget_flops == BUDGETS[0])
    assert grid_bias(isoflop, isoflop.estimate(one), parametric, fitted, one, 1e19) is None
    unfitted = parametric.estimate(one.points(np.arange(9) < 4))
    assert grid_bias(isoflop, isoflop.estimate(obs), parametric, unfitted, obs, 1e19) is None
