"""Owns the report on disk: report.html (self-contained), analysis.json and figures/, replaced one file at a time.

    write_report(analysis, records, folder)

The page needs no network and no JavaScript. Every number in it comes from the analysis and the records given.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.data.observations import AS_GIVEN
from scaling_lab.core.counts import Convention
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.reporting import tables as tables
from scaling_lab.reporting import tables_checks, tables_tuning, words
from scaling_lab.reporting.gallery import Drawn, Plate, draw_all

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
    """What a report says beside its analysis and its records."""

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
    analysis (a sweep too young to be analysed) the page says why and shows the runs; analysis.json is then not written.

    Args:
        analysis: from `scaling_lab.analysis.analysis.analyze`.
        records: the sweep's run records, with curves; empty for a plain table.
        folder: made if it does not exist.
    """
    o = options or ReportOptions()
    folder = Path(folder)
    figures = folder / FIGURES_NAME
    figures.mkdir(parents=True, exist_ok=True)
    plates = draw_all(analysis, records)
    for plate in plates:
        if isinstance(plate, Drawn):
            write_atomic(figures / f"{plate.name}.svg", plate.svg, durable=False)
            _write_bytes(figures / f"{plate.name}.png", plate.png)
        else:  # an older report's figure that these data do not allow would show other data
            for ending in ("svg", "png"):
                (figures / f"{plate.name}.{ending}").unlink(missing_ok=True)
    if analysis is not None:
        write_atomic(folder / ANALYSIS_NAME, dumps(analysis.to_json_dict(o.command, o.versions, o.source)))
    page = folder / REPORT_NAME
    write_atomic(page, render(analysis, records, plates, o))
    return page


def render(
    analysis: Analysis | None, records: Sequence[RunRecord], plates: Sequence[Plate], options: ReportOptions
) -> str:
    """The whole page as HTML text."""
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
    by_name = {p.name: p for p in plates}
    context = _context(analysis, records, options)
    return environment.get_template("page.html").render(
        style=style, figures=by_name, drawn=Drawn, safe=Markup, references=REFERENCES, **context
    )


def _context(
    analysis: Analysis | None, records: Sequence[RunRecord], options: ReportOptions
) -> dict[str, Any]:
    sweeps = sorted({r.spec.sweep for r in records})
    title = options.title or (", ".join(sweeps) if sweeps else "A table of runs")
    made_on = (options.made_on or datetime.now(UTC)).strftime("%d %B %Y, %H:%M %Z").lstrip("0")
    context: dict[str, Any] = {
        "title": title,
        "made_on": made_on,
        "command": options.command,
        "banner": banner(records, options.plan),
        "analysis": analysis,
        "problem": options.problem or "There are not yet enough completed runs.",
        "runs": tables.runs(analysis, records, options.plan),
        "environment": environment_rows(records),
        "plan_notes": [*options.plan.notes, *options.plan.rounding] if options.plan else [],
        "next_commands": options.next_commands or default_next_commands(analysis, sweeps),
        "from_records": bool(records),
        "dropped": tables.dropped(analysis, options.unreadable),
    }
    if analysis is None:
        return context
    estimates = analysis.estimates
    return context | {
        "headline": words.headline(analysis),
        "meaning": words.plain_meaning(analysis),
        "caveats": words.caveats(analysis),
        "tiles": words.key_numbers(analysis, records),
        "exponents": tables.exponents(analysis),
        "law": tables.law_parameters(analysis),
        "law_formula": law_formula(analysis),
        "budgets": tables.budgets(analysis),
        "backtest": tables.backtest(analysis),
        "backtest_messages": [(words.SHORT_APPROACH_NAMES[t.approach], t.message) for t in analysis.backtest],
        "predictions": tables.predictions(analysis),
        "agreement": tables.agreement(analysis),
        "agreement_message": analysis.agreement.message,
        "sensitivity": tables.sensitivity(analysis),
        "tuning": None if analysis.tuning is None else tables_tuning.cells(analysis.tuning),
        "tuned_exponents": None if analysis.tuning is None else tables_tuning.exponents(analysis.tuning),
        "profile": tables_checks.profile(analysis.profile, analysis),
        "profile_message": None if analysis.profile is None else analysis.profile.message,
        "skills": None if analysis.skills is None else tables_checks.skills(analysis.skills),
        "skill_ratios": None if analysis.skills is None else tables_checks.skill_ratios(analysis.skills),
        "laws": None if analysis.law_comparison is None else tables_checks.laws(analysis.law_comparison),
        "warnings": analysis.observations.warnings,
        "diagnostics": [
            (words.SHORT_APPROACH_NAMES[e.approach], e.message, e.diagnostics) for e in estimates
        ],
        "choices": choices(analysis),
    }


