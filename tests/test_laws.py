"""Tests of the loss laws: each law recovers its own synthetic truth, and its derivatives are correct."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.fitting.fit import fit
from scaling_lab.analysis.laws import LossLaw, get_law, law_names
from scaling_lab.analysis.laws.base import read_column
from scaling_lab.core.errors import UserError

# Laws with default options are found by scanning; options that change the formula are added here.
VARIANTS = [(name, {}) for name in law_names()] + [
    ("power_n", {"irreducible": False}),
    ("power_d", {"irreducible": False}),
    ("power_c", {"irreducible": False}),
    ("gemstones", {"with_params": True}),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: get_law(v[0], **v[1]).label)
def law(request: pytest.FixtureRequest) -> LossLaw:
    name, options = request.param
    return get_law(name, **options)


def synthetic(law: LossLaw) -> tuple[dict[str, np.ndarray], np.ndarray]:
    columns = law.example_columns()
    return columns, np.asarray(law.loss_nats(law.example, columns))


def perturbed(law: LossLaw, count: int = 5) -> tuple[np.ndarray, object]:
    """Internal parameters near the truth, within the bounds, and the inputs."""
    columns, loss = synthetic(law)
    inputs = law.prepare(columns, loss)
    truth = law.from_natural(law.example, inputs)
    theta = truth + 0.05 * np.random.default_rng(1).standard_normal((count, len(truth)))
    return np.clip(theta, *law.bounds(inputs)), inputs


def test_a_law_recovers_its_own_truth(law: LossLaw) -> None:
    columns, loss = synthetic(law)
    result = fit(law, columns, loss_nats=loss)
    assert result.status == FitStatus.CONVERGED
    assert result.starts_agreeing >= 3
    for name, value in law.example.items():
        assert result.parameters[name] == pytest.approx(value, rel=1e-6), name


def test_a_law_is_recovered_approximately_under_noise(law: LossLaw) -> None:
    columns, loss = synthetic(law)
    noisy = loss * np.exp(1e-4 * np.random.default_rng(0).standard_normal(len(loss)))
    result = fit(law, columns, loss_nats=noisy)
    assert result.status == FitStatus.CONVERGED
    predicted = law.loss_nats(result.parameters, columns)
    assert np.max(np.abs(predicted / loss - 1)) < 3e-4


def test_internal_evaluation_is_the_formula_of_the_paper(law: LossLaw) -> None:
    theta, inputs = perturbed(law)
    log_fit, _ = law.evaluate(theta, inputs)
    for row, values in zip(theta, log_fit, strict=True):
        expected = np.log(law.loss_nats(law.to_natural(row, inputs), inputs.columns))
        np.testing.assert_allclose(values + inputs.log_loss_center, expected, rtol=0, atol=1e-12)


def test_jacobian_matches_differences(law: LossLaw) -> None:
    theta, inputs = perturbed(law)
    _, jacobian = law.evaluate(theta, inputs)
    h = 1e-5
    for j in range(theta.shape[1]):
        step = h * np.eye(theta.shape[1])[j]
        # Fourth-order central differences: truncation h^4, rounding 1e-16 / h.
        one = law.evaluate(theta + step, inputs)[0] - law.evaluate(theta - step, inputs)[0]
        two = law.evaluate(theta + 2 * step, inputs)[0] - law.evaluate(theta - 2 * step, inputs)[0]
        np.testing.assert_allclose(jacobian[:, j], (8 * one - two) / (12 * h), rtol=1e-7, atol=1e-9)


def test_curvature_matches_differences_of_the_gradient(law: LossLaw) -> None:
    theta, inputs = perturbed(law, 2)
    v = np.random.default_rng(2).standard_normal((2, inputs.n_observations))
    _, jacobian = law.evaluate(theta, inputs)
    second = law.curvature(theta, inputs, v, jacobian) - np.einsum("bin,bn,bjn->bij", jacobian, v, jacobian)
    h = 1e-5
    for j in range(theta.shape[1]):
        step = h * np.eye(theta.shape[1])[j]
        up, down = law.evaluate(theta + step, inputs)[1], law.evaluate(theta - step, inputs)[1]
        expected = np.einsum("bin,bn->bi", (up - down) / (2 * h), v)
        np.testing.assert_allclose(
            second[:, :, j], expected, rtol=1e-4, atol=1e-4 * np.abs(second).max() + 1e-8
        )


def test_natural_and_internal_parameters_are_inverse(law: LossLaw) -> None:
    theta, inputs = perturbed(law)
    np.testing.assert_allclose(
        law.from_natural(law.to_natural(theta, inputs), inputs), theta, rtol=1e-9, atol=1e-9
    )


CLOSED_FORMS = ("chinchilla", "gadre", "kaplan_nd", "muennighoff")


def test_which_frontiers_have_a_closed_form() -> None:
    laws = [get_law(name, **options) for name, options in VARIANTS]
    assert tuple(law.label for law in laws if law.frontier(law.example) is not None) == CLOSED_FORMS


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_frontier_is_the_minimum_at_fixed_compute(name: str) -> None:
    law = get_law(name)
    frontier = law.frontier(law.example)
    assert frontier is not None
    assert frontier.params_exponent + frontier.tokens_exponent == pytest.approx(1.0)
    for compute in (1e18, 1e21, 1e24):
        best = frontier.params_coefficient * compute**frontier.params_exponent
        tokens = frontier.tokens_coefficient * compute**frontier.tokens_exponent
        assert 6 * best * tokens == pytest.approx(compute, rel=1e-9)
        sizes = best * np.exp(np.linspace(-1, 1, 2001))
        columns = {"n_params": sizes, "n_tokens": compute / 6 / sizes, "unique_tokens": np.full(2001, 1e40)}
        losses = law.loss_nats(law.example, columns)
        assert abs(int(np.argmin(losses)) - 1000) <= 1


def test_every_law_has_its_description_and_its_config(law: LossLaw) -> None:
    assert law.title
    assert law.source
    assert "L(" in law.formula
    assert set(law.example) == set(law.parameters)
    config = Path(__file__).parents[1] / "conf" / "law" / f"{law.name}.yaml"
    assert f"name: {law.name}\n" in config.read_text()


def test_muennighoff_published_value() -> None:
    # Muennighoff et al. 2023 (arXiv 2305.16264), released code: L(6.34e9 parameters, 242e9 tokens, 25e9 unique).
    law = get_law("muennighoff")
    columns = {"n_params": 6.34e9, "n_tokens": 242e9, "unique_tokens": 25e9}
    assert law.loss_nats(law.example, columns) == pytest.approx(2.2256440889984477, abs=1e-9)


def test_muennighoff_without_repetition_is_chinchilla() -> None:
    law, plain = get_law("muennighoff"), get_law("chinchilla")
    parameters = {k: law.example[k] for k in plain.parameters}
    n, d = 1e9, 20e9
    ours = law.loss_nats(law.example, {"n_params": n, "n_tokens": d, "unique_tokens": 1e15})
    assert ours == pytest.approx(plain.loss_nats(parameters, {"n_params": n, "n_tokens": d}), rel=1e-12)


def test_muennighoff_cannot_learn_repetition_from_fresh_data() -> None:
    law = get_law("muennighoff")
    columns = law.example_columns()
    columns["unique_tokens"] = np.maximum(columns["n_tokens"], columns["n_params"] * 1e4)
    result = fit(law, columns, loss_nats=law.loss_nats(law.example, columns))
    assert result.status == FitStatus.NOT_IDENTIFIED
    assert "R_D_star" in result.message


def test_gadre_is_chinchilla_with_equal_exponents() -> None:
    gadre, plain = get_law("gadre"), get_law("chinchilla")
    p = gadre.example
    n, d = np.array([1e8, 3e9]), np.array([5e9, 2e10])
    c, m = 6 * n * d, d / n
    expected = p["E"] + (p["a"] * m ** p["eta"] + p["b"] * m ** -p["eta"]) * c ** -p["eta"]
    np.testing.assert_allclose(gadre.loss_nats(p, {"n_params": n, "n_tokens": d}), expected, rtol=1e-12)
    shrink = 6.0 ** -p["eta"]
    same = {
        "E": p["E"],
        "A": p["a"] * shrink,
        "B": p["b"] * shrink,
        "alpha": 2 * p["eta"],
        "beta": 2 * p["eta"],
    }
    np.testing.assert_allclose(plain.loss_nats(same, {"n_params": n, "n_tokens": d}), expected, rtol=1e-12)


def test_hand_computed_points() -> None:
    # E + A / N^alpha + B / D^beta at powers of ten.
    chinchilla = get_law("chinchilla").loss_nats(
        {"E": 1.5, "A": 100.0, "B": 1000.0, "alpha": 0.25, "beta": 0.3}, {"n_params": 1e8, "n_tokens": 1e10}
    )
    assert chinchilla == pytest.approx(1.5 + 1.0 + 1.0)
    kaplan = get_law("kaplan_nd").loss_nats(
        {"N_c": 1e14, "D_c": 3e13, "alpha_N": 0.1, "alpha_D": 0.1}, {"n_params": 1e12, "n_tokens": 3e11}
    )
    assert kaplan == pytest.approx(200**0.1)
    steps = get_law("kaplan_ns").loss_nats(
        {"N_c": 1e14, "S_c": 1e3, "alpha_N": 0.5, "alpha_S": 1.0}, {"n_params": 1e12, "n_steps": 1e4}
    )
    assert steps == pytest.approx(10 + 0.1)
    linear = get_law("linear_log").loss_nats(
        {"c": 8.0, "k_N": 0.1, "k_D": 0.2}, {"n_params": np.e**20, "n_tokens": np.e**10}
    )
    assert linear == pytest.approx(4.0)


def test_kaplan_headline_law_is_a_bare_power() -> None:
    # (8.8e13 / N)^.076: ten times the parameters lower the loss by 1 - 10^-.076 = 16%.
    law = get_law("power_n", irreducible=False)
    small, large = law.loss_nats(law.example, {"n_params": np.array([1e9, 1e10])})
    assert small == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert 1 - large / small == pytest.approx(0.1605, abs=1e-4)


def test_chinchilla_frontier_numbers() -> None:
    # Hoffmann et al. 2022, table 2, approach 3: a = .46, b = .54; a = beta / (alpha + beta) exactly.
    law = get_law("chinchilla")
    frontier = law.frontier(law.example)
    assert frontier is not None
    assert frontier.params_exponent == pytest.approx(0.28491 / (0.33917 + 0.28491))
    assert round(float(frontier.params_exponent), 2) == 0.46


def test_hoffmann_starts_are_the_papers_grid() -> None:
    law = get_law("chinchilla")
    columns = law.example_columns()
    inputs = law.prepare(columns, law.loss_nats(law.example, columns))
    natural = law.to_natural(law.hoffmann_starts(inputs), inputs)  # type: ignore[attr-defined]
    assert len(natural["E"]) == 4500
    assert sorted(set(natural["alpha"].round(6))) == [0, 0.5, 1.0, 1.5, 2.0]
    assert sorted(set(np.log(natural["E"]).round(6))) == [-1, -0.5, 0, 0.5, 1]


def test_variable_projection_is_exact_for_squared_error() -> None:
    # At the true exponents, E, A and B are linear in the loss and come out exactly without noise.
    law = get_law("chinchilla")
    columns, loss = synthetic(law)
    inputs = law.prepare(columns, loss)
    exponents = np.array([[law.example["alpha"], law.example["beta"]]])
    theta = law.project(exponents, inputs, np.log(loss) - inputs.log_loss_center)  # type: ignore[attr-defined]
    natural = law.to_natural(theta[0], inputs)
    for name, value in law.example.items():
        assert natural[name] == pytest.approx(value, rel=1e-5)


def test_unknown_law_and_option_name_the_choices() -> None:
    with pytest.raises(UserError, match=r"law='chinchila'.*Did you mean 'chinchilla'"):
        get_law("chinchila")
    with pytest.raises(UserError, match="irreducible"):
        get_law("power_n", irreducibel=True)
    with pytest.raises(UserError, match="no options"):
        get_law("chinchilla", delta=1)


def test_columns_are_checked() -> None:
    law = get_law("chinchilla")
    with pytest.raises(UserError, match="n_tokens"):
        fit(law, {"n_params": np.ones(3)}, loss_nats=np.ones(3))
    with pytest.raises(UserError, match="2 values that are not finite and positive"):
        read_column({"x": [1.0, -1.0, np.nan]}, "x", "law")
    with pytest.raises(UserError, match="has 3 values"):
        fit(law, {"n_params": np.ones(3), "n_tokens": np.ones(3)}, loss_nats=np.ones(4))


def test_importing_the_laws_loads_no_heavy_package() -> None:
    code = (
        "import sys, scaling_lab.analysis.fitting.fit, scaling_lab.analysis.laws as l; l.law_names();"
        "print(sorted({'torch', 'hydra', 'wandb', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
