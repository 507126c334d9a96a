"""Tests of Approach 3: recovery, closed form against numerical frontier, published optima, laws without a frontier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.known_truth import PUBLISHED, Truth
from helpers.synthetic import synthetic_records
from scaling_lab.analysis.approaches import Parametric, ParametricSettings
from scaling_lab.analysis.approaches.law_frontier import numerical_frontier
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.analysis.data.table_observations import from_table
from scaling_lab.analysis.data.tables.table import read_table
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.frontiers import quantities
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings, bootstrap
from scaling_lab.core.errors import UserError

BUDGETS = np.array([1e18, 4e18, 1.6e19, 6.4e19])
FACTORS = np.geomspace(0.2, 5, 7)


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.2, 0.6), (0.5, 0.3)])
def test_recovers_a_known_law_to_1e_4(alpha: float, beta: float) -> None:
    law = Truth(alpha, beta)
    estimate = Parametric().estimate(law.isoflop(BUDGETS, FACTORS))
    assert estimate.status is FitStatus.CONVERGED
    assert estimate.frontier is not None
    assert estimate.frontier.params.exponent == pytest.approx(law.a, abs=1e-4)
    assert estimate.frontier.tokens.exponent == pytest.approx(1 - law.a, abs=1e-4)
    assert estimate.frontier.params(1e20) == pytest.approx(law.params_opt(1e20), rel=1e-3)
    best = law.loss(law.params_opt(1e20), 1e20 / 6 / law.params_opt(1e20))
    assert estimate.frontier.loss is not None
    assert estimate.frontier.loss(1e20) == pytest.approx(best, abs=1e-4)
    assert any("closed form" in d for d in estimate.diagnostics)


def test_the_numerical_frontier_equals_the_closed_form_where_both_exist() -> None:
    law = Truth(0.34, 0.28)
    obs = law.isoflop(BUDGETS, FACTORS)
    approach = Parametric()
    fit = approach.estimate(obs).fits[0]
    points = numerical_frontier(approach.law, {k: np.array([v]) for k, v in fit.parameters.items()}, obs)
    assert quantities(points)["params_exponent"][0] == pytest.approx(law.a, abs=1e-4)
    np.testing.assert_allclose(np.exp(points.log_n[0]), law.params_opt(np.exp(points.log_c[0])), rtol=2e-3)


def test_the_frontier_minimizes_the_loss_under_the_observed_flops_per_token() -> None:
    law = Truth(0.34, 0.28)
    obs = law.isoflop(BUDGETS, FACTORS)
    per_token = 6 * obs.n_params * (1 + (2e8 / obs.n_params) ** 0.5)
    tokens = obs.compute_flops / per_token
    exact = Observations.from_arrays(
        n_params=obs.n_params,
        n_tokens=tokens,
        compute_flops=obs.compute_flops,
        loss_nats=law.loss(obs.n_params, tokens),
    )
    frontier = Parametric().estimate(exact).frontier
    assert frontier is not None
    for c in (2e18, 2e19):
        n = np.geomspace(1e7, 1e10, 20_000)
        best = n[np.argmin(law.loss(n, c / (6 * n * (1 + (2e8 / n) ** 0.5))))]
        assert frontier.params(c) == pytest.approx(best, rel=0.03)
    assert abs(frontier.params.exponent - law.a) > 0.01  # not the closed form's


@pytest.mark.parametrize(
    ("file", "points", "where", "objective", "exponent"),
    [
        ("chinchilla_epoch245", "final", {"dropped_by_besiroglu": 0}, 0.001018274018, 0.51390),
        ("chinchilla_epoch245", "final", {}, 0.001826010523, 0.5646),
        ("gemstones_10b", "all", {}, 0.006592534, 0.6974),
        ("misfitting_final", "all", {}, 0.005021654, 0.7604),
    ],
)
def test_published_tables_give_the_converged_optimum(
    file: str, points: str, where: dict, objective: float, exponent: float
) -> None:
    obs = from_table(read_table(PUBLISHED / f"{file}.csv", where=where), each_row=points == "all")
    estimate = Parametric().estimate(obs.final() if points == "final" else obs)
    assert estimate.fits[0].objective <= objective * (1 + 1e-6)
    assert estimate.frontier is not None
    assert estimate.frontier.params.exponent == pytest.approx(exponent, abs=1e-4)


def test_bootstrap_by_run_and_by_row_of_gemstones() -> None:
    obs = from_table(read_table(PUBLISHED / "gemstones_10b.csv"))
    approach = Parametric()
    estimate = approach.estimate(obs)
    errors = {}
    for unit in ("run", "row"):
        band = bootstrap(approach, obs, estimate, BootstrapSettings(resamples=150, unit=unit), 0)  # type: ignore[arg-type]
        errors[unit] = band.standard_error("alpha")
    # The table's README: .006 by row, .052 by run; rows of one run are not independent.
    assert errors["row"] == pytest.approx(0.006, rel=0.3)
    assert errors["run"] == pytest.approx(0.052, rel=0.3)


def test_besiroglu_standard_error() -> None:
    obs = from_table(read_table(PUBLISHED / "chinchilla_epoch245.csv", where={"dropped_by_besiroglu": 0}))
    approach = Parametric()
    band = bootstrap(approach, obs, approach.estimate(obs), BootstrapSettings(resamples=400), 0)
    assert band.standard_error("params_exponent") == pytest.approx(0.0195, abs=0.0035)


def test_a_law_without_n_and_d_has_no_frontier_and_a_missing_column_is_named() -> None:
    from scaling_lab.analysis.laws import get_law, law_names

    obs = Truth(0.34, 0.28).isoflop(BUDGETS, FACTORS)
    asked = 0
    for name in law_names():
        columns = get_law(name).columns
        approach = Parametric(ParametricSettings(law=name))
        if not set(columns) <= {"n_params", "n_tokens", "compute_flops"}:
            with pytest.raises(UserError, match=f"law={name} needs the column"):
                approach.estimate(obs)
            asked += 1
        elif not {"n_params", "n_tokens"} <= set(columns):
            estimate = approach.estimate(obs)
            assert estimate.frontier is None
            assert "no compute-optimal frontier" in estimate.message
            asked += 1
    assert asked or set(law_names()) == {"chinchilla"}
    with pytest.raises(UserError, match=r"law='chinchila'.*chinchilla"):
        ParametricSettings(law="chinchila")


def test_records_in_a_convention_with_attention_use_the_numerical_frontier() -> None:
    obs = observations_from_records(synthetic_records(noise=0.0)).under("matmul_plus_attention")
    estimate = Parametric().estimate(obs)
    assert any("numerically" in d for d in estimate.diagnostics)
    assert estimate.frontier is not None
    middle = float(np.sqrt(obs.compute_flops.min() * obs.compute_flops.max()))
    n, d = float(estimate.frontier.params(middle)), float(estimate.frontier.tokens(middle))
    # A token at the optimum costs as much as in the runs: more than 6 N.
    assert 1.02 < middle / (6 * n * d) < 2.0


def test_too_few_points_are_reported_as_not_identified() -> None:
    obs = Truth(0.34, 0.28).isoflop(BUDGETS[:1], FACTORS[:4])
    estimate = Parametric().estimate(obs)
    assert estimate.status is FitStatus.NOT_IDENTIFIED
    assert estimate.frontier is None
    band = bootstrap(Parametric(), obs, estimate, BootstrapSettings(resamples=50), 0)
    assert band.interval("params_exponent") is None
    assert (band.message or "").startswith("No interval")


def test_points_at_one_compute_do_not_show_how_the_optimum_grows() -> None:
    # The shape of a single valley determines all five parameters of the law, and hence any exponent.
    law = Truth(0.34, 0.28)
    rng = np.random.default_rng(0)
    for budgets, identified in (([1e18], False), ([1e18, 1.15e18], False), ([1e18, 2e18], True)):
        clean = law.isoflop(np.array(budgets), np.geomspace(0.1, 10, 9))
        noisy = replace(
            clean, loss_nats=clean.loss_nats * np.exp(0.001 * rng.standard_normal(clean.n_points))
        )
        found = Parametric().estimate(noisy)
        assert (found.frontier is not None) is identified
        if not identified:
            assert found.status is FitStatus.NOT_IDENTIFIED
            assert "have the same compute" in found.message
            assert found.fits
