"""Tests of findings at a known floor: the straight part of the reducible loss, its bend, z, and how they are shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from markupsafe import escape
from matplotlib.figure import Figure

from helpers.synthetic import QUICKSTART_LAW, synthetic_records
from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze, observations_of_sweep
from scaling_lab.analysis.approaches import Parametric, ParametricSettings
from scaling_lab.analysis.data.observations import FLOOR, Observations
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings, bootstrap
from scaling_lab.analysis.settings import ApproachSettings
from scaling_lab.analysis.studies.known_floor import (
    MIN_POINTS,
    STRAIGHT_WITHIN,
    KnownFloor,
    as_finding,
    known_floor,
    loss_frontier,
    straight_line,
)
from scaling_lab.analysis.studies.shared.floor_error import floor_errors
from scaling_lab.reporting.finding_figures import draw_finding
from scaling_lab.reporting.page import write_report

QUICK = AnalysisSettings(
    bootstrap=BootstrapSettings(resamples=100), sensitivity=False, backtest=False, profile=False
)
FLOPS = np.geomspace(1e10, 1e13, 31)
LOG10 = np.log(10.0)


# -- the line


def test_a_power_law_is_straight_over_its_whole_range() -> None:
    line = straight_line(FLOPS, 40.0 * FLOPS**-0.2)
    assert line is not None
    assert line.exponent == pytest.approx(0.2, abs=1e-9)
    assert np.exp(line.intercept) == pytest.approx(40.0, rel=1e-6)
    assert line.compute_range_flops == (FLOPS[0], FLOPS[-1])
    assert line.n_points == 31
    assert line.largest_deviation < 1e-9
    assert line.curvature_per_decade == pytest.approx(0.0, abs=1e-9)
    assert line.local_exponents == pytest.approx((0.2, 0.2), abs=1e-9)
    np.testing.assert_allclose(line(FLOPS), 40.0 * FLOPS**-0.2)


def test_a_bend_is_measured_and_limits_the_straight_part() -> None:
    # The local exponent goes from .1 at 1e10 FLOPs to .4 at 1e13: .1 a decade.
    x = np.log10(FLOPS / 1e10)
    line = straight_line(FLOPS, np.exp(-LOG10 * (0.1 * x + 0.05 * x**2)))
    assert line is not None
    assert line.curvature_per_decade == pytest.approx(0.1, abs=1e-9)
    assert line.local_exponents == pytest.approx((0.1, 0.4), abs=1e-9)
    # A parabola a x^2 over a width w lies within a w^2 / 8 of the best line for the largest deviation, and within
    # a w^2 / 6 of the least-squares line: with a = .05 ln 10, .03 allows 1.25 of the three decades.
    lo, hi = line.compute_range_flops
    assert np.log10(hi / lo) == pytest.approx(1.25, abs=0.1)
    assert line.n_points == 1 + round(np.log10(hi / lo) * 10)
    assert line.largest_deviation <= STRAIGHT_WITHIN


def test_a_power_law_down_to_a_plateau_is_straight_on_its_slope() -> None:
    reducible = np.where(FLOPS < 1e12, (FLOPS / 1e12) ** -0.3, 1.0)
    line = straight_line(FLOPS, reducible)
    assert line is not None
    assert line.exponent == pytest.approx(0.3, abs=0.01)
    assert line.compute_range_flops[0] == FLOPS[0]
    assert line.compute_range_flops[1] == pytest.approx(1e12, rel=0.3)


def test_the_line_averages_noise() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        line = straight_line(FLOPS, np.exp(-0.2 * np.log(FLOPS) + rng.normal(0, 0.005, FLOPS.size)))
        assert line is not None
        assert line.n_points == 31  # .03 is six standard deviations
        found.append((line.exponent, line.curvature_per_decade))
    exponents, curvatures = np.array(found).T
    x = np.log(FLOPS)
    sem = 0.005 / np.sqrt(((x - x.mean()) ** 2).sum())
    assert exponents.std() == pytest.approx(sem, rel=0.2)
    assert abs(exponents.mean() - 0.2) < 4 * sem / np.sqrt(200)
    assert abs(curvatures.mean()) < 4 * curvatures.std() / np.sqrt(200)


def test_where_nothing_is_straight_the_line_through_all_points_is_flagged() -> None:
    zigzag = np.exp(-0.2 * np.log(FLOPS) + 0.1 * (-1.0) ** np.arange(31))
    line = straight_line(FLOPS, zigzag)
    assert line is not None
    assert line.n_points == 31
    assert line.largest_deviation > STRAIGHT_WITHIN


def test_few_points_make_no_line() -> None:
    assert straight_line(FLOPS[: MIN_POINTS - 1], FLOPS[: MIN_POINTS - 1] ** -0.1) is None
    line = straight_line(FLOPS[:MIN_POINTS], FLOPS[:MIN_POINTS] ** -0.1)
    assert line is not None
    assert line.curvature_per_decade is None  # a parabola goes through nearly anything


# -- from observations


def test_the_frontier_has_the_evaluations_that_no_cheaper_one_beats() -> None:
    obs = Observations.from_arrays(
        n_params=[1, 1, 1, 1, 1], n_tokens=[1, 1, 1, 1, 1],
        compute_flops=[4, 1, 3, 2, 5], loss_nats=[1.9, 3.0, 2.0, 2.0, 1.5],
    )  # fmt: skip
    flops, loss = loss_frontier(obs)
    assert flops.tolist() == [1, 2, 4, 5]
    assert loss.tolist() == [3.0, 2.0, 1.9, 1.5]


def known_of(analysis: Analysis) -> KnownFloor | None:
    """The numbers behind the finding."""
    approach = Parametric(analysis.settings.approach.parametric)
    return known_floor(analysis.points, approach, analysis.estimates[2], analysis.bands[2])


def words(known: KnownFloor) -> str:
    """All sentences of the finding."""
    finding = as_finding(known, 0.9)
    return " ".join((finding.answer, *finding.caveats))


def of_floor(
    noise: float = 0.005, floors: tuple[float, ...] = (QUICKSTART_LAW.E,), **options: object
) -> Analysis:
    """A sweep of the quickstart's law whose floor is known; several floors take turns."""
    records = synthetic_records(noise=noise, curve_points=20)
    records = [replace(r, val_floor_nats=floors[i % len(floors)]) for i, r in enumerate(records)]
    settings = replace(QUICK, **options)  # type: ignore[arg-type]
    return analyze(observations_of_sweep(records, settings), settings)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return of_floor()


