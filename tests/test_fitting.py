"""Tests of the fitting engine: published optima, invariance to units, statuses, batches, profiles, comparison of laws."""

from __future__ import annotations

import csv
import importlib.resources
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.fitting.fit import fit, fit_many, make_objective, weights_from_indices
from scaling_lab.analysis.fitting.newton import solve_positive
from scaling_lab.analysis.fitting.profile import profile_intervals
from scaling_lab.analysis.inference.law_comparison import compare_laws
from scaling_lab.analysis.laws import get_law
from scaling_lab.core.errors import UserError

LAW = get_law("chinchilla")


def published(name: str, keep_all: bool = True) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Columns, losses and run ids of a packed table."""
    path = importlib.resources.files("scaling_lab.analysis.published") / f"{name}.csv"
    with path.open() as handle:
        rows = [r for r in csv.DictReader(handle) if keep_all or r["dropped_by_besiroglu"] == "0"]
    column = {c: np.array([float(r[c]) for r in rows]) for c in ("params", "tokens", "loss")}
    data = {"n_params": column["params"], "n_tokens": column["tokens"]}
    return data, column["loss"], [r["run_id"] for r in rows]


@pytest.fixture(scope="module")
def chinchilla240() -> tuple[dict[str, np.ndarray], np.ndarray]:
    return published("chinchilla_epoch245", keep_all=False)[:2]


def isoflop_grid(budgets: int = 5, sizes: int = 7) -> dict[str, np.ndarray]:
    compute = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    n = 0.08 * np.sqrt(compute) * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    return {"n_params": n, "n_tokens": compute / 6 / n}


def exponent(parameters: object) -> float:
    return parameters["beta"] / (parameters["alpha"] + parameters["beta"])  # type: ignore[index]


# -- published tables (the data's README gives the optima; nothing in the engine knows these tables) ----------------------
@pytest.mark.parametrize(
    ("table", "keep_all", "delta", "objective", "a"),
    [
        ("chinchilla_epoch245", False, 1e-3, 0.001018274018, 0.51390),
        ("chinchilla_epoch245", True, 1e-3, 0.001826010523, 0.5646),
        ("gemstones_10b", True, 1e-3, 0.006592534, 0.6974),
        ("gemstones_10b", True, 1e-4, 0.000692329, 0.6958),
        ("misfitting_final", True, 1e-3, 0.005021654, 0.7604),
    ],
)
def test_published_optima(table: str, keep_all: bool, delta: float, objective: float, a: float) -> None:
    data, loss, _ = published(table, keep_all)
    result = fit(LAW, data, loss_nats=loss, huber_delta=delta)
    assert result.status == FitStatus.CONVERGED
    assert result.objective <= objective * (1 + 1e-6)
    assert exponent(result.parameters) == pytest.approx(a, abs=6e-5)
    assert result.starts_agreeing >= 20
    # The objective equals the definition of the Huber function applied to the residuals.
    r = np.abs(result.residuals_log)
    huber = np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum()
    assert result.objective == pytest.approx(huber, rel=1e-9)


def test_besiroglu_parameters(chinchilla240: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    data, loss = chinchilla240
    begin = time.process_time()
    result = fit(LAW, data, loss_nats=loss)
    # A cold fit should take less than .5 s of CPU time; the margin allows for slow or busy machines.
    assert time.process_time() - begin < 2.0
    expected = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    for name, value in expected.items():
        assert result.parameters[name] == pytest.approx(value, rel=2e-5)


def test_bootstrap_standard_error_of_the_240_rows(
    chinchilla240: tuple[dict[str, np.ndarray], np.ndarray],
) -> None:
    data, loss = chinchilla240
    counts = np.random.default_rng(0).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), size=1000)
    batch = fit_many(LAW, data, loss_nats=loss, weights=counts)
    assert batch.counts() == {"converged": 1000}
    assert batch.scaled_gradient.max() < 1e-6
    frontier = batch.frontier()
    assert frontier is not None
    # Besiroglu et al. 2024, table 1: .020 (their refit); the band is that of the published table's README.
    assert 0.016 <= np.std(frontier.params_exponent, ddof=1) <= 0.023


def test_each_resample_equals_its_own_fit(chinchilla240: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    data, loss = chinchilla240
    indices = np.random.default_rng(3).integers(0, len(loss), size=(4, len(loss)))
    batch = fit_many(LAW, data, loss_nats=loss, weights=weights_from_indices(indices, len(loss)))
    for i, rows in enumerate(indices):
        alone = fit(LAW, {k: v[rows] for k, v in data.items()}, loss_nats=loss[rows])
        assert batch.objective[i] == pytest.approx(alone.objective, rel=1e-8)
        assert batch.parameters["alpha"][i] == pytest.approx(alone.parameters["alpha"], rel=1e-5)


def test_no_general_purpose_optimizer_finds_a_lower_value(
    chinchilla240: tuple[dict[str, np.ndarray], np.ndarray],
) -> None:
    data, loss = chinchilla240
    result = fit(LAW, data, loss_nats=loss)
    start = np.array([result.parameters[k] for k in ("A", "B", "E", "alpha", "beta")])
    start[:3] = np.log(start[:3])
    x, y, target = np.log(data["n_params"]), np.log(data["n_tokens"]), np.log(loss)

    def objective(p: np.ndarray) -> float:
        fitted = np.exp(p[2]) + np.exp(p[0] - p[3] * x) + np.exp(p[1] - p[4] * y)
        r = np.abs(np.log(fitted) - target)
        return float(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum())

    assert objective(start) == pytest.approx(result.objective, rel=1e-9)
    rival = minimize(
        objective, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-16, "maxiter": 4000}
    )
    assert rival.fun >= result.objective * (1 - 1e-9)


# -- independence of units, of sums or means, of the path -----------------------------------------------------------------
@settings(max_examples=15)
@given(
    n_unit=st.floats(1e-9, 1e9),
    d_unit=st.floats(1e-12, 1e6),
    weight=st.floats(1e-8, 1e8),
    seed=st.integers(0, 99),
)
def test_units_and_weights_do_not_matter(n_unit: float, d_unit: float, weight: float, seed: int) -> None:
    grid = isoflop_grid()
    noise = 0.004 * np.random.default_rng(seed).standard_normal(len(grid["n_params"]))
    loss = LAW.loss_nats(LAW.example, grid) * np.exp(noise)
    plain = fit(LAW, grid, loss_nats=loss)
    other = fit(
        LAW,
        {"n_params": grid["n_params"] * n_unit, "n_tokens": grid["n_tokens"] * d_unit},
        loss_nats=loss,
        weights=np.full(len(loss), weight),
    )
    assert other.objective == pytest.approx(plain.objective * weight, rel=1e-7)
    assert other.status == plain.status
    if plain.status == FitStatus.CONVERGED:
        assert exponent(other.parameters) == pytest.approx(exponent(plain.parameters), abs=1e-5)
        moved = plain.parameters["A"] * n_unit ** plain.parameters["alpha"]
        assert np.log(other.parameters["A"]) == pytest.approx(np.log(moved), abs=1e-3)


def test_starts_of_the_paper_find_the_same_optimum(
    chinchilla240: tuple[dict[str, np.ndarray], np.ndarray],
) -> None:
    data, loss = chinchilla240
    problem, _ = make_objective(LAW, data, loss, None, 1e-3, "huber_log")
    starts = LAW.hoffmann_starts(problem.inputs)[::15]  # type: ignore[attr-defined]
    result = fit(LAW, data, loss_nats=loss, starts=starts)
    assert result.objective == pytest.approx(0.001018274018, rel=1e-6)
    assert result.starts_tried == 300


def test_integer_columns_do_not_overflow() -> None:
    grid = {k: np.round(v).astype(np.int64) for k, v in isoflop_grid().items()}
    loss = LAW.loss_nats(LAW.example, {k: v.astype(float) for k, v in grid.items()})
    assert exponent(fit(LAW, grid, loss_nats=loss).parameters) == pytest.approx(
        exponent(LAW.example), abs=1e-6
    )


@pytest.mark.parametrize("objective", ["huber_log", "mse_log", "mse"])
def test_every_objective_recovers_the_truth_and_is_stationary(objective: str) -> None:
    grid = isoflop_grid()
    loss = LAW.loss_nats(LAW.example, grid)
    result = fit(LAW, grid, loss_nats=loss, objective=objective)  # type: ignore[arg-type]
    assert exponent(result.parameters) == pytest.approx(exponent(LAW.example), abs=1e-8)
    noisy = loss * np.exp(0.003 * np.random.default_rng(5).standard_normal(len(loss)))
    result = fit(LAW, grid, loss_nats=noisy, objective=objective)  # type: ignore[arg-type]
    fitted = LAW.loss_nats(result.parameters, grid)
    r = fitted - noisy if objective == "mse" else np.log(fitted / noisy)
    size = np.abs(r)
    value = np.where(size <= 1e-3, r**2 / 2, 1e-3 * (size - 5e-4)) if objective == "huber_log" else r**2 / 2
    assert result.objective == pytest.approx(value.sum(), rel=1e-9)


def test_mse_matches_scipy_least_squares() -> None:
    from scipy.optimize import least_squares

    grid = isoflop_grid()
    loss = LAW.loss_nats(LAW.example, grid) + 0.01 * np.random.default_rng(7).standard_normal(35)
    result = fit(LAW, grid, loss_nats=loss, objective="mse")
    names = ("E", "A", "B", "alpha", "beta")
    rival = least_squares(
        lambda p: LAW.loss_nats(dict(zip(names, p, strict=True)), grid) - loss,
        [LAW.example[k] for k in names],
        x_scale=[1, 100, 100, 0.1, 0.1],
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=5000,
    )
    assert result.objective == pytest.approx(rival.cost, rel=1e-6)


def test_long_tables_are_searched_on_a_sample_and_fitted_whole() -> None:
    columns = LAW.example_columns(9000)
    noise = np.random.default_rng(0).standard_normal(9000)
    loss = LAW.loss_nats(LAW.example, columns) * np.exp(0.01 * noise)
    weights = np.ones(9000)
    weights[:500] = 0
    result = fit(LAW, columns, loss_nats=loss, weights=weights)
    assert result.status == FitStatus.CONVERGED
    assert result.starts_agreeing >= 20
    truth = fit(LAW, columns, loss_nats=loss, weights=weights, starts=LAW.example)
    assert result.objective == pytest.approx(truth.objective, rel=1e-9)


def test_observations_are_accepted_directly() -> None:
    from scaling_lab.analysis.data.observations import Observations

    law = get_law("gemstones")
    columns = law.example_columns()
    n = columns["width"] ** 2 * columns["depth"] * 12
    loss = law.loss_nats(law.example, columns)
    observations = Observations.from_arrays(
        n_params=n,
        n_tokens=columns["n_tokens"],
        loss_nats=loss,
        extra={"width": columns["width"], "depth": columns["depth"]},
    )
    assert fit(LAW, observations).n_observations == len(loss)
    result = fit(law, observations)
    assert result.parameters["zeta"] == pytest.approx(law.example["zeta"], rel=1e-6)


def test_zero_weight_leaves_a_row_out() -> None:
    grid = isoflop_grid()
    loss = LAW.loss_nats(LAW.example, grid) * np.exp(0.004 * np.random.default_rng(1).standard_normal(35))
    spoiled = loss.copy()
    spoiled[3] *= 5
    keep = np.ones(35)
    keep[3] = 0
    weighted = fit(LAW, grid, loss_nats=spoiled, weights=keep)
    dropped = fit(LAW, {k: np.delete(v, 3) for k, v in grid.items()}, loss_nats=np.delete(loss, 3))
    assert weighted.objective == pytest.approx(dropped.objective, rel=1e-7)


def test_losses_may_differ_by_problem() -> None:
    grid = isoflop_grid()
    truth = LAW.loss_nats(LAW.example, grid)
    losses = truth * np.exp(0.003 * np.random.default_rng(2).standard_normal((6, 35)))
    batch = fit_many(LAW, grid, loss_nats=losses)
    for i in range(6):
        assert batch.objective[i] == pytest.approx(fit(LAW, grid, loss_nats=losses[i]).objective, rel=1e-7)


# -- statuses -------------------------------------------------------------------------------------------------------------
def test_one_size_only_is_not_identified() -> None:
    d = np.geomspace(1e9, 1e11, 20)
    data = {"n_params": np.full(20, 1e8), "n_tokens": d}
    loss = LAW.loss_nats(LAW.example, data) * np.exp(0.001 * np.random.default_rng(0).standard_normal(20))
    result = fit(LAW, data, loss_nats=loss)
    assert result.status == FitStatus.NOT_IDENTIFIED
    assert "alpha" in result.message
    assert "n_params has only one value" in result.message


def test_two_sizes_do_not_identify_three_parameters() -> None:
    data = {"n_params": np.tile([1e8, 1e9], 12), "n_tokens": np.geomspace(1e9, 1e11, 24)}
    assert fit(LAW, data, loss_nats=LAW.loss_nats(LAW.example, data)).status == FitStatus.NOT_IDENTIFIED


def test_fewer_observations_than_parameters() -> None:
    data = {k: v[:4] for k, v in isoflop_grid().items()}
    result = fit(LAW, data, loss_nats=LAW.loss_nats(LAW.example, data))
    assert result.status == FitStatus.NOT_IDENTIFIED
    assert "4 observations" in result.message
    batch = fit_many(
        LAW, isoflop_grid(), loss_nats=LAW.loss_nats(LAW.example, isoflop_grid()), weights=np.eye(3, 35)
    )
    assert batch.counts() == {"not_identified": 3}
    assert not batch.reached.any()


def test_a_missing_floor_is_reported_as_at_bound() -> None:
    grid = isoflop_grid()
    loss = 9 - 0.25 * np.log(grid["n_params"]) + 30 / grid["n_tokens"] ** 0.1
    result = fit(
        get_law("power_n"), grid, loss_nats=np.exp(-0.3 * (np.log(grid["n_params"]) - 20) ** 2 / 20) * loss
    )
    assert result.status == FitStatus.AT_BOUND
    assert result.message.startswith("E is 0")
    assert result.parameters["E"] == 0.0


def test_exact_power_law_without_floor_converges_without_e() -> None:
    law = get_law("power_n", irreducible=False)
    n = np.geomspace(1e6, 1e10, 12)
    result = fit(law, {"n_params": n}, loss_nats=30 * n**-0.076)
    assert result.status == FitStatus.CONVERGED
    assert result.parameters["alpha"] == pytest.approx(0.076, rel=1e-9)


def test_a_single_start_disagrees_and_a_cut_off_search_reports_max_steps(
    chinchilla240: tuple[dict[str, np.ndarray], np.ndarray],
) -> None:
    data, loss = chinchilla240
    good = fit(LAW, data, loss_nats=loss).parameters
    # alpha is so steep that its term is negligible except at the smallest N: a plateau without descent to the optimum.
    two = fit(LAW, data, loss_nats=loss, starts=[good, {**good, "A": good["A"] * 1e140, "alpha": 19.0}])
    assert two.starts_tried == 2
    assert two.starts_agreeing == 1
    assert two.status == FitStatus.STARTS_DISAGREE
    assert "Only 1 of 2" in two.message
    assert two.objective == pytest.approx(0.001018274018, rel=1e-6)
    cut = fit(LAW, data, loss_nats=loss, max_steps=2)
    assert cut.status == FitStatus.MAX_STEPS
    assert "scaled gradient" in cut.message


def test_bad_input_is_one_clear_line() -> None:
    grid = isoflop_grid()
    loss = LAW.loss_nats(LAW.example, grid)
    with pytest.raises(UserError, match="huber_log"):
        fit(LAW, grid, loss_nats=loss, objective="huber")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="huber_delta"):
        fit(LAW, grid, loss_nats=loss, huber_delta=0)
    with pytest.raises(UserError, match="weights"):
        fit(LAW, grid, loss_nats=loss, weights=-np.ones(35))
    with pytest.raises(UserError, match="weights"):
        fit_many(LAW, grid, loss_nats=loss, weights=np.ones((2, 3)))
    with pytest.raises(UserError, match="positive losses"):
        fit(LAW, grid, loss_nats=loss - 10)
    with pytest.raises(UserError, match="starts"):
        fit(LAW, grid, loss_nats=loss, starts=np.ones((2, 3)))


def test_two_point_weights_from_indices() -> None:
    np.testing.assert_array_equal(weights_from_indices([[0, 0, 2], [1, 2, 2]], 3), [[2, 0, 1], [0, 1, 2]])


def test_batched_cholesky_solves_and_flags_indefinite() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((50, 5, 5))
    a = a @ a.transpose(0, 2, 1) + 0.1 * np.eye(5)
    b = rng.standard_normal((50, 5))
    a[7] -= 100 * np.eye(5)
    x, positive = solve_positive(a, b)
    assert not positive[7]
    assert positive.sum() == 49
    np.testing.assert_allclose(np.einsum("bij,bj->bi", a[positive], x[positive]), b[positive], atol=1e-8)


# -- profiles ------------------------------------------------------------------------------------------------------------
def test_profile_of_a_linear_problem_is_the_t_interval() -> None:
    # linear_log under squared error on the loss is linear regression: the profile interval is the exact t interval.
    from scipy.stats import t

    law = get_law("linear_log")
    columns = law.example_columns()
    rng = np.random.default_rng(4)
    loss = law.loss_nats(law.example, columns) + 0.02 * rng.standard_normal(60)
    (interval,) = profile_intervals(law, columns, ["k_N"], 0.9, loss_nats=loss, objective="mse")
    x = np.stack([np.ones(60), -np.log(columns["n_params"]), -np.log(columns["n_tokens"])], axis=1)
    beta, rss, *_ = np.linalg.lstsq(x, loss, rcond=None)
    error = np.sqrt(rss[0] / 57 * np.linalg.inv(x.T @ x)[1, 1])
    assert interval.estimate == pytest.approx(beta[1], rel=1e-6)
    assert interval.lo == pytest.approx(beta[1] - t.ppf(0.95, 57) * error, rel=2e-3)
    assert interval.hi == pytest.approx(beta[1] + t.ppf(0.95, 57) * error, rel=2e-3)


def test_profile_points_are_minima_at_their_quantity(
    chinchilla240: tuple[dict[str, np.ndarray], np.ndarray],
) -> None:
    data, loss = chinchilla240
    best = fit(LAW, data, loss_nats=loss)
    (interval,) = profile_intervals(LAW, data, ["alpha"], loss_nats=loss, starts=best.parameters)
    assert interval.lo is not None
    assert interval.hi is not None
    assert interval.lo < best.parameters["alpha"] < interval.hi
    x, y, target = np.log(data["n_params"]), np.log(data["n_tokens"]), np.log(loss)
    alpha = float(interval.values[1])

    def objective(p: np.ndarray) -> float:
        r = np.abs(np.log(np.exp(p[2]) + np.exp(p[0] - alpha * x) + np.exp(p[1] - p[3] * y)) - target)
        return float(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum())

    start = [
        np.log(best.parameters["A"]) + (alpha - best.parameters["alpha"]) * 20,
        np.log(best.parameters["B"]),
    ]
    start += [np.log(best.parameters["E"]), best.parameters["beta"]]
    options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 8000, "maxfev": 8000}
    rival = minimize(objective, start, method="Nelder-Mead", options=options)
    rival = minimize(objective, rival.x, method="Nelder-Mead", options=options)
    assert best.objective + interval.rises[1] <= rival.fun * (1 + 1e-6)


def test_profiles_of_all_quantities(chinchilla240: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
    data, loss = chinchilla240
    for scale in ("robust", "likelihood"):
        found = {i.quantity: i for i in profile_intervals(LAW, data, loss_nats=loss, scale=scale)}  # type: ignore[arg-type]
        assert set(found) == {"E", "A", "B", "alpha", "beta", "params_exponent", "tokens_exponent"}
        a, b = found["params_exponent"], found["tokens_exponent"]
        assert a.lo is not None
        assert b.hi is not None
        assert a.lo + b.hi == pytest.approx(1.0, abs=2e-3)
        # The row bootstrap's standard error is .020, so a 90% interval is some .06 wide.
        assert 0.03 < a.hi - a.lo < 0.09  # type: ignore[operator]
        assert np.all(np.diff(a.values) > 0)
        assert a.rises.min() == 0.0


def test_a_quantity_not_bounded_by_the_data() -> None:
    # A 20% spread of N with 1% noise hardly determines alpha.
    rng = np.random.default_rng(0)
    data = {"n_params": 1e9 * np.exp(0.1 * rng.standard_normal(40)), "n_tokens": np.geomspace(1e9, 1e12, 40)}
    loss = LAW.loss_nats(LAW.example, data) * np.exp(0.01 * rng.standard_normal(40))
    (interval,) = profile_intervals(LAW, data, ["alpha"], loss_nats=loss)
    assert interval.lo is None or interval.hi is None
    assert "alpha" in interval.message.lower()


def test_profile_coverage_is_near_nominal() -> None:
    grid = isoflop_grid()
    truth = LAW.loss_nats(LAW.example, grid)
    a, hits = exponent(LAW.example), 0
    for seed in range(40):
        loss = truth * np.exp(0.004 * np.random.default_rng(seed).standard_normal(35))
        (interval,) = profile_intervals(
            LAW, grid, ["params_exponent"], 0.9, loss_nats=loss, starts=LAW.example
        )
        hits += (interval.lo is None or interval.lo <= a) and (interval.hi is None or a <= interval.hi)
    assert 30 <= hits <= 40  # a 90% interval: 36 expected, standard deviation 1.9


def test_profile_refuses_unknown_names() -> None:
    grid = isoflop_grid()
    loss = LAW.loss_nats(LAW.example, grid)
    with pytest.raises(UserError, match="params_exponent"):
        profile_intervals(LAW, grid, ["param_exponent"], loss_nats=loss)
    with pytest.raises(UserError, match="level"):
        profile_intervals(LAW, grid, ["alpha"], 90, loss_nats=loss)


# -- comparison of laws -----------------------------------------------------------------------------------------------------
def test_the_true_law_wins_out_of_sample() -> None:
    grid = isoflop_grid(6, 8)
    loss = LAW.loss_nats(LAW.example, grid) * np.exp(0.002 * np.random.default_rng(0).standard_normal(48))
    result = compare_laws([get_law(n) for n in ("linear_log", "power_n", "chinchilla")], grid, loss_nats=loss)
    assert result.scores[0].law.name == "chinchilla"
    best, rival = result.scores[:2]
    assert best.excess == 0.0
    assert rival.excess > 2 * rival.excess_standard_error  # type: ignore[operator]
    assert best.extrapolation.mean_abs < rival.extrapolation.mean_abs  # type: ignore[union-attr]
    assert best.cross_validation.n_points == 48  # type: ignore[union-attr]
    assert "chinchilla" in str(result)


def test_a_flexible_law_loses_its_advantage_out_of_sample() -> None:
    # The truth is linear in the logs, with few noisy points: the five-parameter law fits better but predicts no better.
    law = get_law("linear_log")
    columns = law.example_columns(16, seed=3)
    loss = law.loss_nats(law.example, columns) * np.exp(0.02 * np.random.default_rng(3).standard_normal(16))
    result = compare_laws([LAW, law], columns, loss_nats=loss, folds=16)
    scores = {s.law.name: s for s in result.scores}
    assert scores["chinchilla"].in_sample_mean_abs < scores["linear_log"].in_sample_mean_abs  # type: ignore[operator]
    assert result.scores[0].law.name == "linear_log"


def test_groups_are_left_out_whole() -> None:
    # Each run has its own offset, which leaving out random rows would reveal, but leaving out runs does not.
    rng = np.random.default_rng(1)
    runs = np.repeat(np.arange(12), 10)
    n = np.geomspace(1e8, 1e10, 12)[runs]
    d = np.tile(np.geomspace(1e9, 1e11, 10), 12)
    data = {"n_params": n, "n_tokens": d}
    loss = LAW.loss_nats(LAW.example, data) * np.exp(0.03 * rng.standard_normal(12))[runs]
    by_run = compare_laws([LAW, get_law("linear_log")], data, loss_nats=loss, groups=runs, folds=12)
    by_row = compare_laws([LAW, get_law("linear_log")], data, loss_nats=loss)
    assert by_run.n_groups == 12
    assert by_row.n_groups == 120
    error = {
        r: {s.law.name: s.cross_validation.mean_abs for s in c.scores}
        for r, c in (("run", by_run), ("row", by_row))
    }  # type: ignore[union-attr]
    assert error["run"]["chinchilla"] > error["row"]["chinchilla"]


def test_a_law_whose_column_is_missing_is_listed_last_with_its_reason() -> None:
    grid = isoflop_grid()
    loss = LAW.loss_nats(LAW.example, grid)
    result = compare_laws([get_law("gemstones"), LAW], grid, loss_nats=loss)
    assert result.scores[-1].status == FitStatus.NOT_APPLICABLE
    assert "width" in result.scores[-1].message
    with pytest.raises(UserError, match="3 groups"):
        compare_laws([LAW], grid, loss_nats=loss, groups=np.zeros(35))
