"""Owns `scaling-lab sweep`: train what of a plan is not done, through Hydra, on any launcher."""

from __future__ import annotations

import os
from dataclasses import replace

from scaling_lab.cli.commands.analyze import command_text
from scaling_lab.cli.commands.plan import read_study, store_of
from scaling_lab.cli.commands.report import write_sweep_report
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import Command
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.study import SweepOnly, study_form, sweep_settings
from scaling_lab.cli.planning import defines_plan
from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import require
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.files import disk_error
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.sweeping import Session, open_session, report_outcome, run_multirun, sweep_job
from scaling_lab.planning.designs.learning_rate import ROLE as LR_SWEEP
from scaling_lab.tracking.wandb.study import is_mirrored, mirror_study, say_what_is_missing


def form(arguments: Arguments) -> Form:
    return study_form(arguments, "sweep", (SweepOnly,))


def run(arguments: Arguments) -> int:
    command = read_study(arguments, "sweep")
    console = Console.for_flags(arguments.flags)
    status, plan = execute(command, console)
    mirror_whole_sweep(store_of(command), command_text(arguments), console)
    results = command.tree["results_dir"]
    where = "" if results == "results" else f" results_dir={results}"
    name = command.tree["sweep"]
    if status == 0 and compares_parametrizations(plan):
        console.next_step(f"scaling-lab report sweep={name}{where}")
    elif status == 0 and tunes_another(plan):
        console.next_step(f"scaling-lab analyze sweep=THE_SWEEP_IT_TUNES tuning={name}{where}")
    else:
        console.next_step(f"scaling-lab {'analyze' if status == 0 else 'status'} sweep={name}{where}")
    return status


def compares_parametrizations(plan: Plan) -> bool:
    """Whether the plan's runs vary the learning rate under several parametrisations: the report shows which transfers."""
    return tunes_another(plan) and len({run.spec.parametrization.kind for run in plan.runs}) > 1


def tunes_another(plan: Plan) -> bool:
    """Whether the plan's runs vary the learning rate of another sweep, and make no law of their own."""
    return all(run.spec.role == LR_SWEEP for run in plan.runs)


def mirror_whole_sweep(store: RunStore, text: str, console: Console) -> None:
    """Where the sweep's runs were mirrored to W&B: its ledger and its report too, and what is still missing there."""
    if not is_mirrored(store):
        return
    console.say("W&B: analysing what is done, for the analysis run ...")
    try:
        made = write_sweep_report(store, text, console)
        mirror_study(store, console, made.page.parent)
    except (
        Exception
    ) as error:  # the runs are trained: what comes after them on W&B must not end the sweep otherwise
        console.warn(f"there is no report for W&B ({type(error).__name__}: {error}).")
    say_what_is_missing(store, console)


def execute(command: Command, console: Console) -> tuple[int, Plan]:
    """Run the multirun; the exit status that the records tell, and the plan."""
    require("torch", "training")
    store: RunStore = store_of(command)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "sweep starts its own workers. To train each run on all processes of torchrun, plan it and give torchrun "
            f"the workers: torchrun --nproc_per_node=N -m scaling_lab.worker {store.folder}"
        )
    if not defines_plan(command.given):
        store.read_plan()  # says at once which sweeps there are, if this is none of them
    else:
        for combination in command.combinations:
            sweep_settings(combination.tree, (SweepOnly,), device="cpu")  # refuses before Hydra starts
    trees = [combination.tree for combination in command.combinations]
    try:
        with open_session(Session(console, command.given, trees)) as session:
            # The combinations are the plan's, and Hydra need not compose them again, at a tenth of a second each.
            run_multirun(replace(command, combinations=command.combinations[:1]), "sweep", sweep_job)
    except OSError as error:
        raise disk_error(error, store.folder) or error from error
    plan = session.plan or store.read_plan()
    return report_outcome(console, store, plan, [o.text for o in command.hydra]), plan