def test_fitted_and_true_floor_are_compared_in_standard_errors(analysis: Analysis) -> None:
    known, band = known_of(analysis), analysis.band("parametric")
    assert known is not None
    assert known.floor_nats == QUICKSTART_LAW.E
    assert known.fitted_nats == analysis.estimate("parametric").fits[0].parameters["E"]
    errors = floor_errors(
        analysis.points,
        Parametric(),
        analysis.estimate("parametric").fits[0],
        QUICKSTART_LAW.E,
        100,
        band.seed,
    )
    assert errors is not None
    assert known.error_simulated
    assert known.standard_error_nats == errors.standard_error(known.fitted_nats - QUICKSTART_LAW.E)
    assert known.z == (known.fitted_nats - QUICKSTART_LAW.E) / known.standard_error_nats
    # Another seed and ten times as many sweeps give nearly the same.
    more = floor_errors(
        analysis.points, Parametric(), analysis.estimate("parametric").fits[0], QUICKSTART_LAW.E, 1000, 5
    )
    assert more is not None
    for side in (-1.0, 1.0):
        assert errors.standard_error(side) == pytest.approx(more.standard_error(side), rel=0.3)
    interval = band.interval("E")
    assert interval is not None
    assert known.interval == (interval.lo, interval.hi)


def test_a_known_floor_changes_no_resample(analysis: Analysis) -> None:
    unknown = analyze(replace(analysis.observations, extra={}), analysis.settings)
    assert unknown.finding("known_floor") is None
    for one, other in zip(unknown.bands, analysis.bands):
        assert one.samples.keys() == other.samples.keys()
        for name, values in one.samples.items():
            np.testing.assert_array_equal(values, other.samples[name])


def test_points_of_one_run_are_not_independent_so_the_error_is_resampled() -> None:
    rng = np.random.default_rng(0)
    n, d = (np.tile(v, 2) for v in (np.geomspace(1e4, 1e6, 24), np.geomspace(1e6, 3e7, 6).repeat(4)))
    d[24:] /= 2  # a second evaluation of each run, at half its tokens
    loss = [QUICKSTART_LAW.loss_nats(*nd) for nd in zip(n, d)] + 0.005 * np.tile(rng.standard_normal(24), 2)
    points = Observations.from_arrays(
        n_params=n, n_tokens=d, loss_nats=loss, run_id=np.tile(np.arange(24), 2),
        extra={FLOOR: np.full(48, QUICKSTART_LAW.E)},
    )  # fmt: skip
    approach = Parametric()
    estimate = approach.estimate(points)
    band = bootstrap(approach, points, estimate, BootstrapSettings(resamples=100), seed=0)
    known, samples = known_floor(points, approach, estimate, band), band.samples["E"]
    assert known is not None
    assert known.standard_error_nats is not None
    assert not known.error_simulated
    assert known.standard_error_nats == pytest.approx(np.std(samples[np.isfinite(samples)], ddof=1))
    assert "is the spread of E over the resamples" in words(known)


def test_without_resamples_there_is_no_z() -> None:
    known = known_of(of_floor(bootstrap=BootstrapSettings(resamples=0)))
    assert known is not None
    assert (known.standard_error_nats, known.z, known.error_simulated) == (None, None, False)


