"""`scaling-lab analyze`: the three approaches and the studies on a sweep or any table, as a table, as JSON, as a report.

A table never needs torch: nothing here imports it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.analysis_options import analysis_form, analysis_settings, resolve_where
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build
from scaling_lab.core.errors import DiskError, UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.storage.files import DISK_ERRORS
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.wandb.study import mirror_study

if TYPE_CHECKING:
    from scaling_lab.analysis.analysis import AnalysisSettings, SweepResult


# What our pages have in their head.
GENERATOR = b'<meta name="generator" content="scaling-lab">'
NOT_OURS = object()
# Options that decide which observations there are and how they are counted: a next command needs them too.
CARRIED = ("convention", "points", "metric", "weights", "decimal", "best_of", "pool")
CARRIED_UNDER = ("columns.", "units.", "where.", "approach.")


@dataclass(frozen=True)
class Where:
    """Where an analysis comes from and goes to."""

    sweep: str | None = None
    """The sweep to analyze, a folder of results_dir"""
    runs: str | None = None
    """Or a table: CSV, TSV, Parquet, JSON records or JSON lines"""
    tuning: str | None = None
    """A sweep of design=learning_rate in results_dir: the excess loss of each run from a mistuned learning rate, and the exponents if every size were tuned"""
    out: str | None = None
    """Folder for report.html, analysis.json and the figures; default RESULTS/SWEEP/report or RESULTS/tables/FILE"""
    results_dir: str = "results"
    """Folder of the sweeps"""
    config_dir: str | None = None
    """A folder of your own configs, searched before the built-in ones"""

    def __post_init__(self) -> None:
        if self.runs is not None and self.sweep is not None:
            raise UserError(f"sweep={self.sweep} and runs={self.runs}: give one of them.")
        if self.runs is not None and self.tuning is not None:
            raise UserError(f"tuning={self.tuning} is for a sweep (sweep=NAME); runs={self.runs} is a table.")
        if self.runs is None and self.sweep is None:
            known = ", ".join(sweeps_of(self.results_dir)) or "none yet"
            raise UserError(
                f"what to analyze is missing: give runs=FILE, or sweep=NAME (sweeps in {self.results_dir}: {known})."
            )

    @property
    def source(self) -> str | None:
        """Absolute path of the table; None for a sweep."""
        return None if self.runs is None else str(Path(self.runs).expanduser().resolve())

    def settled_folder(self) -> Path:
        """Where the results are written; never over another table's, nor over a page that is not ours.

        Raises:
            UserError: `out` holds a report.html that scaling-lab did not write.
        """
        if self.out is not None:
            return checked_out(Path(self.out).expanduser())
        if self.sweep is not None:
            return RunStore.for_sweep(self.results_dir, self.sweep).report_folder
        first = Path(self.results_dir) / "tables" / Path(self.runs or "table").stem
        return next(
            folder
            for i in itertools.count(1)
            if _free_for(folder := first if i == 1 else first.with_name(f"{first.name}-{i}"), self.source)
        )


@dataclass(frozen=True)
class AnalyzeWhere(Where):
    """And where else to show it."""

    wandb: Literal["auto", "off"] = "auto"
    """auto: the report goes to W&B too where the sweep's runs were mirrored there"""

    def show_elsewhere(self, console: Console, folder: Path) -> None:
        if self.sweep is not None and self.wandb == "auto":
            mirror_study(RunStore.for_sweep(self.results_dir, self.sweep), console, folder)


def checked_out(folder: Path) -> Path:
    """`folder`. Raises `UserError` where it has a report.html that scaling-lab did not write."""
    page = folder / "report.html"
    if page.is_file() and GENERATOR not in page.read_bytes()[:4096] and _known_source(folder) is NOT_OURS:
        raise UserError(
            f"out={folder}: its report.html was not written by scaling-lab and would be lost. Choices: another folder, "
            "or one without a report.html."
        )
    return folder


def _free_for(folder: Path, source: str | None) -> bool:
    """Whether a table's report may go there: nothing is there yet, or a report of the same table."""
    taken = (folder / "analysis.json").exists() or (folder / "report.html").exists()
    return not taken or _known_source(folder) == source


def _known_source(folder: Path) -> Any:
    """The table of the analysis in `folder` (None: a sweep, or unknown); NOT_OURS where there is no analysis of ours."""
    try:
        found = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return NOT_OURS
    return found.get("source") if isinstance(found, dict) and "schema_version" in found else NOT_OURS


def form(arguments: Arguments, settings: type = AnalyzeWhere) -> Form:
    """What help shows and checks use."""
    return analysis_form("analyze", settings, arguments.get("config_dir"))


def run(arguments: Arguments) -> int:
    arguments = resolve_where(arguments)
    command = read_command(arguments, "analyze", lambda tree: form(arguments))
    own = tuple(AnalyzeWhere.__dataclass_fields__)
    where = build(AnalyzeWhere, command.tree, skip=tuple(command.tree.keys() - set(own)))
    settings = analysis_settings(command.tree, skip=own)
    console = Console.for_flags(arguments.flags)
    folder = where.settled_folder()  # before minutes of work
    result, records = analyze_source(where, settings, console)
    return publish(result, records, where, folder, arguments, console)


