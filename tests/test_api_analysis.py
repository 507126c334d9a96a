"""Tests of the Python API on tables: every kind of table, what a result shows, and errors that name argument and choices."""

from __future__ import annotations

import json
from typing import get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import scaling_lab as sl
from helpers.example_table import LAW, example_table
from scaling_lab.analysis.analysis import AnalysisSettings
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.api.options import AnalysisOptions

QUICK = {"bootstrap": {"resamples": 100}, "sensitivity": False, "backtest": False, "profile": False}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return example_table()


@pytest.fixture(scope="module")
def result(table):
    return sl.analyze(table)


def test_numbers_with_intervals_hold_the_truth(result):
    for approach in (result.isoflop, result.parametric):
        assert approach.exponent.interval.contains(LAW.a)
        assert approach.exponent.estimate == pytest.approx(LAW.a, abs=0.02)
        assert approach.tokens_exponent.interval.contains(1 - LAW.a)
    alpha = result.parametric.parameters["alpha"]
    assert alpha.interval.contains(LAW.alpha)
    assert alpha.interval.lo < alpha.estimate < alpha.interval.hi
    lo, hi = alpha.interval
    assert (lo, hi) == (alpha.interval.lo, alpha.interval.hi)
    assert result.parametric.profile_intervals["beta"].contains(LAW.beta)
    assert "agree" in result.agreement


def test_missing_numbers_have_reasons(result):
    exponent = result.envelope.exponent
    assert exponent.estimate is None
    assert exponent.interval is None
    assert "curves" in exponent.message
    assert "curves" in repr(exponent)
    with pytest.raises(sl.UserError, match="curves"):
        float(exponent)
    assert result.envelope.status == "not_applicable"
    assert dict(result.envelope.parameters) == {}


def test_a_number_without_resamples_has_a_reason_and_no_interval(table):
    exponent = sl.analyze(table, **{**QUICK, "bootstrap": {"resamples": 0}}).isoflop.exponent
    assert exponent.estimate == pytest.approx(LAW.a, abs=0.02)
    assert exponent.interval is None
    assert exponent.message


def test_reprs_are_short(result):
    assert len(repr(result).splitlines()) <= 5
    assert len(repr(result)) < 600
    assert len(repr(result.analysis)) < 500
    for value in (*result.analysis.estimates, *result.analysis.bands, result.analysis.observations):
        assert len(repr(value)) < 200


def test_predictions_are_found_by_what_was_asked(result):
    # The table ends at 1e21: ten times that is what an analysis predicts unasked.
    for budget in (3e20, 1e23, 1e25):
        found = result.predict(budget)
        assert found.compute_flops == (budget,)
        best = found.isoflop.params_opt
        assert best.estimate == pytest.approx(float(LAW.params_opt(budget)), rel=0.2)
        assert best.interval.contains(best.estimate)
    both = result.predict([1e22, 1e24])
    assert both.at(1e24).parametric == result.predict(1e24).parametric
    with pytest.raises(sl.UserError, match=r"several budgets.*at\(1e\+22\), \.at\(1e\+24\)"):
        _ = both.isoflop
    with pytest.raises(sl.UserError, match=r"compute_flops=5.0 .*1e\+22, 1e\+24"):
        both.at(5.0)
    with pytest.raises(sl.UserError, match="envelope predicts nothing.*curves"):
        _ = result.predict(1e22).envelope
    assert sl.predict(result, 1e22).isoflop == result.predict(1e22).isoflop
    frame = both.to_frame()
    assert frame.loc[(1e24, "isoflop"), "tokens_opt"] == both.at(1e24).isoflop.tokens_opt.estimate
    assert len(frame) == 4


def test_predict_from_a_table_is_predict_from_its_analysis(table, result):
    assert sl.predict(table, 1e23).to_frame().equals(result.predict(1e23).to_frame())


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.rename(columns={"loss": "val_loss"}),
        lambda t: t.rename(columns={"loss": "val_loss"}).set_index("run_id"),
        lambda t: t.rename(columns={"loss": "val_loss"}).to_dict("list"),
        lambda t: t.rename(columns={"loss": "val_loss"}).to_dict("records"),
        lambda t: pa.Table.from_pandas(t.rename(columns={"loss": "val_loss"})),
        lambda t: pa.Table.from_pandas(t.rename(columns={"loss": "val_loss"})).to_reader(),
    ],
    ids=["DataFrame", "index", "columns", "records", "pyarrow", "any Arrow stream"],
)
def test_every_kind_of_table_gives_the_same(table, make):
    data = make(table)
    got = sl.analyze(data, loss="val_loss", **QUICK)
    assert got.to_frame().equals(sl.analyze(table, **QUICK).to_frame())
    assert got.n_runs == 36


