"""Tests of Approach 1: recovery of known laws, edges, hulls, published numbers, and warnings about unsuitable curves."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.known_truth import PUBLISHED, Truth
from helpers.synthetic import synthetic_records
from scaling_lab.analysis.approaches import Envelope, EnvelopeSettings
from scaling_lab.analysis.approaches.envelope.hull import hull_vertices
from scaling_lab.analysis.approaches.envelope.staircase import crossings, interpolate, staircase
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings, Draws, bootstrap
from scaling_lab.core.errors import UserError

LAWS = [Truth(0.34, 0.28), Truth(0.25, 0.6), Truth(0.5, 0.3), Truth(0.1, 0.1)]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize(
    ("ratio", "sizes", "tolerance"), [(1.15, 25, 0.01), (1.3, 15, 0.01), (2.0, 7, 0.06), (3.0, 7, 0.06)]
)
def test_recovers_a_known_law(law: Truth, ratio: float, sizes: int, tolerance: float) -> None:
    decades = sizes * np.log10(ratio) / min(law.a, 1 - law.a) + 2
    obs = law.curves(1e9 * ratio ** (np.arange(sizes) - sizes // 2), points=400, decades=decades)
    frontier = Envelope().estimate(obs).frontier
    assert frontier is not None
    assert frontier.params.exponent == pytest.approx(law.a, rel=tolerance)
    assert frontier.tokens.exponent == pytest.approx(1 - law.a, rel=tolerance)
    assert frontier.params(1e20) == pytest.approx(law.params_opt(1e20), rel=0.15)


def test_crossings_are_exact_and_the_staircase_is_biased_as_documented() -> None:
    law = Truth(0.34, 0.28)
    obs = law.curves(1e9 * 2.0 ** np.arange(-3, 4), points=2000, decades=8)
    exact = Envelope().estimate(obs).frontier
    kept = Envelope(EnvelopeSettings(edge="keep")).estimate(obs).frontier
    assert exact is not None
    assert kept is not None
    assert exact.params.exponent == pytest.approx(law.a, rel=1e-5)
    assert kept.params.exponent < 0.97 * law.a  # flat ends and flat steps both bias it downward


def test_a_hand_computed_crossing() -> None:
    # Two power-law curves L = 4 C^-.1 and L = 8 C^-.2 (E = 0) cross where C^.1 = 2, C = 1024; a third size is best last.
    c = np.geomspace(8, 1e7, 300)
    n = np.repeat([1.0, 4.0, 16.0], 300)
    loss = np.concatenate([4 * c**-0.1, 8 * c**-0.2, 0.5 * 8**1.4 * c**-0.3 * 4])
    obs = Observations.from_arrays(
        n_params=n,
        n_tokens=np.tile(c, 3) / n,
        compute_flops=np.tile(c, 3),
        loss_nats=loss,
        run_id=np.repeat(list("abc"), 300),
    )
    grid = interpolate(obs.curves, 1500)
    points, forced = crossings(grid, staircase(grid, np.arange(3)))
    assert forced == 0
    assert np.exp(points.log_c[0]) == pytest.approx(1024, rel=1e-3)
    assert np.exp(points.log_n[0]) == pytest.approx(2.0)


def test_edges_are_counted_and_kept_on_request() -> None:
    obs = Truth(0.34, 0.28).curves(1e9 * 2.0 ** np.arange(-3, 4))
    dropped, kept = (Envelope(EnvelopeSettings(edge=e)).estimate(obs) for e in ("drop", "keep"))
    count = next(d for d in dropped.diagnostics if "smallest or largest size: dropped" in d).split(" ")[0]
    assert int(count) > 0
    assert any(d.startswith(f"{count} of") and "kept" in d for d in kept.diagnostics)
    assert kept.frontier is not None
    assert kept.frontier.compute_flops.size == 1500


def test_a_change_of_size_forced_by_the_end_of_a_run_is_not_a_crossing() -> None:
    law = Truth(0.34, 0.28)
    obs = law.curves(1e9 * 2.0 ** np.arange(-3, 4), points=400, decades=8)
    # The middle size stops before it would be overtaken.
    middle = obs.n_params == 1e9
    late = obs.compute_flops > law.c_ref
    estimate = Envelope().estimate(obs.points(~(middle & late)))
    # `points` keeps whole curves, so build truncated ones.
    keep = ~(middle & late)
    cut = Observations.from_arrays(
        n_params=obs.n_params[keep],
        n_tokens=obs.n_tokens[keep],
        loss_nats=obs.loss_nats[keep],
        run_id=obs.run_id[keep],
    )
    forced = Envelope().estimate(cut)
    assert not any("a run's curve ended" in d for d in estimate.diagnostics)
    assert any(d.startswith("1 change(s) of the best size left out") for d in forced.diagnostics)
    assert forced.frontier is not None
    assert forced.frontier.params.exponent == pytest.approx(law.a, rel=0.01)


def test_one_row_per_run_is_not_applicable_with_a_reason() -> None:
    law = Truth(0.34, 0.28)
    estimate = Envelope().estimate(law.isoflop(np.array([1e18, 1e19]), np.geomspace(0.3, 3, 5)))
    assert estimate.status is FitStatus.NOT_APPLICABLE
    assert estimate.frontier is None
    assert "every run has a single row" in estimate.message


def test_two_sizes_are_not_applicable() -> None:
    estimate = Envelope().estimate(Truth(0.34, 0.28).curves(np.array([1e9, 2e9])))
    assert estimate.status is FitStatus.NOT_APPLICABLE
    assert "at least three sizes" in estimate.message


def test_hull_vertices_lie_below_every_point() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 10, 500)
    y = np.exp(-0.3 * x) + rng.random(500)
    at = hull_vertices(x, y)
    assert np.all(np.diff(x[at]) > 0)
    assert np.all(np.diff(np.diff(y[at]) / np.diff(x[at])) > 0)
    before_lowest = (x >= x[at[0]]) & (x <= x[at[-1]])
    assert np.all(y[before_lowest] >= np.interp(x[before_lowest], x[at], y[at]) - 1e-12)


def test_bootstrap_draws_whole_runs_and_agrees_with_a_direct_refit() -> None:
    rng = np.random.default_rng(1)
    obs = Truth(0.34, 0.28).curves(1e9 * 1.3 ** np.arange(-8, 9), points=60, decades=5)
    noisy = Observations.from_arrays(
        n_params=obs.n_params,
        n_tokens=obs.n_tokens,
        loss_nats=obs.loss_nats + 0.003 * rng.standard_normal(17)[obs.run_index],
        run_id=obs.run_id,
    )
    for settings in (EnvelopeSettings(), EnvelopeSettings(method="hull"), EnvelopeSettings(edge="keep")):
        approach = Envelope(settings)
        estimate = approach.estimate(noisy)
        band = bootstrap(approach, noisy, estimate, BootstrapSettings(resamples=60), seed=3)
        again = bootstrap(approach, noisy, estimate, BootstrapSettings(resamples=60), seed=3)
        assert band.unit == "run"
        np.testing.assert_array_equal(band.samples["params_exponent"], again.samples["params_exponent"])
        # Leaving a run out in a draw is the same as observing without it.
        drawn = approach.resample(noisy, WithoutOneRun("run", 1, 0))
        direct = approach.estimate(noisy.runs(np.arange(17) != WithoutOneRun.left_out)).frontier
        assert direct is not None
        assert drawn["params_exponent"][0] == pytest.approx(direct.params.exponent, rel=1e-6)


class WithoutOneRun(Draws):
    """One draw that has every run once, except one."""

    left_out = 6

    def run_counts(self, observations: Observations) -> np.ndarray:
        counts = np.ones((1, observations.n_runs))
        counts[0, self.left_out] = 0
        return counts

    def point_counts(self, observations: Observations) -> np.ndarray:
        return self.run_counts(observations)[:, observations.run_index]


def test_records_of_an_isoflop_sweep_are_flagged_where_runs_are_not_annealed() -> None:
    estimate = Envelope().estimate(observations_from_records(synthetic_records()))
    assert any("last 15% of their run" in d for d in estimate.diagnostics)


def with_schedules(schedules: list) -> Observations:
    """Observations of a sweep whose runs cycle through these schedules."""
    from dataclasses import replace

    records = synthetic_records(curve_points=30)
    changed = [
        replace(r, spec=replace(r.spec, schedule=schedules[i % len(schedules)]))
        for i, r in enumerate(records)
    ]
    return observations_from_records(changed)


def test_curves_under_a_constant_lr_or_another_horizon_are_flagged() -> None:
    from scaling_lab.core.schedules import Constant, Cosine

    matched = Envelope().estimate(with_schedules([Cosine(), Cosine(horizon_fraction=1.2)]))
    assert not any("constant LR" in d or "LR horizon" in d or "not known" in d for d in matched.diagnostics)
    mixed = Envelope().estimate(
        with_schedules([Cosine(), Constant(), Cosine(horizon_fraction=2.0), Constant()])
    )
    runs = len(synthetic_records(curve_points=30))
    assert mixed.status is matched.status
    (constant,) = (d for d in mixed.diagnostics if "constant LR" in d)
    assert constant.startswith(f"{runs // 2} of {runs} curves have a constant LR (")
    (horizon,) = (d for d in mixed.diagnostics if "LR horizon" in d)
    assert horizon.startswith(f"{runs // 4} of {runs} curves")
    assert "up to 2 times" in horizon
    # A horizon shorter than half of the run is not a constant LR, since its LR has decayed.
    short = Envelope().estimate(with_schedules([Cosine(horizon_fraction=0.4)]))
    assert not any("constant LR" in d for d in short.diagnostics)
    assert any("up to 0.4 times" in d for d in short.diagnostics)


@pytest.mark.parametrize(
    "approach", [Envelope(), Envelope(EnvelopeSettings(method="hull"))], ids=["interpolate", "hull"]
)
def test_a_tables_schedules_are_read_and_their_absence_is_reported(approach: Envelope, tmp_path) -> None:
    import pandas as pd

    from scaling_lab.analysis.data.table_observations import from_table
    from scaling_lab.analysis.data.tables.table import read_table

    obs = Truth(0.34, 0.28).curves(1e9 * 2.0 ** np.arange(-3, 4), points=50)
    frame = pd.DataFrame(
        {"run_id": obs.run_id, "params": obs.n_params, "tokens": obs.n_tokens, "loss": obs.loss_nats}
    )

    def diagnostics(**more: object) -> tuple[str, ...]:
        path = tmp_path / "runs.csv"
        frame.assign(**more).to_csv(path, index=False)
        return approach.estimate(from_table(read_table(path))).diagnostics

    assert any("schedules are not known" in d for d in diagnostics())
    words = np.where(obs.n_params > 5e8, "Constant", "cosine")
    assert any(
        d.startswith("4 of 7 curves have a constant LR (n3, n4, n5 and 1 more)")
        for d in diagnostics(lr_schedule=words)
    )
    numbers = np.where(obs.n_params > 5e8, 1.0, 4.0)
    found = diagnostics(lr_horizon_fraction=numbers)
    assert any(d.startswith("3 of 7 curves have an LR horizon") and "up to 4 times" in d for d in found)
    assert not any("schedule" in d for d in diagnostics(lr_schedule="cosine"))


def test_settings_refuse_unknown_choices() -> None:
    with pytest.raises(UserError, match=r"approach.envelope.method='hul'.*hull"):
        EnvelopeSettings(method="hul")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"approach.envelope.edge"):
        EnvelopeSettings(edge="cut")  # type: ignore[arg-type]


def test_gemstones_envelope_as_the_authors_have_it() -> None:
    from scaling_lab.analysis.data.table_observations import from_table
    from scaling_lab.analysis.data.tables.table import read_table

    expected = {
        (None, "keep"): 0.4579,
        (1.005e11, "keep"): 0.4994,
        (None, "drop"): 0.4424,
        (1.005e11, "drop"): 0.4886,
    }
    for (most, edge), exponent in expected.items():
        where = {} if most is None else {"tokens.max": most}
        obs = from_table(
            read_table(PUBLISHED / "gemstones_curves.csv", columns={"flops": "flops_authors"}, where=where)
        )
        frontier = Envelope(EnvelopeSettings(method="hull", edge=edge)).estimate(obs).frontier  # type: ignore[arg-type]
        assert frontier is not None
        assert frontier.params.exponent == pytest.approx(exponent, abs=5e-5)
