"""Tests of unusual tables: recounted sweeps, duplicates, equal losses, two files of one name, hints."""

from __future__ import annotations

import io
import json
import logging
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rich.console
from matplotlib.figure import Figure

from helpers.synthetic import QUICKSTART_LAW, plan_of, synthetic_records
from scaling_lab.analysis.analysis import AnalysisSettings, analyze, observations_of_sweep, read_observations
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.settings import BootstrapSettings
from scaling_lab.cli.display.console import fitting_table
from scaling_lab.cli.main import main
from scaling_lab.core.errors import STRICT_VARIABLE
from scaling_lab.core.record import RunStatus
from scaling_lab.core.storage.store import RunStore
from scaling_lab.reporting import figures_frontier
from scaling_lab.reporting.figure_list import Drawn, NotDrawn, draw_figures

FAST = {"bootstrap": BootstrapSettings(resamples=0), "sensitivity": False, "backtest": False}


def rows_of_a_law(flops_factor: float = 1.0) -> list[str]:
    """CSV rows of a Chinchilla-like law, 3 budgets of 7 sizes."""
    rows = ["run_id,params,tokens,flops,loss"]
    for c in (1e15, 1e16, 1e17):
        for m in range(7):
            n = math.sqrt(c / 120) * 2 ** ((m - 3) / 2)
            d = c / 6 / n
            loss = 1.8 + 400 * n**-0.34 + 400 * d**-0.28
            rows.append(f"r{len(rows)},{n},{d},{c * flops_factor},{loss}")
    return rows