def banner(records: Sequence[RunRecord], plan: Plan | None) -> str | None:
    """How much of the sweep there is, where it is not all; None for a whole one or a table."""
    bad = [r for r in records if r.status in (RunStatus.DIVERGED, RunStatus.FAILED)]
    parts = []
    if plan is not None:
        have = {r.run_id for r in records if r.status is not RunStatus.INTERRUPTED}
        done = sum(p.run_id in have for p in plan.runs)
        if done < len(plan.runs):
            parts.append(
                f"{done} of {len(plan.runs)} runs are done: this is a half-done sweep, and its answer will move."
            )
    if bad:
        parts.append(f"{len(bad)} run(s) diverged or failed and are not analysed.")
    return " ".join(parts) or None


def law_formula(analysis: Analysis) -> str:
    """The fitted law's formula and source, in words."""
    from scaling_lab.analysis.laws import get_law

    law = analysis.estimate("parametric").law
    if law is None:
        return ""
    known = get_law(law, **analysis.settings.approach.parametric.law_options)
    return f"{known.formula} ({known.source})" if known.source else known.formula


def choices(analysis: Analysis) -> list[tuple[str, str]]:
    """Conventions and options that decided the numbers: (what, which)."""
    s, a = analysis.settings, analysis.settings.approach
    convention = analysis.observations.convention
    points = "one point a run, its last" if s.points == "final" else "every row"
    return [
        ("How N and C are counted", f"{convention}: {words.convention_words(convention)}" if convention != AS_GIVEN
         else f"{AS_GIVEN}: {words.convention_words(AS_GIVEN)}"),
        ("C = 6 N D", "holds to 1% at every point" if analysis.points.is_six_nd else
         "does not hold here: the frontier uses the FLOPs per token as counted"),
        ("Loss", s.metric or "the validation loss (of a table: the column loss), nats per token"),
        ("Points", points),
        ("Envelope", f"{analysis.points.curves.kind}; method {a.envelope.method}, edge sizes: {a.envelope.edge}"),
        ("IsoFLOP", f"{a.isoflop.minimum} in ln N, " + ("all sizes of a budget" if a.isoflop.window_log_params is None
         else f"sizes within {a.isoflop.window_log_params:.3g} in ln N of the best")),
        ("Parametric", f"law {a.parametric.law}, objective {a.parametric.objective}, Huber delta {a.parametric.huber_delta:g}"),
        ("Intervals", f"{s.bootstrap.level:.0%}, {s.bootstrap.resamples} resamples, unit {s.bootstrap.unit}, seed {s.seed}"),
        ("Weights", s.weights or "all points alike"),
    ]  # fmt: skip


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


def default_next_commands(analysis: Analysis | None, sweeps: Sequence[str]) -> list[tuple[str, str]]:
    """What can follow, by what is there."""
    if not sweeps:
        return [
            (
                "scaling-lab analyze runs=FILE convention=six_n_total",
                "the same table, saying what its params count",
            ),
            (
                "scaling-lab analyze runs=FILE bootstrap.unit=budget",
                "the same with another unit of resampling",
            ),
        ]
    sweep = sweeps[0]
    out = (
        [(f"scaling-lab sweep sweep={sweep}", "train what of the plan is not done")]
        if analysis is None
        else []
    )
    if analysis is not None:
        ten = 10 * float(analysis.points.compute_flops.max())
        out.append(
            (
                f"scaling-lab predict sweep={sweep} compute_flops={ten:.3g}",
                "the best model at ten times the compute",
            )
        )
        kaplan = f"scaling-lab analyze sweep={sweep} convention={Convention.SIX_N_NON_EMBEDDING}"
        out.append((kaplan, "the same runs, N and C counted as Kaplan et al. counted them"))
    out.append((f"scaling-lab report sweep={sweep}", "this page again, with what has been trained since"))
    return out


def _formula(text: str) -> str:
    """A law's formula with raised exponents and Greek letters; everything else escaped."""
    import re

    from markupsafe import escape

    def letter(match: re.Match[str]) -> str:
        return tables.GREEK[match.group()]

    greek = re.sub("|".join(rf"\b{name}" for name in tables.GREEK), letter, str(escape(text)))
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
