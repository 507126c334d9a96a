"""Tests of the envelope of final losses: exactness, which data it is used for, seeds, and its simulated intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.synthetic import synthetic_records
from scaling_lab.analysis.approaches import Envelope, EnvelopeSettings
from scaling_lab.analysis.approaches.envelope.ends import ends_grid, ends_points, simulated_quantities
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings, NoInterval, bootstrap
from scaling_lab.analysis.inference.calibration import LAWS, Cell, simulate
from scaling_lab.core.errors import UserError


def horizons(law: str = "chinchilla", noise: float = 0.0, study: int = 0) -> Observations:
    return simulate(Cell("horizons", law, noise, "envelope"), study)


@pytest.mark.parametrize("law", ["chinchilla", "kaplan"])
def test_ends_recover_the_law_where_whole_curves_do_not(law: str) -> None:
    truth, obs = LAWS[law], horizons(law)
    ends = Envelope().estimate(obs)
    assert any("method=ends" in d for d in ends.diagnostics)
    assert ends.frontier is not None
    assert ends.frontier.params.exponent == pytest.approx(truth.a, abs=0.001)
    assert ends.frontier.tokens.exponent == pytest.approx(1 - truth.a, abs=0.001)
    c = float(np.exp(np.log(obs.final().compute_flops).mean()))
    n = float(truth.params_opt(c))
    assert float(ends.frontier.params(c)) == pytest.approx(n, rel=0.01)
    assert ends.frontier.loss is not None
    assert float(ends.frontier.loss(c)) == pytest.approx(float(truth.loss(n, c / 6 / n)), abs=0.002)
    curves = Envelope(EnvelopeSettings(method="interpolate")).estimate(obs).frontier
    assert curves is not None
    assert curves.params.exponent < truth.a - 0.03  # the unfinished parts of the curves


def power_curves(more: float = 0.0) -> Observations:
    """Sizes 1 and 2 with L = 4 C^-.1 and 8 C^-.2: they cross where C^.1 = 2. `more` is what a second seed adds to ln L."""
    c = np.array([16.0, 256.0, 4096.0, 65536.0])
    n, seeds = np.repeat([1.0, 2.0], 4), [0.0] if more == 0 else [0.0, more]
    loss = np.concatenate([4 * c**-0.1, 8 * c**-0.2])
    return Observations.from_arrays(
        n_params=np.tile(n, len(seeds)),
        n_tokens=np.tile(np.tile(c, 2) / n, len(seeds)),
        compute_flops=np.tile(np.tile(c, 2), len(seeds)),
        loss_nats=np.concatenate([loss * np.exp(s * (n == 1.0)) for s in seeds]),
    )


def test_a_hand_computed_crossing_and_the_mean_of_seeds() -> None:
    obs = power_curves()
    grid = ends_grid(obs, 1500)
    assert grid.pairs == ((0, 1),)
    points = ends_points(grid, np.log(obs.loss_nats)[None])
    assert np.exp(points.log_c[0, 0]) == pytest.approx(1024.0, rel=1e-9)
    assert np.exp(points.log_n[0, 0]) == pytest.approx(np.sqrt(2.0))
    # D = C / N, the mean of the two sizes' ln D.
    assert np.exp(points.log_d[0, 0]) == pytest.approx(1024.0 / np.sqrt(2.0), rel=1e-9)
    # A second seed of the first size .02 above: its mean curve rises by .01, so it is overtaken at C e^-.1.
    twice = power_curves(0.02)
    again = ends_points(ends_grid(twice, 1500), np.log(twice.loss_nats)[None])
    assert np.exp(again.log_c[0, 0]) == pytest.approx(1024.0 * np.exp(-0.1), rel=1e-9)


def test_pairs_are_up_to_three_times_apart_and_the_last_near_ones_are_left_out() -> None:
    grid = ends_grid(horizons().final(), 1500)
    assert grid.pairs == tuple((i, i + 3) for i in range(12))  # ratios of 1.4^3


def test_ends_are_taken_only_where_sizes_have_horizons() -> None:
    auto, obs = Envelope(), horizons()
    assert auto.method(obs) == "ends"
    assert auto.method(obs.final()) == "ends"
    assert Envelope(EnvelopeSettings(edge="keep")).method(obs) == "interpolate"
    assert Envelope(EnvelopeSettings(method="hull")).method(obs) == "hull"
    one_each = simulate(Cell("quickstart-curves", "quickstart", 0.005, "envelope"), 0)
    assert auto.method(one_each) == "interpolate"
    assert auto.default_unit(one_each) == "run"
    assert auto.method(observations_from_records(synthetic_records())) == "interpolate"
    table = Observations.from_arrays(
        n_params=obs.final().n_params, n_tokens=obs.final().n_tokens, loss_nats=obs.final().loss_nats
    )
    assert auto.estimate(table).status is FitStatus.NOT_APPLICABLE  # no curves, and none requested
    asked = Envelope(EnvelopeSettings(method="ends")).estimate(table)
    assert asked.status is FitStatus.CONVERGED
    assert asked.frontier is not None
    assert asked.frontier.params.exponent == pytest.approx(LAWS["chinchilla"].a, abs=0.001)
    few = Envelope(EnvelopeSettings(method="ends")).estimate(one_each)
    assert few.status is FitStatus.NOT_APPLICABLE
    assert "0 of them qualify" in few.message
    with pytest.raises(UserError, match=r"edge=keep does not apply to approach.envelope.method=ends"):
        EnvelopeSettings(method="ends", edge="keep")


def test_two_crossings_are_not_a_power_law() -> None:
    """A line always fits two points: only the first two pairs cross, since larger sizes are never better."""
    obs = horizons(noise=0.004)
    rank = np.unique(np.round(np.log(obs.n_params), 9), return_inverse=True)[1]
    few = replace(obs, loss_nats=obs.loss_nats * 2.0 ** np.maximum(rank - 4, 0))
    points = ends_points(ends_grid(few.final(), 1500), np.log(few.final().loss_nats)[None])
    assert points.weight.sum() == 2
    assert Envelope().method(obs) == "ends"
    assert Envelope().method(few) == "interpolate"
    assert Envelope().default_unit(few) == "run"
    asked = Envelope(EnvelopeSettings(method="ends")).estimate(few)
    assert (asked.status, asked.frontier) == (FitStatus.NOT_APPLICABLE, None)
    assert "2 of 12 pairs of sizes cross; at least three are needed" in asked.message


def test_the_interval_corrects_the_estimators_own_error() -> None:
    obs = horizons("kaplan", 0.004, study=5)
    approach = Envelope()
    estimate = approach.estimate(obs)
    settings = BootstrapSettings(resamples=200)
    band, again = (bootstrap(approach, obs, estimate, settings, seed=3) for _ in range(2))
    assert (band.unit, band.failed) == ("residual", 0)
    np.testing.assert_array_equal(band.samples["params_exponent"], again.samples["params_exponent"])
    # The samples are the estimate minus simulated errors, so they are centered on the estimate minus the mean error.
    assert estimate.frontier is not None
    found = band.samples["params_exponent"]
    assert abs(np.median(found) - estimate.frontier.params.exponent) < found.std()
    wider = bootstrap(approach, horizons("kaplan", 0.008, study=5), estimate, settings, seed=3)
    assert wider.samples["params_exponent"].std() > 1.4 * found.std()
    by_run = bootstrap(approach, obs, estimate, replace(settings, unit="run", resamples=40), seed=3)
    assert by_run.interval("params_exponent") is not None


def test_without_residuals_there_is_a_reason_and_no_interval() -> None:
    obs = power_curves()
    three = Observations.from_arrays(
        n_params=np.concatenate([obs.n_params, np.full(4, 4.0)]),
        n_tokens=np.concatenate([obs.n_tokens, obs.compute_flops[:4] / 4]),
        compute_flops=np.concatenate([obs.compute_flops, obs.compute_flops[:4]]),
        loss_nats=np.concatenate([obs.loss_nats, 16 * obs.compute_flops[:4] ** -0.3]),
    ).points(np.arange(12) % 4 < 3)
    approach = Envelope(EnvelopeSettings(method="ends"))
    band = bootstrap(approach, three, approach.estimate(three), BootstrapSettings(resamples=40), seed=0)
    assert not band.samples
    assert band.message is not None
    assert "2 of 2 pairs of sizes cross" in band.message
    # Raised before anything is drawn.
    with pytest.raises(NoInterval, match="9 runs leave too few residuals"):
        simulated_quantities(three, ends_grid(three, 1500), None)  # type: ignore[arg-type]
