"""Tests of findings: one form for every study, found by scanning, the same from analysis.json as in the process."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import yaml

from helpers.synthetic import QUICKSTART_LAW, synthetic_records
from scaling_lab.analysis import studies
from scaling_lab.analysis.analysis import (
    Analysis,
    AnalysisSettings,
    analyze,
    find_in_records,
    observations_of_sweep,
)
from scaling_lab.analysis.analysis_json import findings_of, read_document
from scaling_lab.analysis.data.sweep_records import SweepRecords
from scaling_lab.analysis.finding import (
    Axis,
    Chart,
    Column,
    Finding,
    FindingStatus,
    FindingTable,
    KeyQuantity,
    Panel,
    PublishedValue,
    Series,
)
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.cli.main import main
from scaling_lab.core.errors import STRICT_VARIABLE, UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.core.storage.store import RunStore, curve_line
from scaling_lab.reporting import studies as drawings
from scaling_lab.reporting.page import ReportOptions, report_from_json, write_report
from scaling_lab.tracking.wandb.study import finding_numbers, finding_tables

ROOT = Path(__file__).resolve().parent.parent
LIGHT = AnalysisSettings(
    bootstrap=BootstrapSettings(resamples=40),
    sensitivity=False,
    backtest=False,
    metrics=("loss", "eval.code"),
    compare_laws=("kaplan_nd",),
)
SCHEMA = json.loads(
    resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text("utf-8")
)


def at_rate(record: RunRecord, multiplier: float) -> RunRecord:
    """The record's run at another learning rate, best at 1.5 times the sweep's."""
    rise = 0.03 * (np.log(multiplier / 1.5) ** 2 - np.log(1.5) ** 2)
    optimizer = OptimizerSpec(peak_lr=record.spec.optimizer.peak_lr * multiplier)
    spec = replace(record.spec, optimizer=optimizer, role="lr_sweep")
    loss = float(record.final_val_loss_nats or 0) + float(rise)
    return replace(record, run_id=spec.run_id(), spec=spec, final_val_loss_nats=loss)


@pytest.fixture(scope="module")
def records() -> SweepRecords:
    """A sweep whose floor is known, with a second loss and a learning-rate sweep of its smallest and largest sizes."""
    law = [
        replace(
            r, val_floor_nats=QUICKSTART_LAW.E, metrics={"eval.code": 0.8 * float(r.final_val_loss_nats or 0)}
        )
        for r in synthetic_records(curve_points=20)
    ]
    by_budget: dict[float, list[RunRecord]] = {}
    for r in law:
        by_budget.setdefault(r.spec.budget_flops, []).append(r)
    ends = [group[i] for group in by_budget.values() for i in (0, -1)]
    return SweepRecords(tuple(law), tuple(at_rate(r, m) for r in ends for m in (0.5, 2.0, 4.0)))


@pytest.fixture(scope="module")
def analysis(records: SweepRecords) -> Analysis:
    return analyze(observations_of_sweep(records.law, LIGHT), LIGHT, records)


# -- the form
def a_finding(**changes: object) -> Finding:
    chart = Chart(
        "toy", "Toy", "How to read it.", "In words.",
        (Panel(Axis("x", log=True), Axis("y"), (Series("points", (1.0, 2.0), (3.0, 4.0)),)),),
    )  # fmt: skip
    table = FindingTable(
        "t", "A table", (Column("name"), Column("value", ".2f")), (("a", (1.0, 0.5, None)), ("b", 2))
    )
    quantity = KeyQuantity("x", 1.0, (0.5, None), "nats", ".2f", (PublishedValue(0.9, "A et al. 2020"),))
    made = Finding(
        "toy", "Toy", "Is it so?", "It is 1.", level=0.9, quantities=(quantity,), tables=(table,), chart=chart
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_arrays_become_plain_values_and_what_is_not_finite_none() -> None:
    series = Series("points", np.array([1.0, np.nan]), [np.float64(2.0), np.inf])  # type: ignore[arg-type]
    made = a_finding(
        quantities=[KeyQuantity("x", np.float32(0.5), (np.nan, 1))],  # type: ignore[arg-type]
        chart=Chart("c", "t", "c", "a", [Panel(Axis("x"), Axis("y"), [series])]),  # type: ignore[arg-type]
    )
    assert made.quantities == (KeyQuantity("x", 0.5, (None, 1)),)
    assert made.chart is not None
    assert made.chart.panels[0].series[0].x == (1.0, None)
    assert made.chart.panels[0].series[0].y == (2.0, None)
    with pytest.raises(TypeError, match="plain values, not set"):
        a_finding(answer={"a"})


def test_a_table_or_series_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="study toy: a row of the table 'u' has too many or too few cells"):
        a_finding(tables=(FindingTable("u", "", (Column("a"),), ((1, 2),)),))
    uneven = Chart("c", "t", "c", "a", (Panel(Axis("x"), Axis("y"), (Series("line", (1.0,), (1.0, 2.0)),)),))
    with pytest.raises(ValueError, match="differ in number"):
        a_finding(chart=uneven)


def test_cells_are_formatted_by_their_column() -> None:
    count, text = Column("N", "count"), Column("why")
    assert [count.text(c) for c in (17_000, None, True, "none", (1e6, 2e5, None))] == [
        "17k", "–", "yes", "none", "1M (200k to unbounded)",
    ]  # fmt: skip
    assert Column("loss", ".4f", "nats").title == "loss, nats"
    assert text.text("as it is") == "as it is"


def test_a_finding_comes_back_from_json_as_it_was(analysis: Analysis) -> None:
    names = {f.name for f in analysis.findings}
    # A study added later may answer here as well; of those named, exactly the first five do.
    assert names >= {"known_floor", "law_comparison", "profile", "skills", "tuning"}
    assert not names & {"fact_exponents", "lr_transfer"}
    data = json.loads(json.dumps(analysis.to_json_dict(), allow_nan=False))
    jsonschema.validate(data, SCHEMA)
    assert findings_of(data) == analysis.findings
    one = a_finding()
    assert Finding.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one
    jsonschema.validate({**data, "findings": [one.to_json()]}, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "findings": [{**one.to_json(), "answer": None}]}, SCHEMA)


def test_damaged_findings_are_one_clear_error(tmp_path: Path) -> None:
    good = a_finding().to_json()
    with pytest.raises(UserError, match="Finding has no field colour"):
        findings_of({"findings": [{**good, "colour": 1}]})
    with pytest.raises(UserError, match="wanted an object"):
        findings_of({"findings": ["text"]})
    with pytest.raises(UserError, match="cannot be read"):
        findings_of({"findings": [{k: v for k, v in good.items() if k != "answer"}]})
    assert findings_of({"estimates": []}) == ()  # version 1
    path = tmp_path / "analysis.json"
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "is not an analysis.json"),
        (json.dumps({"schema_version": 99, "estimates": []}), "schema_version 99"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_document(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_document(tmp_path / "missing.json")


# -- from analysis.json alone
def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.S)
    assert found is not None, name
    return found.group()


def test_a_report_from_analysis_json_alone_has_the_same_findings_numbers_and_figures(
    analysis: Analysis, records: SweepRecords, tmp_path: Path
) -> None:
    options = ReportOptions(command="scaling-lab analyze sweep=synthetic")
    here = write_report(analysis, records.law, tmp_path / "here", options).read_text()
    data = tmp_path / "here" / "analysis.json"
    alone = report_from_json(data, tmp_path / "alone").read_text()
    assert section(alone, "findings") == section(here, "findings")
    assert section(alone, "numbers") == section(here, "numbers")
    for finding in analysis.findings:
        assert finding.answer.split(" C^")[0] in alone.replace("&#39;", "'").replace("&amp;", "&")
        if finding.chart is None:
            continue
        for ending in ("svg", "png"):
            name = f"figures/{finding.chart.name}.{ending}"
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    tables = [re.findall(r"<table>.*?</table>", page, re.S) for page in (here, alone)]
    # Of the tables the runs' own is missing, and nothing else.
    assert [t for t in tables[0] if t not in tables[1]] == [t for t in tables[0] if "Every run" in t]
    assert "made from analysis.json alone" in alone


def test_a_report_is_made_of_an_analysis_json_of_version_1(analysis: Analysis, tmp_path: Path) -> None:
    old = analysis.to_json_dict() | {"schema_version": 1}
    for key in ("findings", "problem", "choices"):
        del old[key]
    for key in ("points_compute_range_flops", "total_flops"):
        del old["observations"][key]
    for estimate in old["estimates"]:
        del estimate["fit"]
    path = tmp_path / "analysis.json"
    path.write_text(json.dumps(old))
    page = report_from_json(path, tmp_path / "page").read_text()
    new = write_report(analysis, (), tmp_path / "new").read_text()
    for table in (
        "How optimal parameters N",
        "The best run at larger budgets",
        "The floor of each IsoFLOP valley",
    ):
        (here,), (there,) = (
            re.findall(rf"<table>\s*<caption>{table}.*?</table>", text, re.S) for text in (page, new)
        )
        assert here == there
    assert 'id="findings"' not in page


def test_the_report_command_takes_an_analysis_json(
    analysis: Analysis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "analysis.json").write_text(json.dumps(analysis.to_json_dict()))
    assert main(["report", f"analysis={folder / 'analysis.json'}"]) == 0
    assert "Checking LR tuning" in (folder / "report.html").read_text()
    assert main(["report", f"analysis={folder / 'analysis.json'}", "sweep=x"]) == 2
    assert ", not both." in capsys.readouterr().err
    assert main(["report", f"analysis={folder / 'nothing.json'}"]) == 2
    assert "nothing.json cannot be read" in capsys.readouterr().err


def test_fields_of_version_1_are_where_they_were(analysis: Analysis) -> None:
    data = analysis.to_json_dict()
    for key in ("skills", "law_comparison", "tuning", "known_floor"):
        assert data[key] is not None
    parametric = next(e for e in data["estimates"] if e["approach"] == "parametric")
    assert set(parametric["profile"]["intervals"]) >= {"E", "A", "B", "alpha", "beta"}
    tuning = analysis.finding("tuning")
    assert tuning is not None
    excess = [c["debt_nats"] for c in data["tuning"]["cells"]]
    assert [row[4][0] for row in tuning.table("cells").rows] == excess  # type: ignore[index]
    assert tuning.quantity("largest excess loss").estimate == max(excess)
    floor = analysis.finding("known_floor")
    assert floor is not None
    assert floor.quantity("fitted E").estimate == data["known_floor"]["fitted_nats"]


# -- finding studies
def test_every_study_states_its_question_and_needs() -> None:
    assert set(studies.study_names()) >= {
        "fact_exponents", "known_floor", "law_comparison", "lr_transfer", "profile", "skills", "tuning",
    }  # fmt: skip
    for name in studies.study_names():
        study = studies.get_study(name)
        assert study.QUESTION.endswith("?")
        assert study.NEEDS
        assert not study.NEEDS.endswith(".")
    for path in (ROOT / "scaling_lab" / "reporting" / "studies").glob("*.py"):
        assert path.stem == "__init__" or path.stem in studies.study_names(), f"{path.name} draws no study"


def test_one_study_alone_or_none(records: SweepRecords) -> None:
    observations = observations_of_sweep(records.law, LIGHT)
    quick = replace(LIGHT, bootstrap=BootstrapSettings(resamples=0))
    assert [f.name for f in analyze(observations, replace(quick, study="known_floor"), records).findings] == [
        "known_floor"
    ]
    assert analyze(observations, replace(quick, study="none"), records).findings == ()
    with pytest.raises(UserError, match=r"study='tunning' is not known. Did you mean 'tuning'\? Choices: "):
        analyze(observations, replace(quick, study="tunning"), records)
    with pytest.raises(
        UserError, match="study=lr_transfer: its data are missing. It needs a sweep of design"
    ):
        analyze(observations, replace(quick, study="lr_transfer"), records)


def test_experiments_name_studies_that_exist_and_no_run_depends_on_it() -> None:
    from scaling_lab.cli.options.compose import compose_groups
    from scaling_lab.cli.options.configs import config_folders, default_groups
    from scaling_lab.cli.options.study import SweepOnly, sweep_settings

    named = {}
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        if (study := yaml.safe_load(path.read_text()).get("study")) is not None:
            named[path.stem] = study
            assert study in studies.study_names()
    assert named["known_entropy"] == "known_floor"
    groups = default_groups("sweep", config_folders(None))
    group = next(g for g in groups if g.package == "experiment")
    tree = compose_groups("sweep", {group: "known_entropy"}, config_folders(None))
    assert tree["study"] == "known_floor"
    without = {key: value for key, value in tree.items() if key != "study"}
    with_it, same = (sweep_settings(t, (SweepOnly,), device="cpu") for t in (tree, without))
    assert with_it == same
    with pytest.raises(UserError, match="study='known_flor' is not known. Did you mean 'known_floor'"):
        sweep_settings({**tree, "study": "known_flor"}, (SweepOnly,), device="cpu")


TOY = '''
"""A study of a test: how many runs there are."""

from scaling_lab.analysis.finding import Axis, Chart, Finding, KeyQuantity, Panel, PublishedValue, Series

QUESTION = "How many runs are there?"
NEEDS = "a hundred runs or one"


def find(given):
    n = len(given.records.all)
    if not n:
        return None
    if n > 1000:
        raise RuntimeError("too many for a toy")
    series = tuple(
        Series(kind, (1.0, 2.0, 3.0), y, (0.5, 1.5, 2.5), (1.5, 2.5, 3.5), label=kind)
        for kind, y in (("points", (1.0, 2.0, 3.0)), ("line", (3.0, 2.0, 1.0)), ("marked_line", (2.0, 2.0, 2.0)), ("band", ()))
    )
    return Finding(
        "toy_count", "Counting", QUESTION, f"There are {n} runs.",
        quantities=(KeyQuantity("runs", n, (n - 1, n + 1), form="d", published=(PublishedValue(7, "Nobody 1999"),)),),
        chart=Chart("toy_count", "A toy", "Toy caption.", "Toy alt.", (Panel(Axis("x"), Axis("y"), series),)),
        caveats=("It is a toy.",),
    )
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A study in one file, in a folder that is scanned like the package's own, and a folder for its figure's file."""
    analysis_files, drawing_files = tmp_path / "analysis_files", tmp_path / "drawing_files"
    for folder in (analysis_files, drawing_files):
        folder.mkdir()
    (analysis_files / "toy_count.py").write_text(TOY)
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(analysis_files)])
    monkeypatch.setattr(drawings, "__path__", [*drawings.__path__, str(drawing_files)])
    studies.studies_by_name.cache_clear()
    yield drawing_files
    studies.studies_by_name.cache_clear()


