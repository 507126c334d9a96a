"""`scaling-lab report`: a sweep's report again, also of a sweep that is only half done, or a page from an analysis.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scaling_lab.cli.commands.analyze import checked_out, command_text, sweeps_of, writing_into
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.summary import print_result
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.wandb.study import mirror_study

if TYPE_CHECKING:
    from scaling_lab.analysis.analysis import SweepResult


@dataclass(frozen=True)
class ReportCommand:
    """Options of `report`."""

    sweep: str | None = None
    """The sweep, a folder of results_dir"""
    analysis: str | None = None
    """Or an analysis.json, to write the page from it alone, without the figures that need the runs"""
    results_dir: str = "results"
    """Folder of the sweeps"""
    out: str | None = None
    """Folder for the report; default RESULTS/SWEEP/report, or that of the analysis.json"""
    wandb: Literal["auto", "off"] = "auto"
    """auto: the report goes to W&B too where the sweep's runs were mirrored there"""

    def __post_init__(self) -> None:
        if self.sweep is not None and self.analysis is not None:
            raise UserError(f"give sweep={self.sweep} or analysis={self.analysis}, not both.")
        if self.sweep is None and self.analysis is None:
            known = ", ".join(sweeps_of(self.results_dir)) or "none yet"
            raise UserError(
                f"sweep=NAME or analysis=FILE is missing: give one of them (sweeps in {self.results_dir}: {known})."
            )


def form(arguments: Arguments) -> Form:
    return Form(options_of(ReportCommand))


def run(arguments: Arguments) -> int:
    command = read_command(arguments, None, lambda tree: form(arguments))
    settings: ReportCommand = build(ReportCommand, command.tree)
    console = Console.for_flags(arguments.flags)
    out = None if settings.out is None else checked_out(Path(settings.out).expanduser())
    if settings.analysis is not None:
        return _from_json(Path(settings.analysis).expanduser(), out, console)
    assert settings.sweep is not None
    store = existing_sweep(settings.results_dir, settings.sweep)
    made = write_sweep_report(store, command_text(arguments), console, out)
    print_result(console, made.result)
    console.print(f"report: {made.page}", style="bold", highlight=False)
    if settings.wandb == "auto":
        mirror_study(store, console, made.page.parent)
    where = "" if settings.results_dir == "results" else f" results_dir={settings.results_dir}"
    following = "status" if made.result.analysis is None else "analyze"
    console.next_step(f"scaling-lab {following} sweep={settings.sweep}{where}")
    return 0


def _from_json(path: Path, out: Path | None, console: Console) -> int:
    """The page of an analysis.json alone."""
    from scaling_lab.reporting.page import report_from_json

    folder = out or checked_out(path.parent)
    with writing_into(folder):
        page = report_from_json(path, folder)
    console.print(f"report: {page}", style="bold", highlight=False)
    return 0


def existing_sweep(results_dir: str, sweep: str) -> RunStore:
    """The store of a sweep that exists. Raises `UserError` with the sweeps that do."""
    store = RunStore.for_sweep(Path(results_dir).expanduser(), sweep)
    if not store.plan_path.exists() and not (store.folder / "runs").is_dir():
        known = ", ".join(sweeps_of(results_dir)) or "none yet (`scaling-lab quickstart` makes one)"
        raise UserError(f"sweep={sweep!r}: there is no such sweep in {results_dir}. Choices: {known}.")
    return store


@dataclass(frozen=True)
class SweepReport:
    """What a sweep's records gave, and the page that shows it."""

    result: SweepResult
    page: Path


def write_sweep_report(
    store: RunStore, command: str, console: Console, out: Path | None = None, study: str | None = None
) -> SweepReport:
    """Analyze the finished runs of a sweep and write its report; without enough of them the page says so.

    Args:
        study: what the sweep was made for: its finding comes first, and a warning says where there is none.
    """
    from scaling_lab.analysis.analysis import SweepResult, analyze_records
    from scaling_lab.analysis.data.ledger import load_ledger
    from scaling_lab.analysis.data.sweep_records import split_by_role
    from scaling_lab.analysis.studies import get_study
    from scaling_lab.reporting.page import ReportOptions, write_report

    found, problems = load_ledger(store)
    for run_id, reason in problems:
        console.warn(f"{run_id} is left out: {reason}")
    plan = store.read_plan() if store.plan_path.exists() else None
    records = found
    try:
        split = split_by_role(found)
        records = list(split.law) or found
        result = analyze_records(split)
    except UserError as error:
        result = SweepResult(None, (), str(error))
    named = next((finding for finding in result.findings if finding.name == study), None)
    if result.problem is not None:
        # A sweep that was made for a study, which answers, need not have a law.
        (console.warn if named is None else console.note)(f"no scaling law: {result.problem}")
    if study is not None and named is None:
        console.warn(f"study={study}: its data are missing. It needs {get_study(study).NEEDS}.")
    options = ReportOptions(
        command=command,
        plan=plan,
        problem=result.problem,
        findings=result.findings,
        study=study,
        unreadable=problems,
    )
    folder = out or store.report_folder
    with writing_into(folder):
        return SweepReport(result, write_report(result.analysis, records, folder, options))
