"""Learning-rate transfer: the best LR recovered where it is known, its error that of many repetitions, and the figure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from helpers.synthetic import QUICKSTART_LAW, make_record
from scaling_lab.analysis.analysis import find_in_records
from scaling_lab.analysis.data.sweep_records import split_by_role
from scaling_lab.analysis.studies.lr_transfer import TransferCell, as_finding, drift, transfer_cells
from scaling_lab.core.counts import Convention
from scaling_lab.core.parametrization import STANDARD, CompleteP, MuP
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import OptimizerSpec, RunSpec
from scaling_lab.reporting.figure_list import Drawn, draw_finding_figures
from scaling_lab.reporting.finding_figures import draw_finding
from scaling_lab.reporting.style import figure_style

CURVATURE, NOISE = 0.05, 0.004
RATES = 0.007 * 2.0 ** np.arange(-2, 3)
# The known best LRs: standard's falls as 1/width, the others' are constant.
BEST = {
    "standard": lambda width: 0.009 * 32 / width,
    "mup": lambda width: 0.009,
    "completep": lambda width: 0.009,
}


def record(parametrization, width, depth, lr, seed=0, noise=0.0, rng=None, **changes) -> RunRecord:
    spec = RunSpec(
        sweep="t", role="lr_sweep", budget_flops=1e9, shape=GPTShape(width=width, depth=depth, heads=width // 16),
        data=PySource(), schedule=Cosine(), optimizer=OptimizerSpec(peak_lr=lr), batch_tokens=512,
        train_tokens=512 * 20, seed_init=seed, seed_data=seed, convention=Convention.SIX_N_WITH_HEAD,
        parametrization=parametrization,
    )  # fmt: skip
    spec = replace(spec, **changes)
    rng = rng or np.random.default_rng(0)
    best = BEST[parametrization.kind](width)
    loss = 2.5 + 0.5 * CURVATURE * np.log(lr / best) ** 2 + noise * rng.standard_normal()
    made = make_record(spec, QUICKSTART_LAW, rng, noise=0.0, curve_points=2)
    return replace(made, final_val_loss_nats=float(loss))


def sweep(noise=0.0, seeds=1, rng=None) -> list[RunRecord]:
    rates = {"standard": lambda width: RATES * 32 / width}
    return [
        record(kind, width, depth, float(lr), seed, noise, rng)
        for kind in (MuP(), STANDARD, CompleteP())  # not in the order in which they are shown
        for width in (32, 64, 128)
        for depth in (2, 4)
        for lr in rates.get(kind.kind, lambda width: RATES)(width)
        for seed in range(seeds)
    ]


def test_the_best_rate_of_every_size_is_recovered():
    cells = transfer_cells(sweep())
    assert [c.parametrization for c in cells[::6]] == ["standard", "mup", "completep"]
    assert [(c.width, c.depth) for c in cells[:6]] == [(w, d) for w in (32, 64, 128) for d in (2, 4)]
    for cell in cells:
        assert cell.best_lr == pytest.approx(BEST[cell.parametrization](cell.width), rel=1e-6)
        assert cell.floor_nats == pytest.approx(2.5, abs=1e-9)
        assert cell.best_lr_log_error is None  # one seed: its scatter is unknown
    for kind, factor in (("standard", 0.25), ("mup", 1.0), ("completep", 1.0)):
        own = [c for c in cells if c.parametrization == kind]
        assert drift(own, "width") == pytest.approx(factor, rel=1e-6)
        assert drift(own, "depth") == pytest.approx(1.0, rel=1e-6)


def test_the_error_matches_the_scatter_of_repetitions():
    """Over 20 noisy sweeps the best LRs scatter around the truth by their errors, or a little less: where two
    rates are equally good, the parabola through the better one's neighbors is chosen after the noise is seen."""
    off, stated = [], []
    for repetition in range(20):
        for cell in transfer_cells(sweep(NOISE, 2, np.random.default_rng(repetition))):
            if cell.best_lr is not None:
                off.append(np.log(cell.best_lr / BEST[cell.parametrization](cell.width)))
                stated.append(cell.best_lr_log_error)
    assert len(off) > 300
    assert 0.9 < np.sqrt(np.mean(np.square(stated))) / np.std(off) < 1.5
    assert abs(np.mean(off)) < 0.3 * np.std(off)


def test_a_lowest_loss_at_the_end_gives_no_best_rate():
    low = [record(MuP(), 32, 2, lr) for lr in (0.001, 0.002, 0.004)]
    (cell,) = transfer_cells(low)
    assert cell.best_lr is None
    assert "end of the learning rates" in str(cell.message)
    assert drift([cell], "width") is None


def test_runs_outside_the_study_are_ignored():
    good = [record(MuP(), 32, 2, float(lr)) for lr in RATES]
    others = [
        record(MuP(), 32, 2, 0.007, role="isoflop"),
        record(MuP(), 32, 2, 0.05, batch_tokens=1024),
        replace(record(MuP(), 32, 2, 0.5), status=RunStatus.DIVERGED, final_val_loss_nats=None),
    ]
    (cell,) = transfer_cells([*good, *others])
    assert cell.peak_lr.tolist() == pytest.approx(RATES.tolist())
    assert transfer_cells(others[:1]) == []


def test_the_finding_has_its_figure_and_sentences():
    (found,) = find_in_records(split_by_role(sweep(NOISE, 2)))
    assert found.name == "lr_transfer"
    (figure,) = draw_finding_figures([found])
    assert isinstance(figure, Drawn)
    assert figure.name == "lr_transfer"
    exact = as_finding(transfer_cells(sweep()))
    assert (
        "factor of 0.25 (standard), 1.00 (mup), 1.00 (completep) from the smallest to the largest width"
        in exact.answer
    )
    assert (
        "of 1.00 (standard), 1.00 (mup), 1.00 (completep) from the smallest to the largest depth"
        in exact.answer
    )
    assert exact.answer in exact.chart.alt
    assert [row[4] for row in exact.table("best_rates").rows[:1]] == [
        pytest.approx(BEST["standard"](32), rel=1e-6)
    ]
    assert find_in_records(split_by_role([record(MuP(), 32, 2, 0.007, role="isoflop")])) == ()


def test_rates_that_tune_a_sweep_are_not_compared_between_sizes():
    """The study `tuning` measures those for each size."""
    both = [*sweep(NOISE, 2), record(MuP(), 32, 2, 0.007, role="isoflop")]
    ours = [r for r in both if r.spec.parametrization.kind == "mup"]
    assert find_in_records(split_by_role(ours)) == ()


def draw(cells: list[TransferCell]) -> Figure:
    with figure_style():
        figure = Figure()
        draw_finding(figure, as_finding(cells))
    return figure


def test_the_figure_shows_every_size():
    figure = draw(transfer_cells(sweep()))
    above, below = figure.axes[:3], figure.axes[3:6]
    assert [ax.get_title(loc="left") for ax in above] == ["standard", "mup", "completep"]
    marks = [[line for line in ax.lines if line.get_linestyle() == "None"] for ax in below]
    assert [len(each) for each in marks] == [6, 6, 6]  # a mark for each size
    drawn = sorted(float(line.get_ydata()[0]) for line in marks[0])
    assert drawn == pytest.approx(sorted(BEST["standard"](w) for w in (32, 64, 128) for _ in range(2)))
    with_errors = draw(transfer_cells(sweep(NOISE, 2, np.random.default_rng(1))))
    for ax in with_errors.axes[3:6]:
        known = [line for line in ax.lines if line.get_linestyle() == "None"]
        assert len(ax.containers) == len(known) >= 4  # an error bar for each
