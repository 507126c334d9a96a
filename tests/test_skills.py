"""Tests of optima per skill: two loss columns of one table with known, different optima; and of the comparison of laws."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest

from helpers.synthetic import Law
from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze, read_observations
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.studies import law_comparison
from scaling_lab.analysis.studies.shared.skill_optima import Skills, column_of, skill_optima
from scaling_lab.core.errors import UserError

# The same sizes and tokens, but the loss on knowledge falls more slowly with parameters than the loss on code.
CODE = Law(E=0.9, A=120.0, B=4000.0, alpha=0.36, beta=0.40)
FACTS = Law(E=1.9, A=900.0, B=4000.0, alpha=0.36, beta=0.40)
BUDGETS = np.geomspace(1e18, 1e20, 5)
QUICK = AnalysisSettings(
    bootstrap=BootstrapSettings(resamples=200), sensitivity=False, backtest=False, points="all"
)


def table(noise: float = 0.002, seed: int = 0) -> pd.DataFrame:
    """An IsoFLOP grid over a factor of 400 in size, wide enough for both optima, with three loss columns."""
    rng = np.random.default_rng(seed)
    rows = []
    for budget in BUDGETS:
        middle = np.sqrt(CODE.params_opt(budget) * FACTS.params_opt(budget))
        for n in middle * np.geomspace(1 / 20, 20, 15):
            d = budget / (6 * n)
            row = {"params": n, "tokens": d, "flops": budget}
            for name, law in (("eval/code (nats)", CODE), ("facts", FACTS)):
                row[name] = law.loss_nats(n, d) * np.exp(rng.normal(0, noise))
            row["loss"] = (row["eval/code (nats)"] + row["facts"]) / 2
            rows.append(row)
    return pd.DataFrame(rows)


COLUMNS = ("eval/code (nats)", "facts")


def skills_of(analysis: Analysis) -> Skills:
    """The numbers behind the finding."""
    found = skill_optima(analysis.observations, analysis.settings, analysis.mean_compute_flops)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    path = tmp_path_factory.mktemp("skills") / "t.csv"
    table().to_csv(path, index=False)
    settings = replace(QUICK, metrics=COLUMNS)
    return analyze(read_observations(path, settings), settings)


@pytest.fixture(scope="module")
def skills(analysis: Analysis) -> Skills:
    return skills_of(analysis)


@pytest.mark.parametrize("approach", ["isoflop", "parametric"])
def test_each_column_has_its_own_optimum(analysis: Analysis, skills: Skills, approach: str) -> None:
    c = analysis.mean_compute_flops
    for skill, law in zip(skills.columns, (CODE, FACTS)):
        found = next(p for p in skill.at_mean_compute if p is not None and p.approach == approach)
        truth = law.params_opt(c)
        assert found.params_opt.estimate == pytest.approx(truth, rel=0.1)
        assert found.params_opt.interval is not None
        assert found.params_opt.interval.lo < truth < found.params_opt.interval.hi
        assert found.tokens_per_param.estimate == pytest.approx(c / (6 * truth**2), rel=0.2)
        assert found.tokens_per_param.interval is not None


def test_there_is_an_optimum_with_interval_at_every_budget(skills: Skills) -> None:
    assert skills.budgets_flops == pytest.approx(BUDGETS)
    for skill, law in zip(skills.columns, (CODE, FACTS)):
        rows = [p for p in skill.at_budgets if p.approach == "isoflop"]
        assert [p.compute_flops for p in rows] == pytest.approx(BUDGETS)
        for p in rows:
            assert p.params_opt.estimate == pytest.approx(law.params_opt(p.compute_flops), rel=0.15)
            assert p.params_opt.interval is not None


def test_the_columns_are_reported_to_differ_by_the_right_factor(skills: Skills) -> None:
    truth = CODE.params_opt(1e19) / FACTS.params_opt(1e19)
    assert truth < 0.2
    ratios = {r.approach: r for r in skills.ratios}
    for approach in ("isoflop", "parametric"):
        r = ratios[approach]
        assert r.columns == COLUMNS
        assert r.ratio == pytest.approx(truth, rel=0.2)
        assert r.interval is not None
        assert r.interval.lo < truth < r.interval.hi
        assert r.differ


def test_equal_columns_are_not_reported_to_differ(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    again = table(seed=1)
    table().assign(other=again["facts"]).to_csv(path, index=False)
    settings = replace(QUICK, metrics=("facts", "other"))
    found = skills_of(analyze(read_observations(path, settings), settings))
    assert all(r.differ is False for r in found.ratios if r.approach == "isoflop")


def test_a_columns_optimum_is_that_of_the_column_analyzed_alone(skills: Skills, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table().to_csv(path, index=False)
    alone = analyze(read_observations(path, s := replace(QUICK, metric="facts")), s)
    for one, two in zip(alone.estimates, skills.columns[1].estimates):
        assert one.status == two.status
        if one.frontier is not None and two.frontier is not None:
            assert two.frontier.params.exponent == pytest.approx(one.frontier.params.exponent, rel=1e-9)


def test_the_skills_are_in_analysis_json(analysis: Analysis) -> None:
    schema = json.loads(
        resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text("utf-8")
    )
    data = json.loads(json.dumps(analysis.to_json_dict("x"), allow_nan=False))
    jsonschema.validate(data, schema)
    assert [c["column"] for c in data["skills"]["columns"]] == list(COLUMNS)
    rows = data["skills"]["columns"][0]["at_budgets"]
    assert {r["approach"] for r in rows} >= {"isoflop", "parametric"}
    assert all(r["tokens_per_param"]["interval"] for r in rows)
    assert len(data["skills"]["params_opt_ratios"]) >= 2


def test_without_metrics_there_is_no_finding() -> None:
    t = table()
    obs = Observations.from_arrays(n_params=t["params"], n_tokens=t["tokens"], loss_nats=t["loss"])
    analysis = analyze(obs, QUICK)
    assert analysis.finding("skills") is None
    assert analysis.to_json_dict()["skills"] is None


def test_cells_without_a_value_are_left_out_and_counted(tmp_path: Path) -> None:
    t = table().astype({"facts": object})
    t.loc[[3, 4], "facts"] = "n/a"
    t.loc[5, "facts"] = -1
    t["empty"] = np.nan
    path = tmp_path / "t.csv"
    t.to_csv(path, index=False)
    settings = replace(QUICK, metrics=("facts", "empty"))
    found = analyze(read_observations(path, settings), settings)
    assert found.observations.n_points == len(t)  # the loss itself is whole
    facts, empty = skills_of(found).columns
    assert (facts.n_points, facts.n_left_out) == (len(t) - 3, 3)
    assert empty.message is not None
    assert "0 row(s)" in empty.message
    assert empty.estimates == ()
    json.dumps(found.to_json_dict("x"), allow_nan=False)


def test_curves_of_a_column_are_its_own(tmp_path: Path) -> None:
    """Several rows a run: the envelope of a column reads that column's curve."""
    rows = []
    for i, n in enumerate(np.geomspace(1e6, 1e8, 8)):
        for d in np.geomspace(1e7, 3e9, 40):
            rows.append((f"r{i}", n, d, CODE.loss_nats(n, d), FACTS.loss_nats(n, d)))
    path = tmp_path / "t.parquet"
    pd.DataFrame(rows, columns=["run_id", "params", "tokens", "loss", "facts"]).to_parquet(path)
    settings = replace(QUICK, points="final", metrics=("facts",), bootstrap=BootstrapSettings(resamples=0))
    analysis = analyze(read_observations(path, settings), settings)
    envelope = skills_of(analysis).columns[0].estimates[0]
    assert envelope.frontier is not None
    assert float(envelope.frontier.params(1e17)) == pytest.approx(FACTS.params_opt(1e17), rel=0.1)


