"""Tests of the report: the page shows the records, changes when they change, and needs no external files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.synthetic import QUICKSTART_LAW, diverged, plan_of, synthetic_records
from scaling_lab.analysis.analysis import Analysis, analyze, observations_of_sweep
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import BudgetStatus, FitStatus
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.record import RunRecord
from scaling_lab.reporting import captions, write_report
from scaling_lab.reporting.page import ReportOptions, banner

SETTINGS = AnalysisSettings(bootstrap=BootstrapSettings(resamples=40))
# For tests of other parts.
LIGHT = AnalysisSettings(bootstrap=BootstrapSettings(resamples=30), sensitivity=False, backtest=False)
MADE_ON = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
FIGURES = {
    "loss_vs_flops", "isoflop_valleys", "frontier_scaling", "parametric_contour", "residuals", "backtest",
    "sensitivity", "training_curves",
}  # fmt: skip
# Elements that have no closing tag in HTML.
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The parsed page: elements, text, tables, ids and references. Fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag == "table":
            self._rows, self._caption = [], ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1:] == [tag], f"</{tag}> closes {self._open[-1:]} at {self.getpos()}"
        self._open.pop()
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.texts.append(data)
        if "caption" in self._open:
            self._caption += data
        elif self._rows and self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def table(self, start: str) -> list[list[str]]:
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))


def make(
    records: list[RunRecord], folder: Path, settings: AnalysisSettings = LIGHT, **options: object
) -> tuple[Analysis, Page]:
    analysis = analyze(observations_of_sweep(records), settings)
    path = write_report(analysis, records, folder, ReportOptions(made_on=MADE_ON, **options))  # type: ignore[arg-type]
    return analysis, Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return synthetic_records(curve_points=60)


@pytest.fixture(scope="module")
def made(records: list[RunRecord], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Analysis, Page]:
    folder = tmp_path_factory.mktemp("report")
    (folder / "notes.txt").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "mine.svg").write_text("mine too")
    analysis, page = make(
        records, folder, SETTINGS, plan=plan_of(records), command="scaling-lab analyze sweep=synthetic"
    )
    return folder, analysis, page


def test_page_needs_nothing_from_outside(made: tuple[Path, Analysis, Page]) -> None:
    folder, _, page = made
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img", "image", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                citation = tag == "a" and value.startswith("https://arxiv.org/abs/")
                assert citation or value.startswith("#"), f"{tag} {name}={value}"
    css = (folder / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "@import" not in css
    assert "url(" not in css


def test_every_figure_is_there_named_and_described(made: tuple[Path, Analysis, Page]) -> None:
    folder, _, page = made
    pictures = [a for tag, a in page.elements if tag == "svg"]
    assert {a["aria-labelledby"].removesuffix("-alt") for a in pictures} == FIGURES
    assert all(a["role"] == "img" for a in pictures)
    html = (folder / "report.html").read_text()
    for name in FIGURES:
        alt = re.search(rf'<title id="{name}-alt">([^<]+)</title>', html)
        assert alt is not None
        assert len(alt[1]) > 30
        assert (folder / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sum(tag == "figcaption" for tag, _ in page.elements) == len(FIGURES)
    sizes = [len(s) for s in re.findall(r"<svg.*?</svg>", html, flags=re.S)]
    assert max(sizes) < 120_000


def test_ids_are_unique_and_every_inner_reference_has_its_target(made: tuple[Path, Analysis, Page]) -> None:
    folder, _, page = made
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    html = (folder / "report.html").read_text()
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert targets <= set(ids)


def test_other_files_are_left_alone_and_none_is_left_over(made: tuple[Path, Analysis, Page]) -> None:
    folder, _, _ = made
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "figures" / "mine.svg").read_text() == "mine too"
    names = {p.name for p in folder.iterdir()} | {p.name for p in (folder / "figures").iterdir()}
    expected = {"notes.txt", "mine.svg", "figures", "report.html", "analysis.json"}
    assert names == expected | {f"{n}.{e}" for n in FIGURES for e in ("svg", "png")}


def test_page_and_json_say_the_same_numbers(made: tuple[Path, Analysis, Page]) -> None:
    folder, analysis, page = made
    data = json.loads((folder / "analysis.json").read_text())
    assert data["command"] == "scaling-lab analyze sweep=synthetic"
    rows = page.table("How optimal parameters")
    assert len(data["estimates"]) == 3
    for row, estimate in zip(rows[1:4], data["estimates"]):
        assert row[1] == f"{estimate['params_exponent']:.3f}"
        assert row[3] == f"{estimate['tokens_exponent']:.3f}"
        lo, hi = estimate["interval"]["params_exponent"]
        assert row[2] == f"{lo:.3f} to {hi:.3f}"
        assert row[5] == estimate["status"]
    law = {r[0]: r[1:] for r in page.table("Parameters of the fitted law")[1:]}
    parametric = data["estimates"][2]
    assert float(law["E"][0]) == pytest.approx(parametric["parameters"]["E"], rel=1e-3)
    assert float(law["α"][0]) == pytest.approx(parametric["parameters"]["alpha"], rel=1e-3)
    assert float(law["E"][1]) == pytest.approx(parametric["standard_errors"]["E"], rel=0.06)
    budgets = page.table("The floor of each")
    assert [r[5] for r in budgets[1:]] == [f"{b['loss_opt']:.4f}" for b in data["estimates"][1]["budgets"]]
    assert (
        f"C{data['estimates'][1]['params_exponent']:.2f}" in page.text
    )  # the headline, with a raised exponent
    assert analysis.agreement.message in page.text


def test_the_headline_is_the_truth_behind_the_records(made: tuple[Path, Analysis, Page]) -> None:
    _, analysis, page = made
    quoted = captions.headline_estimate(analysis.to_json_dict())
    assert quoted is not None
    assert quoted["approach"] == "isoflop"
    assert quoted["params_exponent"] == pytest.approx(QUICKSTART_LAW.params_exponent, abs=0.03)
    assert page.text.count("Kaplan et al. 2020") >= 2


def test_published_rows_are_the_papers_own(made: tuple[Path, Analysis, Page]) -> None:
    rows = {r[0]: (r[1], r[3]) for r in made[2].table("How optimal parameters")[1:]}
    assert rows["Kaplan et al. 2020"] == ("0.73", "0.27")
    assert [rows[f"Chinchilla, approach {i}"] for i in (1, 2, 3)] == [
        ("0.50", "0.50"),
        ("0.49", "0.51"),
        ("0.46", "0.54"),
    ]


def test_table_of_runs_is_the_records(made: tuple[Path, Analysis, Page], records: list[RunRecord]) -> None:
    rows = {r[0]: r for r in made[2].table("Every run")[1:]}
    assert set(rows) == {r.run_id for r in records}
    for r in records:
        row = rows[r.run_id]
        assert row[2:4] == [str(r.spec.shape.width), str(r.spec.shape.depth)]
        assert row[6] == f"{r.spec.train_tokens / r.spec.n_params():.3g}"
        assert row[8] == f"{r.spec.optimizer.peak_lr:.3g}"
        assert row[9] == f"{r.final_val_loss_nats:.4f} ± {r.final_val_loss_sem_nats:.4f}"
        assert row[12] == f"{r.wall_time_s:.3g} s"


def test_a_changed_record_changes_the_page(
    made: tuple[Path, Analysis, Page], records: list[RunRecord], tmp_path: Path
) -> None:
    """The loss, the exponents, the figures and the environment all come from the records."""
    before_folder, before, before_page = made
    last = records[-1]
    assert last.final_val_loss_nats is not None
    curve = (*last.curve[:-1], replace(last.curve[-1], val_loss_nats=last.final_val_loss_nats - 0.05))
    environment = replace(last.environment, device_name="another machine")
    other = replace(last, final_val_loss_nats=last.final_val_loss_nats - 0.05, curve=curve, environment=environment,
                    wall_time_s=12345.0, metrics={"bits_per_byte": 1.23456})  # fmt: skip
    after, page = make([*records[:-1], other], tmp_path)
    shown = f"{other.final_val_loss_nats:.4f} ± "
    assert shown in page.text
    assert shown not in before_page.text
    assert "another machine" in page.text
    assert "1.23e+04 s" in page.text
    assert next(row for row in page.table("Every run") if row[0] == last.run_id)[10] == "1.2346"
    old, new = before.estimate("isoflop").frontier, after.estimate("isoflop").frontier
    assert old is not None
    assert new is not None
    assert f"{old.params.exponent:.3f}" != f"{new.params.exponent:.3f}"
    assert page.table("How optimal parameters")[2][1] == f"{new.params.exponent:.3f}"
    assert page.table("Parameters of the fitted law") != before_page.table("Parameters of the fitted law")
    assert json.loads((tmp_path / "analysis.json").read_text()) != json.loads(
        (before_folder / "analysis.json").read_text()
    )
    assert page.table("The floor of each")[3] != before_page.table("The floor of each")[3]
    for name in ("loss_vs_flops", "isoflop_valleys", "frontier_scaling", "residuals"):
        figure = f"figures/{name}.svg"
        assert (tmp_path / figure).read_text() != (before_folder / figure).read_text()


def test_pages_written_twice_differ_only_in_their_date(
    made: tuple[Path, Analysis, Page], records: list[RunRecord], tmp_path: Path
) -> None:
    folder, analysis, _ = made
    options = ReportOptions(
        made_on=datetime(2027, 5, 6, tzinfo=UTC),
        plan=plan_of(records),
        command="scaling-lab analyze sweep=synthetic",
    )
    write_report(analysis, records, tmp_path, options)
    one, two = ((f / "report.html").read_text().splitlines() for f in (folder, tmp_path))
    different = [(a, b) for a, b in zip(one, two, strict=True) if a != b]
    assert len(different) == 1
    assert "Made on 2 January 2026" in different[0][0]
    assert "Made on 6 May 2027" in different[0][1]
    for name in FIGURES:
        for ending in ("svg", "png"):
            file = f"figures/{name}.{ending}"
            assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_the_page_of_an_unfinished_sweep_shows_its_progress(records: list[RunRecord], tmp_path: Path) -> None:
    some = [*records[:5], diverged(records[5]), *records[6:20]]
    _, page = make(some, tmp_path, plan=plan_of(records))
    assert f"20 of {len(records)} runs are done" in page.text
    assert "1 run(s) diverged or failed" in page.text
    rows = {r[0]: r for r in page.table("Every run")[1:]}
    assert rows[records[-1].run_id][11] == "not done yet"
    assert rows[records[5].run_id][11].startswith("diverged: the training loss was not finite at step")
    assert [r[0] for r in page.table("Left out")[1:]] == [records[5].run_id]


def test_the_page_of_a_finished_sweep_has_no_banner(records: list[RunRecord]) -> None:
    assert banner(records, plan_of(records)) is None
    assert banner(records, None) is None


def test_a_sweep_with_too_few_runs_to_analyze_still_has_a_page(
    records: list[RunRecord], tmp_path: Path
) -> None:
    options = ReportOptions(plan=plan_of(records), problem="only 2 runs are done", made_on=MADE_ON)
    page = Page(write_report(None, records[:2], tmp_path, options).read_text())
    assert "only 2 runs are done" in page.text
    assert f"2 of {len(records)} runs are done" in page.text
    assert len(page.table("Every run")) == 1 + len(records)
    assert not (tmp_path / "analysis.json").exists()
    assert sum(tag == "svg" for tag, _ in page.elements) == 1


def test_records_that_cannot_be_read_are_named(records: list[RunRecord], tmp_path: Path) -> None:
    options = ReportOptions(unreadable=[("gpt-broken", "record.json cannot be read")])
    page = Page(write_report(None, records[:2], tmp_path, options).read_text())
    assert page.table("Left out")[1] == ["gpt-broken", "–", "record.json cannot be read"]


def test_a_sweep_without_runs_still_has_a_page(records: list[RunRecord], tmp_path: Path) -> None:
    page = Page(write_report(None, [], tmp_path, ReportOptions(plan=plan_of(records))).read_text())
    assert f"0 of {len(records)} runs are done" in page.text


def test_the_page_of_a_plain_table_names_the_missing_parts(records: list[RunRecord], tmp_path: Path) -> None:
    o = observations_of_sweep(records)
    table = Observations.from_arrays(
        n_params=o.n_params, n_tokens=o.n_tokens, loss_nats=o.loss_nats, run_id=o.run_id
    )
    analysis = analyze(table, LIGHT)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "training_curves.svg").write_text("of an older report")
    page = Page(write_report(analysis, [], tmp_path, ReportOptions(title="a table")).read_text())
    assert "The runs in training: not drawn." in page.text
    assert not (tmp_path / "figures" / "training_curves.svg").exists()
    assert "does not record where its runs were trained" in page.text
    assert "cannot be applied to these data" in page.text  # the envelope: no curves
    assert len(page.table("Every run")) == 1 + len(records)
    assert page.table("How optimal parameters")[1][1] == "–"


def test_an_answer_that_did_not_converge_is_flagged_first(made: tuple[Path, Analysis, Page]) -> None:
    _, analysis, _ = made
    isoflop, parametric = analysis.estimate("isoflop"), analysis.estimate("parametric")
    budget = replace(isoflop.budgets[0], status=BudgetStatus.EDGE, message="at the edge")
    doubtful = replace(
        analysis,
        estimates=(
            analysis.estimates[0],
            replace(
                isoflop,
                status=FitStatus.NOT_IDENTIFIED,
                message="too flat",
                budgets=(budget, *isoflop.budgets[1:]),
            ),
            replace(parametric, status=FitStatus.AT_BOUND, message="E ended at 0"),
        ),
        agreement=replace(
            analysis.agreement, agree=False, message="isoflop and parametric disagree on everything"
        ),
    )
    said = captions.caveats(doubtful.to_json_dict())
    assert any("too flat" in c for c in said)
    assert any("a parameter ended at its bound. E ended at 0" in c for c in said)
    assert any(c.startswith("1 budget(s) show no usable minimum: 1e11 (edge)") for c in said)
    assert any("disagree on everything" in c for c in said)
    quoted = captions.headline_estimate(doubtful.to_json_dict())
    assert quoted is not None
    assert quoted["approach"] == "envelope"  # the only one that converged
    assert any(c.startswith("The headline quotes the envelope approach") for c in said)


def test_no_frontier_at_all_gives_no_headline_number(made: tuple[Path, Analysis, Page]) -> None:
    _, analysis, _ = made
    nothing = replace(
        analysis,
        estimates=tuple(
            replace(e, frontier=None, status=FitStatus.NOT_APPLICABLE) for e in analysis.estimates
        ),
        grid_bias=None,
    )
    assert (
        captions.headline(nothing.to_json_dict())
        == "These runs do not yet show how the optimal model size grows with compute."
    )
    assert not re.search(r"\d", captions.plain_meaning(nothing.to_json_dict()))


@pytest.mark.parametrize("exponent", [412.0, -412.0, float("nan"), 1e300])
def test_an_absurd_exponent_is_described_in_words(made: tuple[Path, Analysis, Page], exponent: float) -> None:
    _, analysis, _ = made

    def wild(estimate):
        params = replace(estimate.frontier.params, exponent=exponent)
        return replace(estimate, frontier=replace(estimate.frontier, params=params))

    beyond = replace(analysis, estimates=tuple(wild(e) for e in analysis.estimates))
    said = captions.plain_meaning(beyond.to_json_dict())
    assert "do not show how the best size grows" in said
    assert "times larger" in captions.plain_meaning(analysis.to_json_dict())


def test_user_text_cannot_become_markup(records: list[RunRecord], tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>&amp;'
    options = ReportOptions(title=nasty, command=nasty, problem=nasty, next_commands=[(nasty, nasty)])
    page = Page(write_report(None, records[:2], tmp_path, options).read_text())
    assert not any(tag == "script" for tag, _ in page.elements)
    assert nasty in page.text


def test_the_page_has_everything_that_a_phone_needs(made: tuple[Path, Analysis, Page]) -> None:
    metas = {a.get("name"): a.get("content") for tag, a in made[2].elements if tag == "meta"}
    assert "width=device-width" in (metas["viewport"] or "")
    assert metas["color-scheme"] == "light dark"
    css = (made[0] / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    for needed in ("prefers-color-scheme: dark", "@media print", "max-width: 34rem"):
        assert needed in css