def test_without_noise_the_fitted_floor_is_the_true_one_and_the_reducible_loss_the_laws(
    analysis: Analysis,
) -> None:
    known = known_of(of_floor(noise=0.0))
    assert known is not None
    assert known.fitted_nats == pytest.approx(QUICKSTART_LAW.E, abs=1e-3)
    # The valley's bottom falls with alpha beta / (alpha + beta); unfinished curves lie above it, so the exponent is only close.
    law = QUICKSTART_LAW
    assert known.line is not None
    assert known.line.exponent == pytest.approx(law.alpha * law.beta / (law.alpha + law.beta), rel=0.2)
    assert np.all(np.diff(known.compute_flops) > 0)
    assert np.all(np.diff(known.reducible_nats) < 0)


def test_losses_below_the_floor_are_left_out(analysis: Analysis) -> None:
    lowest = float(analysis.observations.loss_nats.min())
    known = known_of(of_floor(floors=(lowest + 0.05,)))
    assert known is not None
    assert known.reducible_nats.min() > 0


def test_a_missing_floor_or_several_are_not_a_known_floor(analysis: Analysis) -> None:
    assert known_of(of_floor(floors=(1.0, 1.1))) is None
    points = replace(analysis.points, extra={})
    assert known_floor(points, Parametric(), analysis.estimates[2], analysis.bands[2]) is None


def test_a_law_without_a_floor_has_no_z() -> None:
    known = known_of(of_floor(approach=ApproachSettings(parametric=ParametricSettings(law="kaplan_nd"))))
    assert known is not None
    assert (known.fitted_nats, known.z) == (None, None)
    assert "no law with an E was fitted" in words(known)


# -- how it is shown


def test_the_finding_is_in_analysis_json_and_valid(analysis: Analysis) -> None:
    schema = json.loads(resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text())
    data = json.loads(json.dumps(analysis.to_json_dict(), allow_nan=False))
    jsonschema.validate(data, schema)
    told, known = data["known_floor"], known_of(analysis)
    assert known is not None
    assert known.line is not None
    assert told["floor_nats"] == QUICKSTART_LAW.E
    assert told["z"] == known.z
    assert told["standard_error_simulated"] is True
    assert told["line"]["exponent"] == known.line.exponent
    assert [p["loss_nats"] for p in told["reducible"]] == known.reducible_nats.tolist()
    broken = data | {"known_floor": {k: v for k, v in told.items() if k != "z"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
    few = replace(known, line=None, fitted_nats=None, interval=None, standard_error_nats=None)
    with_few = replace(analysis, findings=(as_finding(few, 0.9),))
    jsonschema.validate(json.loads(json.dumps(with_few.to_json_dict())), schema)


def test_the_sentences_have_the_numbers(analysis: Analysis) -> None:
    line = straight_line(FLOPS, FLOPS**-0.2)
    known = KnownFloor(1.25, 1.3, (1.1, 1.4), 0.05, FLOPS, FLOPS**-0.2, line)
    said = words(known)
    for part in (
        "1.2500 nats; Approach 3 finds E = 1.3000 (1.1000 to 1.4000), z = +1.00 standard errors.",
        "falls as C^-0.200 from 1e+10 to 1e+13 FLOPs (31 points, none further than 0.0% from the line)",
        "from 0.200 to 0.200: ",
    ):
        assert part in said
    assert "0.0500 nats, is the spread of E over the resamples." in said
    simulated = words(replace(known, error_simulated=True))
    assert (
        "One standard error, 0.0500 nats, is the root mean square error of E above the truth in sweeps simulated"
        in simulated
    )
    assert "error of E below" in words(replace(known, error_simulated=True, fitted_nats=1.2))
    assert "Too few evaluations" in words(replace(known, line=None))


def test_the_figure_shows_the_measured_points_and_their_line(analysis: Analysis) -> None:
    known = known_of(analysis)
    assert known is not None
    assert known.line is not None
    figure = Figure()
    draw_finding(figure, as_finding(known, 0.9))
    (axes,) = figure.axes
    drawn = next(line for line in axes.lines if line.get_label() == "loss less the true floor")
    np.testing.assert_allclose(drawn.get_xdata(), known.compute_flops)
    np.testing.assert_allclose(drawn.get_ydata(), known.reducible_nats)
    straight = next(a for a in axes.lines if str(a.get_label()).startswith("C^-"))
    x, y = (np.log(np.asarray(v, dtype=float)) for v in straight.get_data())
    assert np.polyfit(x, y, 1)[0] == pytest.approx(-known.line.exponent)
    assert np.exp(x[[0, -1]]) == pytest.approx(known.line.compute_range_flops)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_the_report_has_the_figure(analysis: Analysis, tmp_path: Path) -> None:
    known = known_of(analysis)
    assert known is not None
    page = write_report(analysis, (), tmp_path / "with").read_text()
    assert known.line is not None
    for said in words(known).split(". "):
        assert re.sub(r"C\^(-[\d.]+)", r"C<sup>\1</sup>", str(escape(said))) in page
    assert (tmp_path / "with" / "figures" / "reducible_loss.png").exists()
    none = replace(analysis, findings=())
    assert "reducible_loss" not in write_report(none, (), tmp_path / "without").read_text()