def test_without_a_loss_column_the_first_metric_stands_for_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table().drop(columns="loss").to_csv(path, index=False)
    obs = read_observations(path, replace(QUICK, metrics=COLUMNS))
    assert any("eval/code (nats) is used instead" in w for w in obs.warnings)


def test_an_unknown_column_is_named_with_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table().to_csv(path, index=False)
    with pytest.raises(UserError, match=r"metrics=fact: t\.csv has no such column.*metrics=facts"):
        read_observations(path, replace(QUICK, metrics=("fact",)))
    obs = read_observations(path, QUICK)
    with pytest.raises(UserError, match="metrics"):
        column_of(obs, "fact")


# -- laws compared


def compared(noise: float, laws: tuple[str, ...]) -> Analysis:
    t = table(noise)
    obs = Observations.from_arrays(n_params=t["params"], n_tokens=t["tokens"], loss_nats=t["facts"])
    settings = replace(QUICK, compare_laws=laws, bootstrap=BootstrapSettings(resamples=0))
    return analyze(obs, settings)


def test_the_law_that_made_the_data_predicts_best() -> None:
    analysis = compared(0.002, ("kaplan_nd", "power_c"))
    found = law_comparison.compare(analysis.points, analysis.settings)
    assert (
        next(s.law.name for s in found.scores) == "chinchilla"
    )  # the law of the analysis is always among them
    assert {s.law.name for s in found.scores} == {"chinchilla", "kaplan_nd", "power_c"}
    best, worst = found.scores[0], found.scores[-1]
    assert best.cross_validation is not None
    assert best.cross_validation.mean_abs < 0.004
    assert best.extrapolation is not None
    assert worst.excess is not None
    assert worst.excess > 2 * (worst.excess_standard_error or np.inf)


