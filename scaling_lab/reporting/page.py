"""The report on disk: report.html (self-contained), analysis.json and figures/, replaced one file at a time.

    write_report(analysis, records, folder)
    report_from_json("analysis.json", folder)

The page needs no network and no JavaScript. Its sentences and tables are made from analysis.json as plain data, and so are
the figures of findings: without the runs only their own figures and tables are missing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.analysis_json import document, findings_of, read_document
from scaling_lab.analysis.finding import Finding
from scaling_lab.analysis.text import GREEK, SHORT_APPROACH_NAMES
from scaling_lab.core.counts import Convention
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.reporting import captions, run_table, tables
from scaling_lab.reporting.captions import Document, estimate_of
from scaling_lab.reporting.figure_list import Drawn, ReportFigure, draw_figures, draw_finding_figures

REPORT_NAME = "report.html"
ANALYSIS_NAME = "analysis.json"
FIGURES_NAME = "figures"

REFERENCES = (
    ("Kaplan et al. 2020, Scaling Laws for Neural Language Models", "https://arxiv.org/abs/2001.08361"),
    (
        "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models",
        "https://arxiv.org/abs/2203.15556",
    ),
    ("Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt", "https://arxiv.org/abs/2404.10102"),
    (
        "Porian et al. 2024, Resolving Discrepancies in Compute-Optimal Scaling",
        "https://arxiv.org/abs/2406.19146",
    ),
)


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows in addition to its analysis and its records."""

    title: str | None = None
    """Default: the sweep's name, else "A table of runs"."""
    command: str = ""
    """The command that made it, for analysis.json and the page."""
    next_commands: Sequence[tuple[str, str]] = ()
    """(command, what it does). Default: what can follow, by what is there."""
    source: str | None = None
    """Of a table: its file's absolute path, for analysis.json."""
    plan: Plan | None = None
    """Of a sweep: which runs there should be; a banner says how many are done."""
    problem: str | None = None
    """Why there is no analysis, where there is none."""
    findings: Sequence[Finding] = ()
    """What studies found in the records, where there is no analysis; otherwise the analysis has them."""
    study: str | None = None
    """The study that the sweep was made for: its finding comes first."""
    unreadable: Sequence[tuple[str, str]] = ()
    """(run id, reason) of records that could not be read (the second value of `RunStore.load_records`)."""
    made_on: datetime | None = None
    """Default: now. The only thing in the page that differs from one writing to the next."""
    versions: dict[str, str] | None = None
    """For analysis.json; default: of this Python, numpy and scaling_lab."""


def write_report(
    analysis: Analysis | None,
    records: Sequence[RunRecord],
    folder: Path | str,
    options: ReportOptions | None = None,
) -> Path:
    """Write report.html, analysis.json and figures/*.svg, *.png into `folder`; returns the page's path.

    Files of an older report are replaced atomically, each by itself; nothing else in the folder is touched. Without an
    analysis (too few runs are done) the page says why and shows findings and runs; without either, analysis.json is
    not written.

    Args:
        analysis: from `scaling_lab.analysis.analysis.analyze`.
        records: the sweep's run records, with curves; empty for a plain table.
        folder: made if it does not exist.
    """
    o = options or ReportOptions()
    data = document_of(analysis, o)
    findings = tuple(o.findings) if analysis is None else analysis.findings
    folder = Path(folder)
    figures = draw_figures(analysis, records, findings)
    _write_figures(folder, figures)
    if analysis is not None or findings:
        write_atomic(folder / ANALYSIS_NAME, dumps(data))
    page = folder / REPORT_NAME
    runs = run_table.runs(analysis, records, o.plan)
    write_atomic(page, render(data, figures, o, records, runs))
    return page


def document_of(analysis: Analysis | None, options: ReportOptions) -> dict[str, Any]:
    """analysis.json as plain data, also of findings without an analysis."""
    o = options
    if analysis is not None:
        return analysis.to_json_dict(o.command, o.versions, o.source)
    problem = o.problem or "There are not yet enough completed runs."
    return document(
        command=o.command, versions=o.versions, source=o.source, findings=o.findings, problem=problem
    )


