"""Owns `scaling-lab analyze`: the three approaches on a sweep or on any table, as a table, as JSON, as a report.

A table never needs torch: nothing here imports it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_lab.cli.analysis_options import analysis_form, analysis_settings, settle_where
from scaling_lab.cli.arguments import Arguments
from scaling_lab.cli.compose import read_command
from scaling_lab.cli.console import Console
from scaling_lab.cli.forms import Form, build
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.store import RunStore

if TYPE_CHECKING:
    from scaling_lab.analyse.analysis import Analysis, AnalysisSettings


@dataclass(frozen=True)
class Where:
    """Where an analysis comes from and goes to."""

    sweep: str | None = None
    """The sweep to analyse, a folder of results_dir"""
    runs: str | None = None
    """Or a table: CSV, TSV, Parquet, JSON records or JSON lines"""
    out: str | None = None
    """Folder for report.html, analysis.json and the figures; default RESULTS/SWEEP/report or RESULTS/tables/FILE"""
    results_dir: str = "results"
    """Folder of the sweeps"""
    config_dir: str | None = None
    """A folder of your own configs, searched before the built-in ones"""

    def __post_init__(self) -> None:
        if self.runs is not None and self.sweep is not None:
            raise UserError(f"sweep={self.sweep} and runs={self.runs}: give one of them.")
        if self.runs is None and self.sweep is None:
            known = ", ".join(sweeps_of(self.results_dir)) or "none yet"
            raise UserError(
                f"what to analyse is missing: give runs=FILE, or sweep=NAME (sweeps in {self.results_dir}: {known})."
            )

    @property
    def folder(self) -> Path:
        """Where the results are written."""
        if self.out is not None:
            return Path(self.out).expanduser()
        if self.sweep is not None:
            return RunStore.for_sweep(self.results_dir, self.sweep).report_folder
        return Path(self.results_dir) / "tables" / Path(self.runs or "table").stem


def form(arguments: Arguments, settings: type = Where) -> Form:
    """What help shows and checks use."""
    return analysis_form("analyze", settings, arguments.get("config_dir"))


def run(arguments: Arguments) -> int:
    arguments = settle_where(arguments)
    command = read_command(arguments, "analyze", lambda tree: form(arguments))
    where = build(Where, command.tree, skip=tuple(command.tree.keys() - set(Where.__dataclass_fields__)))
    settings = analysis_settings(command.tree, skip=tuple(Where.__dataclass_fields__))
    console = Console.for_flags(arguments.flags)
    analysis, records = analyse_source(where, settings, console)
    return publish(analysis, records, where, arguments, console)


def sweeps_of(results_dir: str) -> list[str]:
    """Names of the sweeps of a results folder, also of those without a plan."""
    root = Path(results_dir).expanduser()
    return (
        sorted({p.parent.name for name in ("plan.json", "runs") for p in root.glob(f"*/{name}")})
        if root.is_dir()
        else []
    )


def analyse_source(
    where: Any, settings: AnalysisSettings, console: Console
) -> tuple[Analysis, list[RunRecord]]:
    """Read the observations and analyse them; the records are empty for a table."""
    from scaling_lab.analyse.analysis import analyse, observations_of_sweep, read_observations
    from scaling_lab.analyse.ledger import load_ledger

    if where.runs is not None:
        path = Path(where.runs).expanduser()
        console.note(f"reading {path}")
        return analyse(read_observations(path, settings), settings), []
    options = {"where.": settings.where, "columns.": settings.columns, "metric": settings.metric}
    for key, given in {**options, "metrics": settings.metrics}.items():
        if given:
            raise UserError(
                f"{key}: this option is for tables (runs=FILE); a sweep's records have no columns to choose."
            )
    store = RunStore.for_sweep(where.results_dir, where.sweep)
    records, problems = load_ledger(store)
    for run_id, reason in problems:
        console.warn(f"{run_id} is left out: {reason}")
    if not records:
        known = ", ".join(sweeps_of(where.results_dir)) or "none yet"
        raise UserError(
            f"sweep={where.sweep!r} has no finished runs in {store.folder}. Sweeps there: {known}."
        )
    console.note(f"analysing {len(records)} runs of {store.folder}")
    return analyse(observations_of_sweep(records, settings), settings), records


def publish(
    analysis: Analysis, records: list[RunRecord], where: Any, arguments: Arguments, console: Console
) -> int:
    """Write the report and print the summary, or print analysis.json alone."""
    from scaling_lab.cli.summary import print_analysis

    text = command_text(arguments)
    if "json" in arguments.flags:
        print(json.dumps(analysis.to_json_dict(command=text), indent=1, allow_nan=False))
        if where.out is None:
            return 0
    report = write(analysis, records, where.folder, text)
    if "json" in arguments.flags:
        return 0
    print_analysis(console, analysis)
    console.print(f"report: {report}", style="bold", highlight=False)
    source = f"sweep={where.sweep}" if where.sweep else f"runs={shlex.quote(str(where.runs))}"
    largest = float(analysis.observations.compute_flops.max())
    results = "" if where.results_dir == "results" else f" results_dir={shlex.quote(where.results_dir)}"
    console.next_step(
        f"scaling-lab predict {source}{results} compute_flops={100 * largest:.0e}".replace("e+", "e")
    )
    return 0


def write(analysis: Analysis, records: list[RunRecord], folder: Path, command: str) -> Path:
    """The report and analysis.json in `folder`; returns the report's path."""
    from scaling_lab.report.report import ReportOptions, write_report

    return write_report(analysis, records, folder, ReportOptions(command=command))


def command_text(arguments: Arguments) -> str:
    """The command line as it could be typed again."""
    words = ["scaling-lab", arguments.command or "", *(a.text for a in arguments.assignments)]
    return " ".join(shlex.quote(word) for word in words)
