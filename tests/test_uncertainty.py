"""Tests of resampling: what is drawn together, determinism, failures counted, and reasons where there is no interval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from truth import Truth

from scaling_lab.analyse.approaches import IsoFlop, Parametric
from scaling_lab.analyse.estimate import Array, Estimate
from scaling_lab.analyse.observations import Observations
from scaling_lab.analyse.uncertainty import UNITS, BootstrapSettings, Draws, NoInterval, bootstrap
from scaling_lab.core.errors import UserError

LAW = Truth(0.34, 0.28)


def curves() -> Observations:
    """Four runs of 3, 1, 2 and 4 rows."""
    rows = [3, 1, 2, 4]
    return Observations.from_arrays(
        n_params=np.repeat([1e7, 2e7, 3e7, 4e7], rows),
        n_tokens=np.arange(1, 11) * 1e6,
        loss_nats=np.ones(10),
        run_id=np.repeat(list("abcd"), rows),
        budget_flops=np.repeat([1e15, 1e15, 2e15, 4e15], rows),
        seed=np.zeros(10),
    )


def test_a_run_is_drawn_with_all_its_rows() -> None:
    obs = curves()
    counts = Draws("run", 200, 0).point_counts(obs)
    for run in range(4):
        of_run = counts[:, obs.run_index == run]
        assert np.all(of_run == of_run[:, :1])
    per_run = np.array([counts[:, obs.run_index == r][:, 0] for r in range(4)]).T
    assert np.all(per_run.sum(axis=1) == 4)
    # The envelope, which asks by run, sees the same draws.
    np.testing.assert_array_equal(Draws("run", 200, 0).run_counts(obs), per_run)


def test_rows_and_budgets_are_drawn_as_said() -> None:
    obs = curves()
    assert np.all(Draws("row", 50, 0).point_counts(obs).sum(axis=1) == 10)
    by_budget = Draws("budget", 50, 0).point_counts(obs)
    for budget in np.unique(obs.budget_flops):
        of_budget = by_budget[:, obs.budget_flops == budget]
        assert np.all(of_budget == of_budget[:, :1])


def test_seeds_are_drawn_within_their_cell_and_single_runs_stay() -> None:
    obs = Observations.from_arrays(
        n_params=[1e7, 1e7, 2e7],
        n_tokens=[1e8] * 3,
        loss_nats=[1, 2, 3],
        budget_flops=[1e15] * 3,
        seed=[0, 1, 0],
    )
    counts = Draws("seed", 500, 0).point_counts(obs)
    assert np.all(counts[:, 2] == 1)
    assert np.all(counts[:, :2].sum(axis=1) == 2)
    assert 0.15 < np.mean(counts[:, 0] == 2) < 0.35
    with pytest.raises(NoInterval, match="different seeds"):
        Draws("seed", 10, 0).point_counts(obs.points(np.array([True, False, True])))


@pytest.mark.parametrize("approach", [IsoFlop(), Parametric()], ids=lambda a: a.name)
def test_the_same_seed_gives_the_same_intervals_and_another_does_not(approach: IsoFlop | Parametric) -> None:
    rng = np.random.default_rng(0)
    clean = LAW.isoflop(np.array([1e18, 4e18, 1.6e19]), np.geomspace(0.25, 4, 7))
    obs = Observations.from_arrays(
        n_params=clean.n_params,
        n_tokens=clean.n_tokens,
        loss_nats=clean.loss_nats + 0.005 * rng.standard_normal(clean.n_points),
        budget_flops=clean.budget_flops,
    )
    estimate = approach.estimate(obs)
    settings = BootstrapSettings(resamples=100)
    first, second, other = (bootstrap(approach, obs, estimate, settings, s) for s in (0, 0, 1))
    assert first.interval("params_exponent") == second.interval("params_exponent")
    assert first.interval("params_exponent") != other.interval("params_exponent")


class Failing:
    """Fails in a given share of the resamples."""

    name = "isoflop"

    def __init__(self, share: float):
        self.share = share

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        return IsoFlop().estimate(observations)

    def default_unit(self, observations: Observations) -> str:
        return "run"

    def resample(
        self, observations: Observations, draws: Draws, weights: Array | None = None
    ) -> Mapping[str, Array]:
        values = np.linspace(0.4, 0.6, draws.resamples)
        values[: int(self.share * draws.resamples)] = np.nan
        return {"params_exponent": values, "tokens_exponent": values}


@pytest.mark.parametrize(
    ("share", "failed", "says"),
    [(0.0, 0, None), (0.05, 5, None), (0.5, 50, "too narrow"), (0.9, 90, "No interval")],
)
def test_failures_are_counted_and_said(share: float, failed: int, says: str | None) -> None:
    obs = LAW.isoflop(np.array([1e18, 4e18]), np.geomspace(0.25, 4, 7))
    approach = Failing(share)
    band = bootstrap(approach, obs, approach.estimate(obs), BootstrapSettings(resamples=100), 0)
    assert band.failed == failed
    if says is None:
        assert band.message is None or "outside its own interval" in band.message
    else:
        assert says in (band.message or "")


def test_no_degrees_of_freedom_give_no_interval_and_the_reason() -> None:
    obs = LAW.isoflop(np.array([1e18, 4e18]), np.array([0.5, 1.0, 2.0]))
    estimate = IsoFlop().estimate(obs)
    assert estimate.frontier is not None
    band = bootstrap(IsoFlop(), obs, estimate, BootstrapSettings(resamples=100), 0)
    assert band.interval("params_exponent") is None
    assert "degrees of freedom" in (band.message or "")


def test_zero_resamples_and_bad_settings() -> None:
    obs = LAW.isoflop(np.array([1e18, 4e18]), np.geomspace(0.25, 4, 7))
    band = bootstrap(IsoFlop(), obs, IsoFlop().estimate(obs), BootstrapSettings(resamples=0), 0)
    assert band.message == "No interval: bootstrap.resamples=0."
    assert "auto" in UNITS
    for bad in ({"unit": "runs"}, {"level": 1.5}, {"resamples": -1}):
        with pytest.raises(UserError, match=f"bootstrap.{next(iter(bad))}"):
            BootstrapSettings(**bad)  # type: ignore[arg-type]
