"""Owns `scaling-lab report`: a sweep's report again, also of a sweep that is only half done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scaling_lab.cli.commands.analyze import checked_out, command_text, sweeps_of, writing_into
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.summary import print_analysis
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.wandb.study import mirror_study

if TYPE_CHECKING:
    from scaling_lab.analysis.analysis import Analysis


@dataclass(frozen=True)
class ReportCommand:
    """Options of `report`."""

    sweep: str
    """The sweep, a folder of results_dir"""
    results_dir: str = "results"
    """Folder of the sweeps"""
    out: str | None = None
    """Folder for the report; default RESULTS/SWEEP/report"""
    wandb: Literal["auto", "off"] = "auto"
    """auto: the report goes to W&B too where the sweep's runs were mirrored there"""


def form(arguments: Arguments) -> Form:
    return Form(options_of(ReportCommand))


def run(arguments: Arguments) -> int:
    command = read_command(arguments, None, lambda tree: form(arguments))
    settings: ReportCommand = build(ReportCommand, command.tree)
    console = Console.for_flags(arguments.flags)
    store = existing_sweep(settings.results_dir, settings.sweep)
    out = None if settings.out is None else checked_out(Path(settings.out).expanduser())
    analysis, report = write_sweep_report(store, command_text(arguments), console, out)
    if analysis is not None:
        print_analysis(console, analysis)
    console.print(f"report: {report}", style="bold", highlight=False)
    if settings.wandb == "auto":
        mirror_study(store, console, report.parent)
    where = "" if settings.results_dir == "results" else f" results_dir={settings.results_dir}"
    console.next_step(
        f"scaling-lab {'status' if analysis is None else 'analyze'} sweep={settings.sweep}{where}"
    )
    return 0


def existing_sweep(results_dir: str, sweep: str) -> RunStore:
    """The store of a sweep that exists. Raises `UserError` with the sweeps that do."""
    store = RunStore.for_sweep(Path(results_dir).expanduser(), sweep)
    if not store.plan_path.exists() and not (store.folder / "runs").is_dir():
        known = ", ".join(sweeps_of(results_dir)) or "none yet (`scaling-lab quickstart` makes one)"
        raise UserError(f"sweep={sweep!r}: there is no such sweep in {results_dir}. Choices: {known}.")
    return store


def write_sweep_report(
    store: RunStore, command: str, console: Console, out: Path | None = None
) -> tuple[Analysis | None, Path]:
    """Analyse what is done of a sweep and write its report; no analysis where there is too little, and the page says so."""
    from scaling_lab.analysis.analysis import AnalysisSettings, analyze, observations_of_sweep
    from scaling_lab.analysis.data.ledger import load_ledger
    from scaling_lab.analysis.studies.tuning_records import split_by_role
    from scaling_lab.reporting.page import ReportOptions, write_report

    records, problems = load_ledger(store)
    for run_id, reason in problems:
        console.warn(f"{run_id} is left out: {reason}")
    plan = store.read_plan() if store.plan_path.exists() else None
    settings = AnalysisSettings()
    analysis, problem = None, None
    try:
        records, tuned = split_by_role(records)
        analysis = analyze(observations_of_sweep(records, settings), settings, tuned)
    except UserError as error:
        problem = str(error)
        console.warn(f"no analysis yet: {problem}")
    options = ReportOptions(command=command, plan=plan, problem=problem)
    folder = out or store.report_folder
    with writing_into(folder):
        return analysis, write_report(analysis, records, folder, options)
