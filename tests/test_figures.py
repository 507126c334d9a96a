"""Tests of the figures: they draw the data, numbers are readable, and a figure is the same file every time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from helpers.synthetic import QUICKSTART_LAW, diverged, synthetic_records
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import (
    BudgetOptimum,
    BudgetStatus,
    Estimate,
    FitResult,
    FitStatus,
    Frontier,
    PowerLaw,
)
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.text import format_count, format_flops, significant
from scaling_lab.reporting import figures_checks, figures_curves, figures_frontier, style, svg

A = 0.6
FRONTIER = Frontier(
    params=PowerLaw(A, 0.5),
    tokens=PowerLaw(1 - A, 1 / 3),
    compute_range_flops=(1e10, 1e12),
    compute_flops=np.array([1e10, 1e12]),
    params_opt=0.5 * np.array([1e10, 1e12]) ** A,
    tokens_opt=np.array([1e10, 1e12]) ** (1 - A) / 3,
    loss_opt=np.array([2.0, 1.5]),
)
ISOFLOP = Estimate("isoflop", FitStatus.CONVERGED, "fine", FRONTIER)


def grid_observations() -> Observations:
    """Two budgets of five sizes, on the quickstart's law, C = 6 N D exactly."""
    n = np.concatenate([np.geomspace(5e3, 8e4, 5), np.geomspace(1e4, 2e5, 5)])
    c = np.repeat([1e11, 4e11], 5)
    d = c / (6 * n)
    loss = [QUICKSTART_LAW.loss_nats(a, b) for a, b in zip(n, d)]
    return Observations.from_arrays(n_params=n, n_tokens=d, compute_flops=c, loss_nats=loss, budget_flops=c)


def law_fit(observations: Observations, residuals_log: np.ndarray) -> FitResult:
    law = QUICKSTART_LAW
    parameters = {"E": law.E, "A": law.A, "B": law.B, "alpha": law.alpha, "beta": law.beta}
    return FitResult(
        "chinchilla",
        parameters,
        0.0,
        observations.n_points,
        residuals_log,
        FitStatus.CONVERGED,
        "fine",
        10,
        10,
    )


# -- numbers as people write them


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e11, "1e11"), (4e11, "4e11"), (1.6e12, "1.6e12"), (5.764e23, "5.76e23"), (999.9e9, "1e12"), (0, "0"),
     (float("inf"), "∞")],
)  # fmt: skip
def test_flops_are_written_as_powers(value: float, text: str) -> None:
    assert format_flops(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(640, "640"), (17_000, "17k"), (16_660, "16.7k"), (1.2e6, "1.2M"), (70e9, "70B"), (1.4e12, "1.4T"),
     (999_950, "1M"), (999_400, "999k"), (9_999, "10k"), (2.5e16, "2.5e16"), (float("inf"), "∞"), (float("-inf"), "−∞")],
)  # fmt: skip
def test_counts_are_written_with_a_suffix(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(250.4, 2, "250"), (0.0123, 2, "0.012"), (1259.0, 4, "1259"), (2.5e9, 2, "2.5e9")],
)
def test_significant_figures_without_an_exponent(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


@given(st.floats(-30, 30), st.floats(0.02, 20), st.integers(4, 8))
def test_log_ticks_are_few_and_inside(start: float, decades: float, most: int) -> None:
    lo = 10.0**start
    hi = lo * 10.0**decades
    ticks = style.log_ticks(lo, hi, most)
    assert 2 <= len(ticks) <= most
    assert ticks == sorted(set(ticks))
    # The fallback rounds to two significant figures at least.
    assert all(lo * 0.94 <= t <= hi * 1.06 for t in ticks)


def test_log_ticks_are_round_numbers() -> None:
    assert style.log_ticks(0.9e11, 1.7e12) == [1e11, 2e11, 5e11, 1e12]
    assert style.log_ticks(1e3, 1e9, most=7) == [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_labels_pushed_apart_keep_their_order_and_distance(positions: list[float]) -> None:
    moved = style.spread(positions, 0.05, 0.0, 1.0)
    by_place = sorted(moved)
    assert all(b - a > 0.045 for a, b in itertools.pairwise(by_place))
    for (p, m), (q, n) in zip(sorted(zip(positions, moved)), sorted(zip(positions, moved))[1:]):
        assert p == q or m <= n


def test_text_is_readable_on_white_whatever_the_line_is() -> None:
    def contrast(color: tuple[float, ...]) -> float:
        rgb = np.array(color[:3])
        linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)

    for share in np.linspace(0, 1, 11):
        assert contrast(style.text_color(style.sequential_map()(share))) >= 4.5
        assert contrast(style.sequential_map()(share)) >= 1.9  # lines need less than text, but must be seen


def test_sizes_are_distinguished_by_lightness_alone() -> None:
    rgb = style.sequential_map()(np.linspace(0, 1, 20))[:, :3]
    assert np.all(np.diff(rgb @ [0.2126, 0.7152, 0.0722]) > 0)


# -- figures


def drawn_lines(ax, marker: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float))
        for line in ax.lines
        if (marker is None) or line.get_marker() == marker
    ]