def report_from_json(path: Path | str, folder: Path | str, options: ReportOptions | None = None) -> Path:
    """Write report.html and figures/ from an analysis.json alone; returns the page's path.

    What needs the runs themselves is left out: their table, and the figures of the three approaches.

    Raises:
        UserError: the file is not an analysis.json that this version can read.
    """
    data = read_document(path)
    figures = draw_finding_figures(findings_of(data))
    folder = Path(folder)
    _write_figures(folder, figures)
    page = folder / REPORT_NAME
    o = options or ReportOptions(command=str(data.get("command", "")))
    write_atomic(page, render(data, figures, replace(o, title=o.title or _name_of(Path(path)))))
    return page


def _name_of(path: Path) -> str:
    """The sweep or table of an analysis.json, by its folder: results/SWEEP/report or results/tables/TABLE."""
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "report" else folder.name


def _write_figures(folder: Path, figures: Sequence[ReportFigure]) -> None:
    """Each figure as SVG and PNG; an older report's file of a figure that is not drawn now would show other data."""
    place = folder / FIGURES_NAME
    place.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        if isinstance(figure, Drawn):
            write_atomic(place / f"{figure.name}.svg", figure.svg, durable=False)
            _write_bytes(place / f"{figure.name}.png", figure.png)
        else:
            for ending in ("svg", "png"):
                (place / f"{figure.name}.{ending}").unlink(missing_ok=True)