def write(store: RunStore, records: list[RunRecord]) -> None:
    for r in records:
        folder = store.run_folder(r.run_id)
        folder.mkdir(parents=True)
        (folder / "curve.jsonl").write_text("".join(curve_line(p) for p in r.curve))
        (folder / "record.json").write_text(dumps(r.to_dict()))


def test_a_new_study_is_one_file_and_shown_everywhere(
    toy: Path,
    tmp_path: Path,
    records: SweepRecords,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    write(RunStore(Path("results/s")), list(records.law))
    n = len(records.law)
    light = ["bootstrap.resamples=0", "sensitivity=false", "backtest=false", "profile=false"]
    assert main(["analyze", "sweep=s", *light]) == 0
    assert f"Counting: There are {n} runs." in capsys.readouterr().out
    report = Path("results/s/report")
    data = read_document(report / "analysis.json")
    jsonschema.validate(data, SCHEMA)
    found = next(f for f in findings_of(data) if f.name == "toy_count")
    assert found.quantity("runs").estimate == n
    page = report.joinpath("report.html").read_text()
    for part in (
        f"There are {n} runs.",
        "7 (Nobody 1999)",
        "Toy caption.",
        "It is a toy.",
        "How many runs are there?",
    ):
        assert part in page
    by_kind = (report / "figures" / "toy_count.svg").read_text()
    # `status` shows what the last report found, as text and as JSON.
    assert main(["status", "sweep=s"]) == 0
    assert f"Counting: There are {n} runs." in capsys.readouterr().out
    assert main(["status", "sweep=s", "--json"]) == 0
    assert [
        f["answer"] for f in json.loads(capsys.readouterr().out)["findings"] if f["name"] == "toy_count"
    ] == [found.answer]
    # With a file of its own it is drawn by that.
    (toy / "toy_count.py").write_text(
        textwrap.dedent(
            '''
            """The toy's figure."""
            def draw(finding, axes):
                (ax,) = axes
                ax.plot([0, 1], [0, finding.quantities[0].estimate])
            '''
        )
    )
    assert main(["analyze", "sweep=s", "study=toy_count", *light]) == 0
    assert "Counting" in capsys.readouterr().out
    assert [f.name for f in findings_of(read_document(report / "analysis.json"))] == ["toy_count"]
    assert (report / "figures" / "toy_count.svg").read_text() != by_kind
    # What an experiment is for comes first.
    write_report(None, records.law, "led", ReportOptions(findings=[a_finding(), found], study="toy_count"))
    page = Path("led/report.html").read_text()
    assert "<h1>Counting</h1>" in page
    assert page.index("finding-toy_count") < page.index('finding-toy"')


def test_wandb_gets_the_answers_the_tables_and_the_numbers() -> None:
    wandb = SimpleNamespace(Table=lambda columns, data, **options: (columns, data))
    tables = finding_tables(wandb, [a_finding()])
    assert tables["findings"][1] == [["toy", "Is it so?", "It is 1.", "answered", None]]
    assert tables["findings/toy/t"] == (["name", "value"], [["a", "1.00 (0.50 to unbounded)"], ["b", "2.00"]])
    assert finding_numbers([a_finding()]) == {
        "finding/toy/status": "answered",
        "finding/toy/x": 1.0,
        "finding/toy/x_low": 0.5,
        "finding/toy/x_high": None,
    }
    assert finding_tables(wandb, []) == {}


def test_a_study_that_fails_is_a_finding_and_takes_nothing_with_it(
    toy: Path, records: SweepRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = SweepRecords(records.law * 50)
    with pytest.raises(RuntimeError, match="too many for a toy"):
        find_in_records(many)
    monkeypatch.delenv(STRICT_VARIABLE)
    (found,) = (f for f in find_in_records(many) if f.status is FindingStatus.FAILED)
    assert (found.name, found.status) == ("toy_count", FindingStatus.FAILED)
    assert "RuntimeError: too many for a toy. This is a bug in scaling-lab" in str(found.reason)
    assert found.question == "How many runs are there?"
    with pytest.raises(
        UserError, match="study=toy_count: its data are missing. It needs a hundred runs or one"
    ):
        find_in_records(SweepRecords(), AnalysisSettings(study="toy_count"))