def test_valleys_show_every_point_and_a_star_at_each_minimum() -> None:
    observations = grid_observations()
    good = BudgetOptimum(
        1e11, 5, BudgetStatus.OK, None, 17e3, 1e6, 1.87, 0.1, np.log([1e4, 2e4, 3e4]), np.ones(3) * 1.9
    )
    bad = BudgetOptimum(
        4e11,
        5,
        BudgetStatus.EDGE,
        "at the edge",
        fit_log_params=np.log([1e4, 2e4, 3e4]),
        fit_loss=np.ones(3) * 1.7,
    )
    ax = Figure().add_subplot()
    shown = figures_frontier.isoflop_valleys(ax, observations, replace(ISOFLOP, budgets=(good, bad)))
    assert shown == {"budgets": 2, "ok": 1, "too_few": 0}
    points = np.sort(np.concatenate([y for _, y in drawn_lines(ax, "o")]))
    np.testing.assert_allclose(points, np.sort(observations.loss_nats))
    assert [(float(x[0]), float(y[0])) for x, y in drawn_lines(ax, "*")] == [(17e3, 1.87)]
    texts = [t.get_text() for t in ax.texts]
    assert "1e11" in texts
    assert "4e11 (edge)" in texts
    dashes = {
        float(line.get_ydata()[0]): line.get_linestyle() for line in ax.lines if len(line.get_ydata()) == 2
    }
    assert dashes == {1.9: "-", 1.7: "--"}


def test_frontier_lines_have_the_slopes_they_name() -> None:
    observations = grid_observations()
    ax_n, ax_d = Figure().subplots(2, 1)
    used = figures_frontier.frontier_scaling(ax_n, ax_d, observations, [ISOFLOP])
    assert used["flops_per_param_token"] == pytest.approx(6)
    assert used["approaches"] == ["isoflop"]
    named = {t.get_text() for t in ax_n.texts} | {t.get_text() for t in ax_d.texts}
    assert {"IsoFLOP 0.60", "IsoFLOP 0.40", "Kaplan's slope 0.73", "Kaplan's slope 0.27"} <= named
    slopes = []
    for ax in (ax_n, ax_d):
        slopes.append(
            {
                round(float(np.log(y[-1] / y[0]) / np.log(x[-1] / x[0])), 6)
                for x, y in drawn_lines(ax)
                if x.size >= 30
            }
        )
    assert slopes[0] == {0.73, 0.5, 0.6}
    assert slopes[1] == {0.27, 0.5, 0.4}


def test_the_twenty_to_one_line_is_twenty_to_one_at_the_runs_own_cost() -> None:
    observations = grid_observations()
    dear = replace(
        observations, compute_flops=observations.compute_flops * 1.5
    )  # 9 FLOPs a parameter and token
    ax_n, ax_d = Figure().subplots(2, 1)
    assert figures_frontier.frontier_scaling(ax_n, ax_d, dear, [ISOFLOP])[
        "flops_per_param_token"
    ] == pytest.approx(9)
    (c, n), (_, d) = ([xy for xy in drawn_lines(ax) if xy[0].size == 60][-1] for ax in (ax_n, ax_d))
    np.testing.assert_allclose(d / n, 20)
    np.testing.assert_allclose(9 * n * d, c)