def test_the_users_frame_is_not_changed(table):
    before = table.rename(columns={"loss": " val loss "})
    copy = before.copy(deep=True)
    sl.analyze(before, loss="val loss", where={"params.min": 1.0}, **QUICK)
    pd.testing.assert_frame_equal(before, copy)


def test_a_file_and_its_frame_give_the_same(table, tmp_path):
    path = tmp_path / "runs.csv"
    table.to_csv(path, index=False)
    from_file = sl.analyze(path, **QUICK)
    assert from_file.to_frame().equals(sl.analyze(sl.read_table(path), **QUICK).to_frame())
    assert from_file.to_dict()["source"] == str(path)
    assert repr(from_file).startswith("runs.csv: 36 runs")


def test_read_table_converts_units_and_keeps_rows(table, tmp_path):
    path = tmp_path / "runs.tsv"
    scaled = table.assign(
        params=table["params"] / 1e6, tokens=table["tokens"] / 1e9, loss=table["loss"] / np.log(2)
    )
    scaled.rename(columns={"loss": "bits", "params": "size (M)"}).to_csv(path, sep="\t", index=False)
    options = {"units": {"params": "M", "tokens": "B", "loss": "bits"}, "where": {"flops.min": 5e19}}
    frame = sl.read_table(path, loss="bits", params="size (M)", **options)
    kept = table[table["flops"] >= 5e19].reset_index(drop=True)
    for name in ("params", "tokens", "loss"):
        np.testing.assert_allclose(frame[name], kept[name], rtol=1e-12)
    assert "bits" in frame
    assert frame.attrs["source"] == "runs.tsv"
    assert any("units" in note for note in frame.attrs["notes"])
    assert any("24 of 36 rows" in note for note in sl.analyze(frame, **QUICK).warnings)


def test_observations_are_taken_as_they_are(table):
    observations = Observations.from_arrays(
        n_params=table["params"],
        n_tokens=table["tokens"],
        loss_nats=table["loss"],
        compute_flops=table["flops"],
    )
    got = sl.analyze(observations, **QUICK)
    assert got.isoflop.exponent.estimate == sl.analyze(table, **QUICK).isoflop.exponent.estimate


def test_saved_and_loaded(result, tmp_path):
    text = result.to_json(tmp_path / "analysis.json")
    assert json.loads(text) == result.to_dict() == json.loads((tmp_path / "analysis.json").read_text())
    for path in (tmp_path, tmp_path / "analysis.json"):
        loaded = sl.load(path)
        assert loaded.to_frame().equals(result.to_frame())
        assert loaded.isoflop.exponent == result.isoflop.exponent
        assert loaded.parametric.parameters == result.parametric.parameters
        assert loaded.predict(1e22).isoflop == result.predict(1e22).isoflop
        assert loaded.agreement in loaded.summary()
    with pytest.raises(sl.UserError, match=r"compute_flops=3e\+22 .*Choices: 1e\+22"):
        loaded.predict(3e22)
    page = loaded.report(tmp_path / "again")
    assert "IsoFLOP" in page.read_text()
    assert sl.load(tmp_path / "again").to_dict() == result.to_dict()
    for use in (lambda: loaded.plot.isoflop(), lambda: loaded.to_frame("points")):
        with pytest.raises(sl.UserError, match=r"holds no runs.*sl\.analyze"):
            use()


def test_frames(result, table):
    assert result.to_frame().index.tolist() == ["envelope", "isoflop", "parametric"]
    assert result.to_frame("parameters").loc["E", "estimate"] == result.parametric.parameters["E"].estimate
    assert result.to_frame("budgets")["budget_flops"].round(-10).tolist() == [1e19, 1e20, 1e21]
    assert set(result.to_frame("backtest")["approach"]) == {"envelope", "isoflop", "parametric"}
    assert {"choice", "params_exponent"} <= set(result.to_frame("sensitivity").columns)
    assert sorted(result.to_frame("points")["loss"]) == sorted(table["loss"])
    assert result.to_frame("dropped").empty
    with pytest.raises(sl.UserError, match="'exponent'.*Did you mean 'exponents'.*budgets"):
        result.to_frame("exponent")


