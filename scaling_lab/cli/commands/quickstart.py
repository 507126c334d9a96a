"""Owns `scaling-lab quickstart`: plan, sweep, analysis and report of experiment=quickstart, and the answer at the end."""

from __future__ import annotations

import json

from scaling_lab.cli.commands.analyze import command_text
from scaling_lab.cli.commands.plan import read_study, store_of
from scaling_lab.cli.commands.report import write_sweep_report
from scaling_lab.cli.commands.sweep import execute
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.summary import print_analysis
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.study import SweepOnly, study_form
from scaling_lab.tracking.wandb.study import mirror_study, say_what_is_missing

EXPERIMENT = "quickstart"


def form(arguments: Arguments) -> Form:
    return study_form(arguments, "sweep", (SweepOnly,))


def run(arguments: Arguments) -> int:
    command = read_study(arguments, "sweep", experiment=EXPERIMENT)
    console = Console.for_flags(arguments.flags)
    status, _ = execute(command, console)
    store = store_of(command)
    console.say("analysing ...")
    analysis, report = write_sweep_report(store, command_text(arguments), console)
    mirror_study(store, console, report.parent)
    if analysis is None:
        return status or 1
    if "json" in arguments.flags:
        print(json.dumps(analysis.to_json_dict(command=command_text(arguments)), indent=1, allow_nan=False))
        return status
    print_analysis(console, analysis)
    console.print(f"report: {report}", style="bold", highlight=False)
    say_what_is_missing(store, console)
    results = command.tree["results_dir"]
    where = "" if results == "results" else f" results_dir={results}"
    largest = float(analysis.observations.compute_flops.max())
    console.next_step(
        f"scaling-lab predict sweep={store.folder.name}{where} compute_flops={100 * largest:.0e}".replace(
            "e+", "e"
        )
    )
    return status