def test_the_band_is_the_quantiles_of_the_sampled_lines() -> None:
    slopes, logs = np.linspace(0.4, 0.6, 101), np.zeros(101)
    band = Band(
        "isoflop",
        0.9,
        "run",
        "bootstrap",
        101,
        0,
        0,
        {"params_exponent": slopes, "params_log_coefficient": logs},
    )
    found = figures_frontier.frontier_band(band, "params", np.array([np.e, np.e**2]))
    assert found is not None
    np.testing.assert_allclose(np.log(found[0]), [0.41, 0.82])
    np.testing.assert_allclose(np.log(found[1]), [0.59, 1.18])
    assert figures_frontier.frontier_band(band, "tokens", np.array([1.0])) is None
    few = replace(band, samples={k: v[:19] for k, v in band.samples.items()})
    assert figures_frontier.frontier_band(few, "params", np.array([1.0])) is None


def test_contour_frontier_touches_the_lowest_contour_of_each_budget() -> None:
    observations = grid_observations()
    law = QUICKSTART_LAW
    a = law.params_exponent
    n_law = PowerLaw(a, law.params_opt(6.0) / 6**a)
    frontier = replace(FRONTIER, params=n_law, tokens=PowerLaw(1 - a, 1 / (6 * n_law.coefficient)))
    estimate = Estimate(
        "parametric",
        FitStatus.CONVERGED,
        "fine",
        frontier,
        "chinchilla",
        (law_fit(observations, np.zeros(10)),),
    )
    ax = Figure().add_subplot()
    assert figures_frontier.parametric_contour(ax, observations, estimate)
    d, n = next(xy for xy in drawn_lines(ax) if xy[0].size == 200)
    i = 100
    budget = 6 * n[i] * d[i]
    other = n[i] * np.array([0.7, 1.4])
    assert all(law.loss_nats(m, budget / (6 * m)) > law.loss_nats(n[i], d[i]) for m in other)
    assert {"1e11", "4e11"} <= {t.get_text() for t in ax.texts}


def test_contours_are_refused_for_a_law_of_other_columns() -> None:
    observations = grid_observations()
    fit = replace(law_fit(observations, np.zeros(10)), law="muennighoff")
    estimate = Estimate("parametric", FitStatus.CONVERGED, "fine", None, "muennighoff", (fit,))
    ax = Figure().add_subplot()
    assert not figures_frontier.parametric_contour(ax, observations, estimate)
    assert not ax.lines


def test_residuals_are_positive_where_the_data_lie_above_the_law() -> None:
    observations = grid_observations()
    off = np.linspace(-0.02, 0.02, 10)
    fit = law_fit(observations, -np.log1p(off))  # ln L_fit - ln L where L = L_fit (1 + off)
    ax_n, ax_d = Figure().subplots(1, 2)
    figures_checks.residuals(ax_n, ax_d, observations, fit)
    shown = np.asarray(ax_n.collections[0].get_offsets())
    np.testing.assert_allclose(shown, np.column_stack([observations.n_params, 100 * off]))


def test_a_useless_interval_does_not_flatten_the_forest() -> None:
    row = figures_checks.ForestRow
    rows = [row("this report", "isoflop", 0.50, (0.45, 0.55), True), row("this report", "envelope", 0.52, (-8, 9), True),
            row("other", "isoflop", 0.60)]  # fmt: skip
    ax = Figure().add_subplot()
    figures_checks.sensitivity_forest(ax, rows, {"isoflop": (0.45, 0.55)})
    lo, hi = ax.get_xlim()
    assert 0.2 < lo < 0.45
    assert 0.60 < hi < 0.9
    assert len(drawn_lines(ax, "<")) == len(drawn_lines(ax, ">")) == 1


def test_loss_figure_draws_each_run_once_and_the_envelope_it_was_given() -> None:
    n = np.repeat([1e4, 3e4], 50)
    d = np.tile(np.geomspace(1e5, 1e7, 50), 2)
    observations = Observations.from_arrays(
        n_params=n, n_tokens=d, loss_nats=5 * d**-0.1, run_id=np.repeat(["a", "b"], 50)
    )
    details = {"compute_flops": np.array([1e10, 1e11]), "loss_nats": np.array([1.5, 1.2])}
    ax = Figure().add_subplot()
    shown = figures_curves.loss_vs_flops(
        ax, observations, [replace(ISOFLOP, approach="envelope", details=details)]
    )
    assert shown == {"curves": 2, "drawn": 2, "runs": 2}
    assert len(ax.collections[0].get_segments()) == 2
    x, y = drawn_lines(ax)[0]
    np.testing.assert_allclose((x, y), (details["compute_flops"], details["loss_nats"]))


