"""Tests of `sl.fit` and `sl.reproduce`: the numbers of the analysis and of the command line, as values of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest

import scaling_lab as sl
from helpers.example_table import LAW, example_table
from scaling_lab.analysis.laws import get_law, law_names


@pytest.fixture(scope="module")
def table():
    return example_table()


@pytest.fixture(scope="module")
def law(table):
    return sl.fit("chinchilla", table)


def test_the_fit_is_the_analysiss_parametric_approach(law, table):
    analysis = sl.analyze(table, sensitivity=False, backtest=False)
    assert law.parameters == analysis.parametric.parameters
    assert law.exponent == analysis.parametric.exponent
    assert law.tokens_exponent == analysis.parametric.tokens_exponent
    for name in ("alpha", "beta", "E"):
        assert law.parameters[name].interval.contains(getattr(LAW, name))
    profiled = sl.fit("chinchilla", table, intervals="profile")
    assert profiled.interval_method == "profile likelihood"
    for name, value in profiled.parameters.items():
        assert value.interval == analysis.parametric.profile_intervals[name]
        assert value.estimate == law.parameters[name].estimate


def test_the_loss_it_predicts(law, table):
    n, d = 1e9, 2e10
    assert law.loss(params=n, tokens=d) == pytest.approx(float(LAW.loss(n, d)), rel=0.005)
    grid = law.loss(params=np.array([[1e8], [1e9]]), tokens=[1e9, 1e10, 1e11])
    assert grid.shape == (2, 3)
    fitted = law.loss(table)
    points = law.to_frame("points")
    np.testing.assert_allclose(fitted, points["fitted_loss"], rtol=1e-9)
    np.testing.assert_allclose(np.log(points["loss"] / points["fitted_loss"]), law.residuals, atol=1e-12)
    assert np.abs(law.residuals).max() < 0.02
    with pytest.raises(sl.UserError, match="tokens is missing.*params, tokens"):
        law.loss(params=n)
    with pytest.raises(sl.UserError, match="width=64 is not one of its columns.*params, tokens"):
        law.loss(params=n, tokens=d, width=64)


def test_a_law_without_a_frontier_has_profile_intervals(table):
    power = sl.fit("power_n", table)
    assert power.interval_method == "profile likelihood"
    assert power.exponent.estimate is None
    assert "frontier" in power.exponent.message
    value = power.parameters["alpha"]
    assert value.interval.lo < value.estimate < value.interval.hi or value.message


def test_every_law_that_these_columns_allow_is_fitted(table):
    columns = {"n_params", "n_tokens", "compute_flops"}
    names = [name for name in law_names() if columns.issuperset(get_law(name).columns)]
    assert {"chinchilla", "kaplan_nd", "power_c"} <= set(names)
    for name in names:
        found = sl.fit(name, table, resamples=0)
        assert tuple(found.parameters) == get_law(name).parameters
        assert found.formula
        assert np.isfinite(found.loss(table)).all()


def test_options_of_a_fit(table):
    bits = table.assign(loss=table["loss"] / np.log(2))
    same = sl.fit(
        "chinchilla", bits.rename(columns={"loss": "bits"}), loss="bits", units={"loss": "bits"}, resamples=0
    )
    assert same.parameters["E"].estimate == pytest.approx(
        sl.fit("chinchilla", table).parameters["E"].estimate, rel=1e-6
    )
    assert same.parameters["E"].interval is None
    assert "resamples=0" in same.parameters["E"].message
    squares = sl.fit("chinchilla", table, objective="mse_log", resamples=0)
    assert squares.parameters["E"].estimate != same.parameters["E"].estimate
    kept = sl.fit("chinchilla", table, where={"flops.min": 5e19}, resamples=0)
    assert len(kept.residuals) == 24


def test_what_a_fit_shows(law):
    import matplotlib.pyplot as plt

    assert len(repr(law).splitlines()) == 6
    assert repr(law).startswith("chinchilla on 36 points of the table: converged")
    assert law.formula in law.summary()
    assert "<td>alpha</td>" in law._repr_html_()
    axes = law.plot()
    assert axes.get_ylabel() == "parameters N"
    plt.close(axes.figure)
    assert law.to_frame().loc["alpha", "lo"] == law.parameters["alpha"].interval.lo


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        (("chinchila",), {}, "law='chinchila'.*Did you mean 'chinchilla'.*kaplan_nd"),
        (("chinchilla",), {"objective": "l2"}, "objective.*l2.*huber_log"),
        (("chinchilla",), {"huber_delta": -1}, "huber_delta=-1.*positive"),
        (("chinchilla",), {"intervals": "jackknife"}, "intervals='jackknife'.*bootstrap, profile"),
        (("chinchilla",), {"level": 3}, r"level=3.*\(0, 1\)"),
        (("chinchilla",), {"loss": "los"}, "loss='los'.*Did you mean 'loss'"),
        (("muennighoff",), {}, "needs the column 'unique_tokens'"),
        (("chinchilla",), {"law_options": {"x": 1}}, "x"),
        (("chinchilla",), {"weights": "loss_sem"}, "weights=loss_sem needs"),
    ],
)
def test_errors(table, arguments, options, told):
    with pytest.raises(sl.UserError, match=told):
        sl.fit(*arguments, table, **options)


def test_the_law_comes_first(table):
    with pytest.raises(sl.UserError, match=r"law=DataFrame.*sl\.fit\('chinchilla', data\)"):
        sl.fit(table, "chinchilla")


def test_reproduce_is_the_command(capsys):
    from scaling_lab.cli.main import main

    found = sl.reproduce("hoffmann2022", resamples=100)
    assert main(["reproduce", "published=hoffmann2022", "resamples=100", "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["publications"]
    assert found.to_dict() == printed
    frame = found.to_frame()
    assert len(frame) == sum(len(part["rows"]) for part in printed["parts"])
    assert {"part", "quantity", "published", "ours", "difference", "published_lo", "verdict"} <= set(
        frame.columns
    )
    assert "hoffmann2022" in repr(found)
    assert len(repr(found).splitlines()) == 2
    assert "<table>" in found._repr_html_()
    assert frame["quantity"][0] in found.summary()
    with pytest.raises(sl.UserError, match="published='hofmann'.*Did you mean 'hoffmann2022'.*porian2024"):
        sl.reproduce("hofmann")
    with pytest.raises(sl.UserError, match="resamples=3.*at least 20"):
        sl.reproduce("hoffmann2022", resamples=3)