def test_the_comparison_is_in_analysis_json_including_laws_that_lack_a_column() -> None:
    schema = json.loads(
        resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text("utf-8")
    )
    data = json.loads(json.dumps(compared(0.002, ("all",)).to_json_dict("x"), allow_nan=False))
    jsonschema.validate(data, schema)
    laws = {row["law"]: row for row in data["law_comparison"]["laws"]}
    missing = [row for row in laws.values() if row["status"] == "not_applicable"]
    assert any("unique_tokens" in row["message"] for row in missing)
    assert laws["chinchilla"]["cross_validation"]["n_points"] == len(table())


def test_a_last_budget_with_most_of_the_runs_is_still_predicted_from_the_others() -> None:
    t = table()
    t = pd.concat([t, *[t[t["flops"] == t["flops"].max()]] * 5])
    obs = Observations.from_arrays(
        n_params=t["params"], n_tokens=t["tokens"], loss_nats=t["facts"], compute_flops=t["flops"]
    )
    settings = replace(QUICK, compare_laws=("kaplan_nd",), bootstrap=BootstrapSettings(resamples=0))
    found = law_comparison.compare(obs, settings)
    assert found.threshold_flops == pytest.approx(BUDGETS[-2])
    best = found.scores[0].extrapolation
    assert best is not None
    assert best.n_points == 6 * 15


def test_an_unknown_law_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match="compare_laws='chinchila'"):
        AnalysisSettings(compare_laws=("chinchila",))


# -- as a user sees it


def test_the_summary_shows_skills_and_laws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scaling_lab.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    table().to_csv("t.csv", index=False)
    common = ["analyze", "runs=t.csv", "bootstrap.resamples=60", "sensitivity=false", "backtest=false"]
    assert main([*common, "metrics=[eval/code (nats),facts]", "compare_laws=kaplan_nd"]) == 0
    out = capsys.readouterr().out
    for part in ("Optima per skill", "eval/code (nats)", "facts", "differ", "kaplan_nd", "left out"):
        assert part in out
    assert main([*common, "compare_laws=chinchila"]) == 2
    assert "compare_laws" in capsys.readouterr().err