def test_many_curves_are_thinned_and_counted() -> None:
    runs = 300
    n = np.repeat(np.geomspace(1e4, 1e6, runs), 5)
    d = np.tile(np.geomspace(1e6, 1e7, 5), runs)
    observations = Observations.from_arrays(
        n_params=n, n_tokens=d, loss_nats=5 * d**-0.1, run_id=np.repeat([f"r{i:03d}" for i in range(runs)], 5)
    )
    ax = Figure().add_subplot()
    shown = figures_curves.loss_vs_flops(ax, observations, [])
    assert shown["curves"] == runs
    assert shown["drawn"] <= figures_curves.MAX_CURVES


def test_thinning_keeps_both_ends_and_only_given_points() -> None:
    x = np.geomspace(1, 1e6, 5000)
    kept, y = figures_curves.thin(x, x**2, 100)
    assert kept.size <= 101
    assert kept[0] == x[0]
    assert kept[-1] == x[-1]
    np.testing.assert_array_equal(y, kept**2)


def test_training_curves_mark_a_diverged_run() -> None:
    records = synthetic_records(budgets=(1e11,), sizes=3, noise=0.0)
    records[1] = diverged(records[1])
    ax_loss, ax_lr = Figure().subplots(2, 1)
    assert figures_curves.training_curves(ax_loss, ax_lr, records) == {
        "curves": len(records),
        "drawn": len(records),
    }
    assert len(drawn_lines(ax_loss, "x")) == 1
    peak = max(float(y.max()) for _, y in drawn_lines(ax_lr))
    assert peak == pytest.approx(max(r.spec.optimizer.peak_lr for r in records), rel=0.02)


def test_training_curves_of_nothing_draw_nothing() -> None:
    ax_loss, ax_lr = Figure().subplots(2, 1)
    assert figures_curves.training_curves(ax_loss, ax_lr, []) == {"curves": 0, "drawn": 0}


# -- SVG


def small_svg() -> str:
    with style.figure_style():
        figure = Figure(figsize=(3, 2))
        figure.add_subplot().plot([0, 1 / 3], [0, 2 / 3], marker="o")
        return svg.to_svg(figure)


def test_a_figure_is_the_same_file_every_time_and_has_no_date() -> None:
    import datetime

    assert small_svg() == small_svg()
    assert "<dc:date>" not in small_svg()
    assert str(datetime.date.today().year) not in small_svg()


def test_inlined_figures_have_their_own_ids_and_a_name() -> None:
    import re

    one, two = svg.inline(small_svg(), "first_one", "a & b"), svg.inline(small_svg(), "second_one", "c")
    ids = [re.findall(r'\bid="([^"]+)"', s) for s in (one, two)]
    assert not set(ids[0]) & set(ids[1])
    for s, own in zip((one, two), ids):
        assert len(own) == len(set(own))
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', s)) <= {(i, "") for i in own} | {
            ("", i) for i in own
        }
    assert '<title id="first_one-alt">a &amp; b</title>' in one
    assert "<?xml" not in one


def test_shortened_coordinates_move_nothing_visibly() -> None:
    """Every coordinate of the path is within .005 points of matplotlib's."""
    import io
    import re

    with style.figure_style():
        figure = Figure(figsize=(3, 2))
        figure.add_subplot().plot(np.linspace(0, 1, 20), np.sin(np.linspace(0, 7, 20)))
        raw = io.StringIO()
        figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
        short = svg.to_svg(figure)

    def numbers(text: str) -> list[float]:
        body = re.sub(r"<defs>.*?</defs>", "", text, flags=re.S)
        return [
            float(v) for d in re.findall(r'\bd="([^"]*)"', body) for v in re.findall(r"-?\d+(?:\.\d+)?", d)
        ]

    a, b = numbers(raw.getvalue()), numbers(short)
    assert len(a) == len(b) > 40
    assert max(abs(x - y) for x, y in zip(a, b)) <= 0.0051
    assert len(short) < len(raw.getvalue())


def test_synthetic_runs_end_exactly_on_their_law() -> None:
    """The test helper itself: without noise a run's last loss is exactly the law's, and the records are valid."""
    for record in synthetic_records(noise=0.0):
        spec = record.spec
        assert record.final_val_loss_nats == pytest.approx(
            QUICKSTART_LAW.loss_nats(spec.n_params(), spec.train_tokens), rel=1e-12
        )
        assert type(record).from_dict(record.to_dict(), record.curve) == record
        assert math.isclose(spec.train_flops(), spec.budget_flops, rel_tol=0.01)