def table(folder: Path, rows: list[str], name: str = "plain.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("convention", ["six_n_total", "chinchilla_appendix_f"])
def test_valleys_of_a_recounted_sweep_show_the_points_that_were_fitted(convention: str) -> None:
    settings = AnalysisSettings(convention=convention, **FAST)
    analysis = analyze(observations_of_sweep(synthetic_records(QUICKSTART_LAW), settings), settings)
    assert not analysis.points.budgets_match_convention
    ax = Figure().add_subplot()
    shown = figures_frontier.isoflop_valleys(ax, analysis.points, analysis.estimate("isoflop"))
    assert shown["budgets"] > 0
    drawn = np.concatenate([line.get_xdata() for line in ax.lines if line.get_marker() == "o"])
    assert drawn.size
    assert set(np.round(np.log(drawn), 6)) <= set(np.round(np.log(analysis.points.n_params), 6))


def test_labels_of_minima_cover_no_point() -> None:
    settings = AnalysisSettings(**FAST)
    analysis = analyze(observations_of_sweep(synthetic_records(QUICKSTART_LAW), settings), settings)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.add_subplot()
    figures_frontier.isoflop_valleys(ax, analysis.points, analysis.estimate("isoflop"))
    figure.draw_without_rendering()
    names = [t for t in ax.texts if t.get_text().startswith("N = ")]
    assert names
    points = np.concatenate([line.get_xydata() for line in ax.lines if line.get_marker() == "o"])
    for name in names:
        box = name.get_window_extent()
        inside = [p for p in ax.transData.transform(points) if box.contains(*p)]
        assert not inside, name.get_text()


def test_exact_duplicate_rows_are_not_a_curve(tmp_path: Path) -> None:
    rows = rows_of_a_law()
    settings = AnalysisSettings(**FAST)
    analysis = analyze(read_observations(table(tmp_path, rows + rows[1:6]), settings), settings)
    assert "needs curves" in analysis.estimate("envelope").message
    for name in ("isoflop", "parametric"):
        frontier = analysis.estimate(name).frontier
        assert frontier is not None
        assert frontier.params.exponent == pytest.approx(0.28 / 0.62, abs=1e-3)
    assert any(isinstance(p, Drawn) and p.name == "loss_vs_flops" for p in draw_figures(analysis, []))


NONSENSE = {
    "equal": np.full(21, 3.0),
    "random": np.random.default_rng(0).lognormal(0, 4, 21),
    "tiny": np.full(21, 1e-12),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_equal_and_nonsense_losses_give_no_exponent_without_a_caveat(tmp_path: Path, kind: str) -> None:
    """Every figure is drawn or says why not. Equal losses have no optimum; exponents of random losses come with a caveat."""
    rows = rows_of_a_law()
    rows[1:] = [",".join([*r.split(",")[:4], repr(float(x))]) for r, x in zip(rows[1:], NONSENSE[kind])]
    settings = AnalysisSettings(**FAST, units={"loss": "nats"})  # some are above any model's loss
    analysis = analyze(read_observations(table(tmp_path, rows), settings), settings)
    plates = draw_figures(analysis, [])
    assert len(plates) == 8
    assert all(plate.reason for plate in plates if isinstance(plate, NotDrawn))
    frontiers = {e.approach: e.frontier for e in analysis.estimates}
    if kind == "random":
        # By chance IsoFLOP has a minimum in two of three budgets: a line through two points.
        assert "two points has no residuals" in analysis.estimate("isoflop").message
        assert analysis.estimate("parametric").status is FitStatus.AT_BOUND
        assert frontiers["envelope"] is None
    else:
        assert not any(frontiers.values()), frontiers
        assert isinstance({p.name: p for p in plates}["frontier_scaling"], NotDrawn)


def test_a_figure_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("no such thing")

    settings = AnalysisSettings(**FAST)
    analysis = analyze(read_observations(table(tmp_path, rows_of_a_law()), settings), settings)
    monkeypatch.setattr(figures_frontier, "isoflop_valleys", broken)
    with pytest.raises(IndexError):
        draw_figures(analysis, [])
    monkeypatch.delenv(STRICT_VARIABLE)
    with caplog.at_level(logging.ERROR):
        plates = {p.name: p for p in draw_figures(analysis, [])}
    failed = plates["isoflop_valleys"]
    assert isinstance(failed, NotDrawn)
    assert "IndexError: no such thing" in failed.reason
    assert isinstance(plates["frontier_scaling"], Drawn)
    assert "isoflop_valleys" in caplog.text


def lines_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    code = main(list(argv))
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out.splitlines()


QUICK = ("bootstrap.resamples=0", "sensitivity=false", "backtest=false")


def test_two_tables_with_one_name_get_separate_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        table(tmp_path / folder, rows_of_a_law())
    for folder in ("a", "b", "a"):
        lines_of(capsys, "analyze", f"runs={folder}/plain.csv", *QUICK)
    tables = tmp_path / "results" / "tables"
    sources = {p.parent.name: json.loads(p.read_text())["source"] for p in tables.glob("*/analysis.json")}
    assert sources == {
        "plain": str((tmp_path / "a/plain.csv").resolve()),
        "plain-2": str((tmp_path / "b/plain.csv").resolve()),
    }


def test_a_page_by_somebody_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, rows_of_a_law())
    page = tmp_path / "mine" / "report.html"
    page.parent.mkdir()
    page.write_text("<html>my thesis</html>")
    assert main(["analyze", f"runs={path}", f"out={page.parent}", *QUICK]) == 2
    assert "was not written by scaling-lab" in capsys.readouterr().err
    assert page.read_text() == "<html>my thesis</html>"


def test_the_next_command_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = rows_of_a_law(flops_factor=5.0)
    rows[0] = "run_id,params,tokens,flops,val loss (c4)"
    rows.append("bad,1e6,1e7,3e14,")
    table(tmp_path, rows, "my runs (v2).csv")
    out = lines_of(
        capsys,
        "analyze",
        "runs=my runs (v2).csv",
        "columns.loss=val loss (c4)",
        "where.params.min=1000",
        *QUICK,
    )
    assert any("1 dropped (1: loss is missing)" in line for line in out)
    assert any("flops is about 5 times 6 params tokens" in line for line in out)
    words = shlex.split(out[-1].removeprefix("next: "))
    assert words[:2] == ["scaling-lab", "predict"]
    lines_of(capsys, *words[1:], "bootstrap.resamples=0")
    assert main(["analyze", "runs=my runs (v2).csv", "columns.loss=val loss"]) == 2
    assert "Did you mean 'columns.loss=val loss (c4)'?" in capsys.readouterr().err


def test_tables_drop_columns_and_never_crop() -> None:
    columns = {"run": "left", "D": "right", "state": "left"}
    rows = [("a-long-run-name", "123,456,789", "completed"), ("b",)]
    for width, names in ((200, ["run", "D", "state"]), (40, ["run", "state"]), (20, ["run"])):
        shown = fitting_table("t", columns, rows, width, drop=("D", "state"))
        assert [c.header for c in shown.columns] == names
    out = io.StringIO()
    rich.console.Console(file=out, width=40).print(fitting_table("t", columns, rows, 40, drop=("D", "state")))
    assert "a-long-run-name" in out.getvalue()
    assert "too narrow for: D" in out.getvalue()


def test_status_prints_whole_reasons_below_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reason = ("OutOfMemoryError: " + "tried to allocate a lot " * 12).strip()
    (record, *_) = synthetic_records(curve_points=4)
    failed = replace(record, status=RunStatus.FAILED, reason=reason, final_val_loss_nats=None)
    store = RunStore.for_sweep("results", "s")
    store.write_plan(plan_of([record], "s"))
    assert store.claim(record.spec) is not None
    store.start_curve(record.run_id, record.curve).close()
    store.write_record(failed)
    assert main(["status", "sweep=s"]) == 0
    assert reason in capsys.readouterr().out