def test_findings(result, table):
    import matplotlib.pyplot as plt

    profile = result.finding("profile")
    assert profile in result.findings
    assert len(repr(profile)) < 300
    frame = result.to_frame("findings")
    assert frame.loc["profile", "answer"] == profile.answer
    assert profile.answer in result.summary()
    (shown,) = profile.tables
    assert len(result.to_frame(f"profile.{shown.name}")) == len(shown.rows)
    with pytest.raises(sl.UserError, match="study='profil'.*Did you mean 'profile'"):
        result.finding("profil")
    with pytest.raises(sl.UserError, match=rf"table of study profile='x'.*{shown.name}"):
        result.to_frame("profile.x")
    two = table.assign(code=table["loss"] * 0.9, prose=table["loss"] * 1.1)
    skills = sl.analyze(two, metrics=["code", "prose"], **QUICK)
    axes = skills.plot.finding("skills")
    assert axes[0].has_data()
    plt.close(axes[0].figure)
    optima = skills.to_frame(f"skills.{skills.finding('skills').tables[0].name}")
    assert any(name.endswith(" lo") for name in optima.columns)
    with pytest.raises(sl.UserError, match="study=profile has no figure"):
        result.plot.finding("profile")
    assert "profile" not in [f.name for f in sl.analyze(table, study="none").findings]


def test_bad_rows_are_listed(table):
    bad = pd.concat([table, table.tail(1).assign(run_id="broken", loss=np.nan)], ignore_index=True)
    dropped = sl.analyze(bad, **QUICK).to_frame("dropped")
    assert dropped[["run_id", "row"]].to_numpy().tolist() == [["broken", 37]]


def test_the_summary_is_the_terminals(result, capsys):
    from scaling_lab.cli.display.console import Console
    from scaling_lab.cli.display.summary import print_analysis

    print_analysis(Console(), result.analysis)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert result.summary(width=400).splitlines() == printed


def test_html_escapes_what_users_wrote(table):
    frame = table.copy()
    frame.attrs["source"] = "<script>alert(1)</script>"
    page = sl.analyze(frame, **QUICK)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<td>isoflop</td>" in page


def test_figures_are_matplotlib_axes(result):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    before = plt.get_fignums()
    assert result.plot.isoflop().get_xlabel() == "parameters N"
    assert [ax.get_ylabel() for ax in result.plot.frontier()] == ["optimal parameters N", "optimal tokens D"]
    for draw in (result.plot.envelope, result.plot.parametric, result.plot.sensitivity):
        assert isinstance(draw(), Axes)
    assert len(result.plot.residuals()) == 2
    made = set(plt.get_fignums()) - set(before)
    assert len(made) == 6
    figure, axes = plt.subplots(1, 2)
    assert result.plot.isoflop(ax=axes[0]) is axes[0]
    assert axes[0].lines
    assert not axes[1].lines
    with pytest.raises(sl.UserError, match="ax=3.*matplotlib axes"):
        result.plot.isoflop(ax=3)
    with pytest.raises(sl.UserError, match="2 matplotlib axes"):
        result.plot.frontier(ax=axes[0])
    for number in (*made, figure.number):
        plt.close(number)


def test_a_figure_that_cannot_be_drawn_raises_and_leaves_no_figure(table):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    one_budget = sl.analyze(table, where={"flops": 1e20}, law="power_c", **QUICK)
    with pytest.raises(sl.UserError, match="power_c"):
        one_budget.plot.parametric()
    with pytest.raises(sl.UserError, match="sensitivity=False"):
        one_budget.plot.sensitivity()
    assert plt.get_fignums() == before


