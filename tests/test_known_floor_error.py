"""Tests of the standard error of E at a known floor: by hand, against SciPy, and over simulated studies."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import norm

from scaling_lab.analysis.approaches import Parametric, ParametricSettings
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, FitResult
from scaling_lab.analysis.inference.calibration import LAWS, Cell, simulate
from scaling_lab.analysis.studies.shared.floor_error import FloorErrors, floor_errors

TRUTH = LAWS["quickstart"]


def study(number: int = 0, noise: float = 0.005) -> Observations:
    return simulate(Cell("quickstart", "quickstart", noise, "parametric"), number).final()


def fitted(points: Observations, approach: Parametric, weights: Array | None = None) -> FitResult:
    return approach.estimate(points, weights).fits[0]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts" / "calibrate_floor.py"
    spec = importlib.util.spec_from_file_location("calibrate_floor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- by hand


def test_each_side_has_the_root_mean_square_of_its_own_errors() -> None:
    # Below: fifteen times -3 and -1, mean square 5. Above: thirty times 2.
    errors = FloorErrors(np.array([-3.0, -1.0] * 15 + [2.0] * 30), noise_log=0.01)
    assert errors.standard_error(-0.4) == pytest.approx(0.01 * np.sqrt(5.0))
    assert errors.standard_error(+0.4) == pytest.approx(0.02)
    # So the mean square of z over these very sweeps is 1.
    z = [r * 0.01 / errors.standard_error(r) for r in errors.ratios.tolist()]  # type: ignore[operator]
    assert np.mean(np.square(z)) == pytest.approx(1.0)


def test_a_side_without_samples_uses_the_error_of_both_sides() -> None:
    errors = FloorErrors(np.array([2.0] * 30 + [-4.0] * 10), noise_log=0.1)
    assert errors.standard_error(-1.0) == pytest.approx(0.1 * np.sqrt((30 * 4 + 10 * 16) / 40))
    assert errors.standard_error(1.0) == pytest.approx(0.2)
    assert FloorErrors(np.array([1.0, -1.0] * 9), 0.1).standard_error(1.0) is None


# -- against SciPy


def test_errors_are_those_of_least_squares_by_scipy() -> None:
    """The whole simulation again with SciPy's optimizer: null, noise, sweeps (with least squares, which SciPy has)."""
    points, sweeps = study(3), 30
    approach = Parametric(ParametricSettings(objective="mse_log"))
    errors = floor_errors(points, approach, fitted(points, approach), TRUTH.E, sweeps, seed=7)
    assert errors is not None
    log_n, log_d = np.log(points.n_params), np.log(points.n_tokens)
    x, y = log_n - log_n.mean(), log_d - log_d.mean()

    def solve(loss: Array, start: list[float], floor: float | None = None) -> tuple[Array, float, Array]:
        def predicted(t: Array) -> Array:
            e = t[4] if floor is None else floor
            return np.asarray(np.log(e + np.exp(t[0] - t[2] * x) + np.exp(t[1] - t[3] * y)))

        found = least_squares(
            lambda t: predicted(t) - np.log(loss), start, x_scale="jac", xtol=1e-14, ftol=1e-14
        )
        return found.x, 2 * float(found.cost), predicted(found.x)

    start = [
        np.log(TRUTH.A) - TRUTH.alpha * log_n.mean(), np.log(TRUTH.B) - TRUTH.beta * log_d.mean(),
        TRUTH.alpha, TRUTH.beta,
    ]  # fmt: skip
    loss, free = points.loss_nats, points.n_points - 5
    _, squares, _ = solve(loss, [*start, TRUTH.E])
    at, _, null = solve(loss, start, TRUTH.E)
    noise = np.sqrt(squares / free)
    assert errors.noise_log == pytest.approx(noise, rel=1e-6)
    draws = np.random.default_rng([7, 6161]).standard_normal((sweeps, points.n_points))
    wanted = []
    for row in draws:
        found, squares, _ = solve(np.exp(null + noise * row), [*at, TRUTH.E])
        wanted.append((found[4] - TRUTH.E) / np.sqrt(squares / free))
    np.testing.assert_allclose(errors.ratios, wanted, rtol=1e-4, atol=1e-4)


def test_the_null_is_the_true_floor_and_not_the_fitted_one() -> None:
    """A fit far from the truth has the errors of fits around the truth: z grows with the distance."""
    points, approach = study(), Parametric()
    fit = fitted(points, approach)
    at_truth = floor_errors(points, approach, fit, TRUTH.E, 200, 0)
    lower = floor_errors(points, approach, fit, 0.5, 200, 0)
    assert at_truth is not None
    assert lower is not None
    # At a floor of .5 the exponents are smaller, and E is less certain.
    assert lower.standard_error(1.0) > 2 * at_truth.standard_error(1.0)  # type: ignore[operator]
    assert abs(np.median(at_truth.ratios)) < 0.3 * at_truth.ratios.std()


def test_only_unequal_weights_change_the_error() -> None:
    points, approach = study(), Parametric()
    w = np.full(points.n_points, 4.0)
    plain = floor_errors(points, approach, fitted(points, approach), TRUTH.E, 50, 0)
    equal = floor_errors(points, approach, fitted(points, approach, w), TRUTH.E, 50, 0, w)
    assert plain is not None
    assert equal is not None
    assert equal.standard_error(1.0) == pytest.approx(plain.standard_error(1.0), rel=1e-4)
    assert equal.noise_log == pytest.approx(2 * plain.noise_log)
    w[:12] = 0.25
    other = floor_errors(points, approach, fitted(points, approach, w), TRUTH.E, 50, 0, w)
    assert other is not None
    assert other.standard_error(1.0) != pytest.approx(plain.standard_error(1.0), rel=0.02)


def test_cases_without_a_simulation() -> None:
    points, approach = study(), Parametric()
    fit = fitted(points, approach)
    few = points.points(np.arange(points.n_points) < 7)
    assert floor_errors(few, approach, fit, TRUTH.E, 50, 0) is None
    enough = points.points(np.arange(points.n_points) % 3 == 0)
    assert floor_errors(enough, approach, fitted(enough, approach), TRUTH.E, 50, 0) is not None


# -- over simulated studies


def test_the_script_passes_only_calibrated_results(script: ModuleType) -> None:
    z = norm.ppf((np.arange(500) + 0.5) / 500)
    assert script.line(0.005, z, 0)[1]
    assert "sd 1.000 +- 0.032" in script.line(0.005, z, 0)[0]
    for wrong in (0.886 * z, 1.13 * z, z + 0.15, z - 0.15):  # the standard errors are .032 and .045
        text, ok = script.line(0.005, wrong, 0)
        assert not ok
        assert text.endswith("MISSED")


@pytest.mark.slow
def test_z_of_the_fitted_floor_over_simulated_studies(script: ModuleType) -> None:
    """Forty studies: mean near 0, spread near 1; the committed table (results/benchmarks/calibration_floor.txt) has 500."""
    z = np.array(script.all_z(0.005, 40, 100, workers=1), dtype=float)
    assert z[:2].tolist() == script.all_z(0.005, 2, 100, workers=1)
    assert script.line(0.005, z, 0)[1]
    # Standard errors of half or twice the size would be detected.
    assert not script.line(0.005, 2 * z, 0)[1]
    assert not script.line(0.005, z / 2, 0)[1]
