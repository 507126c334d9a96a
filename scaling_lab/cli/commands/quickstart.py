"""`scaling-lab quickstart`: plan, train, analyze and report experiment=quickstart."""

from __future__ import annotations

from scaling_lab.cli.commands.analyze import command_text
from scaling_lab.cli.commands.plan import read_study, store_of
from scaling_lab.cli.commands.report import write_sweep_report
from scaling_lab.cli.commands.sweep import execute
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.summary import print_result
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.study import SweepOnly, study_form
from scaling_lab.tracking.wandb.study import mirror_study, report_unsynced_runs

EXPERIMENT = "quickstart"


def form(arguments: Arguments) -> Form:
    return study_form(arguments, "sweep", (SweepOnly,))


def run(arguments: Arguments) -> int:
    command = read_study(arguments, "sweep", experiment=EXPERIMENT)
    console = Console.for_flags(arguments.flags)
    status, _ = execute(command, console)
    store = store_of(command)
    console.say("analyzing ...")
    study = command.tree.get("study")
    made = write_sweep_report(store, command_text(arguments), console, study=study)
    mirror_study(store, console, made.page.parent)
    analysis, findings = made.result.analysis, made.result.findings
    if analysis is None and not findings:
        return status or 1
    if "json" in arguments.flags:
        print((made.page.parent / "analysis.json").read_text(encoding="utf-8"), end="")
        return status
    print_result(console, made.result, study)
    console.print(f"report: {made.page}", style="bold", highlight=False)
    report_unsynced_runs(store, console)
    results = command.tree["results_dir"]
    where = "" if results == "results" else f" results_dir={results}"
    if analysis is None:
        console.next_step(f"scaling-lab status sweep={store.folder.name}{where}")
        return status
    largest = float(analysis.observations.compute_flops.max())
    console.next_step(
        f"scaling-lab predict sweep={store.folder.name}{where} compute_flops={100 * largest:.0e}".replace(
            "e+", "e"
        )
    )
    return status