def test_report(result, tmp_path):
    page = sl.report(result, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert (tmp_path / "out" / "figures" / "isoflop_valleys.png").exists()
    assert sl.load(tmp_path / "out").isoflop.exponent == result.isoflop.exponent
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("somebody's own")
    with pytest.raises(sl.UserError, match=r"out=.*mine"):
        result.report(mine)
    assert (mine / "report.html").read_text() == "somebody's own"


def test_options_are_those_of_the_command_line():
    fields = set(get_type_hints(AnalysisSettings)) - {"columns", "units", "where"}
    assert set(AnalysisOptions.__annotations__) == fields | {"law"}


def test_options_reach_the_analysis(table):
    got = sl.analyze(
        table,
        law="kaplan_nd",
        approach={"isoflop": {"minimum": "akima"}},
        bootstrap={"resamples": np.int64(50), "level": 0.5},
        seed=np.int64(3),
        predict_flops=np.array([1e22, 1e25]),
        sensitivity=False,
        backtest=False,
        profile=False,
    ).analysis
    assert got.settings.approach.parametric.law == "kaplan_nd"
    assert got.settings.approach.isoflop.minimum == "akima"
    assert (got.settings.bootstrap.resamples, got.settings.bootstrap.level, got.settings.seed) == (50, 0.5, 3)
    assert got.settings.predict_flops == (1e22, 1e25)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "val_los"}, r"loss='val_los': the table has no such column\. Did you mean 'val_loss'\?.*params"),
        ({"params": "run_id", "loss": "val_loss", "decimal": "dot"}, "decimal='dot'.*point, comma|decimal.*'dot'"),
        ({"loss": "val_loss", "params": "n"}, r"params='n': .*'run_id|params='n'"),
        ({"loss": "val_loss", "columns": {"loss": "tokens"}}, "loss='val_loss' and columns.*'tokens'.*one of them"),
        ({"loss": "val_loss", "columns": {"losss": "tokens"}}, r"'losss'.*Did you mean 'loss'"),
        ({"loss": "val_loss", "units": {"params": "Q"}}, r"units\.params=Q.*K, M, B, T"),
        ({"loss": "val_loss", "where": {"flop": 1}}, r"where\.flop=1.*Did you mean.*flops"),
        ({"loss": "val_loss", "weight": "loss_sem"}, "'weight'.*Did you mean weights.*bootstrap"),
        ({"loss": "val_loss", "weights": "sem"}, "weights='sem'.*loss_sem"),
        ({"loss": "val_loss", "law": "chinchila"}, "'chinchila'.*Did you mean 'chinchilla'.*kaplan_nd"),
        ({"loss": "val_loss", "bootstrap": {"level": 2}}, r"bootstrap\.level=2.*\(0, 1\)"),
        ({"loss": "val_loss", "bootstrap": 400}, "bootstrap=400.*dictionary|bootstrap=400.*group of options"),
        ({"loss": "val_loss", "tuning": "elsewhere"}, "tuning='elsewhere'.*sweep"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_the_value_and_the_choices(table, options, told):
    with pytest.raises(sl.UserError, match=told) as error:
        sl.analyze(table.rename(columns={"loss": "val_loss"}), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (3, "data=int is not a table.*DataFrame"),
        ([1, 2], "data=list is not a table"),
        ({"params": [1, 2], "loss": [1]}, "dict is not a table"),
        ("nowhere.csv", "data='nowhere.csv': there is no such file"),
        (pd.DataFrame(), "holds no rows"),
    ],
)
def test_data_that_is_not_a_table(data, told):
    with pytest.raises(sl.UserError, match=told):
        sl.analyze(data)


@pytest.mark.parametrize("flops", [0, -1e21, "1e21", None, [], float("nan"), [1e21, "x"]])
def test_budgets_are_positive_numbers(result, flops):
    with pytest.raises(sl.UserError, match="compute_flops="):
        result.predict(flops)


def test_options_with_a_finished_analysis_are_refused(result, tmp_path):
    for call in (lambda: sl.predict(result, 1e22, seed=1), lambda: sl.report(result, tmp_path, seed=1)):
        with pytest.raises(sl.UserError, match="seed: the analysis is made already"):
            call()


def test_load_names_the_expected_input(tmp_path):
    with pytest.raises(sl.UserError, match="does not exist.*sweep's folder"):
        sl.load(tmp_path / "x")
    (tmp_path / "analysis.json").write_text("{}")
    with pytest.raises(sl.UserError, match="not an analysis.json"):
        sl.load(tmp_path)
    (tmp_path / "analysis.json").write_text('{"schema_version": 99, "estimates": []}')
    with pytest.raises(sl.UserError, match="schema_version 99.*update"):
        sl.load(tmp_path)