def sweeps_of(results_dir: str) -> list[str]:
    """Names of the sweeps of a results folder, also of those without a plan."""
    root = Path(results_dir).expanduser()
    return (
        sorted({p.parent.name for name in ("plan.json", "runs") for p in root.glob(f"*/{name}")})
        if root.is_dir()
        else []
    )


def analyze_source(
    where: Where, settings: AnalysisSettings, console: Console
) -> tuple[SweepResult, Sequence[RunRecord]]:
    """Read the observations and analyze them; the records are empty for a table.

    Where no law can be fitted to a sweep there are findings alone, if any; otherwise `UserError` says why.
    """
    from scaling_lab.analysis.analysis import (
        SweepResult,
        analyze,
        analyze_records,
        read_observations,
        require_result,
    )
    from scaling_lab.analysis.data.sweep_records import split_by_role

    if where.runs is not None:
        path = Path(where.runs).expanduser()
        console.note(f"reading {path}")
        analysis = analyze(read_observations(path, settings), settings)
        return SweepResult(analysis, analysis.findings), ()
    assert where.sweep is not None
    for_tables = {
        "where.": settings.where,
        "columns.": settings.columns,
        "units.": settings.units,
        "best_of": settings.best_of,
    }
    for key, given in for_tables.items():
        if given:
            raise UserError(
                f"{key}: this option is for tables (runs=FILE); of a sweep's records metric= and metrics= choose the loss."
            )
    found = read_records(where.results_dir, where.sweep, "sweep", console)
    elsewhere = (
        [] if where.tuning is None else read_records(where.results_dir, where.tuning, "tuning", console)
    )
    records = split_by_role(found, elsewhere)
    console.note(
        f"analyzing {len(found)} runs of {RunStore.for_sweep(where.results_dir, where.sweep).folder}"
    )
    result = analyze_records(records, settings)
    require_result(result, records, settings)
    if result.analysis is None:
        console.warn(f"no scaling law: {result.problem}")
    return result, records.law or found


def read_records(results_dir: str, sweep: str, option: str, console: Console) -> list[RunRecord]:
    """A sweep's records, with a warning for each unreadable one. Raises `UserError` where there are none."""
    from scaling_lab.analysis.data.ledger import load_ledger

    store = RunStore.for_sweep(results_dir, sweep)
    records, problems = load_ledger(store)
    for run_id, reason in problems:
        console.warn(f"{run_id} is left out: {reason}")
    if not records:
        known = ", ".join(sweeps_of(results_dir)) or "none yet"
        raise UserError(f"{option}={sweep!r} has no finished runs in {store.folder}. Sweeps there: {known}.")
    return records


def publish(
    result: SweepResult,
    records: Sequence[RunRecord],
    where: AnalyzeWhere,
    folder: Path,
    arguments: Arguments,
    console: Console,
) -> int:
    """Write the report and print the summary, or print analysis.json alone."""
    from scaling_lab.cli.display.summary import print_result
    from scaling_lab.reporting.page import ReportOptions, document_of, write_report

    options = ReportOptions(
        command=command_text(arguments),
        source=where.source,
        problem=result.problem,
        findings=result.findings,
    )
    as_json = "json" in arguments.flags
    if as_json:
        print(json.dumps(document_of(result.analysis, options), indent=1, allow_nan=False))
        if where.out is None:
            return 0
    else:
        print_result(console, result)
    with writing_into(folder):
        report = write_report(result.analysis, records, folder, options)
    if as_json:
        return 0
    console.print(f"report: {report}", style="bold", highlight=False)
    where.show_elsewhere(console, report.parent)
    source = " ".join(
        shlex.quote(a.text)
        for a in arguments.assignments
        if a.key in ("sweep", "runs", "results_dir", *CARRIED) or a.key.startswith(CARRIED_UNDER)
    )
    if result.analysis is None:
        console.next_step(f"scaling-lab status {source}")
        return 0
    largest = float(result.analysis.observations.compute_flops.max())
    console.next_step(f"scaling-lab predict {source} compute_flops={100 * largest:.0e}".replace("e+", "e"))
    return 0


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Context in which a disk error becomes one line that names where else a report may go."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS and not isinstance(error, PermissionError):
            raise
        why = DISK_ERRORS.get(error.errno or 0, "permission denied")
        raise DiskError(
            f"{folder} cannot be written: {why}. The report is missing, nothing else; analyze and report take out=DIR, a "
            "folder elsewhere."
        ) from error


def command_text(arguments: Arguments) -> str:
    """The command line as it could be typed again."""
    words = ["scaling-lab", arguments.command or "", *(a.text for a in arguments.assignments)]
    return " ".join(shlex.quote(word) for word in words)