def render(
    data: Document,
    figures: Sequence[ReportFigure],
    options: ReportOptions,
    records: Sequence[RunRecord] = (),
    runs: tables.TextTable | None = None,
) -> str:
    """The whole page as HTML text.

    Args:
        data: analysis.json.
        records, runs: of a sweep, and its table of runs; None where the page is made from analysis.json alone.
    """
    import jinja2
    from markupsafe import Markup

    package = resources.files("scaling_lab.reporting")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (package / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["formula"] = lambda text: Markup(_formula(str(text)))
    environment.filters["power"] = lambda text: Markup(_with_powers(str(text)))
    style = Markup((package / "page.css").read_text(encoding="utf-8"))
    by_name = {f.name: f for f in figures}
    context = _context(data, options, records) | {"runs": runs}
    return environment.get_template("page.html").render(
        style=style, figures=by_name, drawn=Drawn, safe=Markup, references=REFERENCES, **context
    )


def _context(data: Document, options: ReportOptions, records: Sequence[RunRecord]) -> dict[str, Any]:
    sweeps = sorted({r.spec.sweep for r in records})
    title = options.title or (", ".join(sweeps) if sweeps else "A table of runs")
    made_on = (options.made_on or datetime.now(UTC)).strftime("%d %B %Y, %H:%M %Z").lstrip("0")
    findings = ordered(findings_of(data), options.study)
    context: dict[str, Any] = {
        "title": title,
        "made_on": made_on,
        "command": options.command,
        "banner": banner(records, options.plan),
        "laws": bool(data["estimates"]),
        "problem": data.get("problem"),
        "findings": [FindingView(f) for f in findings],
        "lead": _lead(findings, options.study, bool(data["estimates"])),
        "environment": environment_rows(records),
        "plan_notes": [*options.plan.notes, *options.plan.rounding] if options.plan else [],
        "next_commands": options.next_commands or default_next_commands(data, sweeps),
        "from_records": bool(records),
        "dropped": tables.dropped(data, options.unreadable),
    }
    return context | _laws_context(data, records) if data["estimates"] else context


def _laws_context(data: Document, records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the sections of the three approaches show."""
    parametric = estimate_of(data, "parametric")
    names = SHORT_APPROACH_NAMES
    return {
        "headline": captions.headline(data),
        "meaning": captions.plain_meaning(data),
        "caveats": captions.caveats(data),
        "tiles": captions.key_numbers(data, records),
        "exponents": tables.exponents(data),
        "law": tables.law_parameters(data),
        "law_formula": (parametric.get("fit") or {}).get("formula") or "",
        "budgets": tables.budgets(data),
        "backtest": tables.backtest(data),
        "backtest_messages": [(names[t["approach"]], t["message"]) for t in data["backtest"]],
        "predictions": tables.predictions(data),
        "agreement": tables.agreement(data),
        "agreement_message": data["agreement"]["message"],
        "sensitivity": tables.sensitivity(data),
        "warnings": data["observations"]["warnings"],
        "diagnostics": [(names[e["approach"]], e["message"], e["diagnostics"]) for e in data["estimates"]],
        "choices": [(c["what"], c["which"]) for c in data.get("choices", ())],
    }


@dataclass(frozen=True)
class FindingView:
    """A finding as the page shows it."""

    finding: Finding

    @property
    def tables(self) -> list[tuple[str, tables.TextTable]]:
        return tables.finding_tables(self.finding)


def ordered(findings: Sequence[Finding], first: str | None) -> list[Finding]:
    """The findings with that of the study `first` before the others."""
    return sorted(findings, key=lambda finding: finding.name != first)


def _lead(findings: Sequence[Finding], study: str | None, laws: bool) -> Finding | None:
    """What the page begins with instead of the laws: the finding of the study that the sweep was made for."""
    if study is None and not laws:
        return next((f for f in findings if f.is_answered), None)
    return next((f for f in findings if f.name == study), None)


def banner(records: Sequence[RunRecord], plan: Plan | None) -> str | None:
    """How much of the sweep there is, where it is not all; None for a whole one or a table."""
    bad = [r for r in records if r.status in (RunStatus.DIVERGED, RunStatus.FAILED)]
    parts = []
    if plan is not None:
        have = {r.run_id for r in records if r.status is not RunStatus.INTERRUPTED}
        done = sum(p.run_id in have for p in plan.runs)
        if done < len(plan.runs):
            parts.append(
                f"{done} of {len(plan.runs)} runs are done: the sweep is not finished, and its answer will change."
            )
    if bad:
        parts.append(f"{len(bad)} run(s) diverged or failed and are not analyzed.")
    return " ".join(parts) or None


def environment_rows(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Where the runs were computed: each field's distinct values, so that a mixture is seen."""
    rows: list[tuple[str, str]] = []
    names = (
        ("scaling_lab", "scaling_lab"), ("git revision", "git_revision"), ("Python", "python"), ("PyTorch", "torch"),
        ("device", "device"), ("device name", "device_name"), ("platform", "platform"),
        ("data fingerprint", "data_fingerprint"),
    )  # fmt: skip
    for label, field in names:
        values = sorted({str(getattr(r.environment, field) or "unknown") for r in records})
        if values:
            mixed = " (the runs differ)" if len(values) > 1 else ""
            rows.append((label, ", ".join(values) + mixed))
    if records:
        data = sorted({f"{type(r.spec.data).kind}" for r in records})
        how = sorted({f"{r.spec.dtype}, {'compiled' if r.execution.compile else 'eager'}, {r.execution.threads} thread(s)"
                      for r in records})  # fmt: skip
        rows += [("data", ", ".join(data)), ("execution", "; ".join(how))]
    return [*rows, ("this page", f"Python {platform.python_version()}")]


def default_next_commands(data: Document, sweeps: Sequence[str]) -> list[tuple[str, str]]:
    """What can follow, by what is there."""
    if not sweeps:
        return [
            (
                "scaling-lab analyze runs=FILE convention=six_n_total",
                "the same table, with what its params count stated",
            ),
            (
                "scaling-lab analyze runs=FILE bootstrap.unit=budget",
                "the same with another unit of resampling",
            ),
        ]
    sweep = sweeps[0]
    again = (f"scaling-lab report sweep={sweep}", "this page again, with what has been trained since")
    if not data["estimates"]:
        return [(f"scaling-lab sweep sweep={sweep}", "train the runs of the plan that are not done"), again]
    ten = 10 * float(data["observations"]["points_compute_range_flops"][1])
    return [
        (
            f"scaling-lab predict sweep={sweep} compute_flops={ten:.3g}",
            "the best model at ten times the compute",
        ),
        (
            f"scaling-lab analyze sweep={sweep} convention={Convention.SIX_N_NON_EMBEDDING}",
            "the same runs, N and C counted as Kaplan et al. counted them",
        ),
        again,
    ]


def _formula(text: str) -> str:
    """A law's formula with raised exponents and Greek letters; everything else escaped."""
    import re

    from markupsafe import escape

    def letter(match: re.Match[str]) -> str:
        return GREEK[match.group()]

    greek = re.sub("|".join(rf"\b{name}" for name in GREEK), letter, str(escape(text)))
    return re.sub(r"\^(\w+|\([^()]*\))", r"<sup>\1</sup>", greek)


def _with_powers(text: str) -> str:
    """C^0.51 as C with a raised exponent; everything else escaped."""
    import re

    from markupsafe import escape

    return re.sub(r"\bC\^(-?\d+(?:\.\d+)?)", r"C<sup>\1</sup>", str(escape(text)))


def _write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
