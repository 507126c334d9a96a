"""`scaling-lab sweep`: train the pending runs of a plan with any Hydra launcher."""

from __future__ import annotations

import os
from typing import Any

from scaling_lab.cli.commands.analyze import command_text
from scaling_lab.cli.commands.plan import read_study, store_of
from scaling_lab.cli.commands.report import write_sweep_report
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.display.progress import ConsoleReporter
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import CommandLine
from scaling_lab.cli.options.configs import config_folders
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.hydra_config import composed_for_launch, group_overrides
from scaling_lab.cli.options.study import SweepOnly, study_form, sweep_settings, tracker_options
from scaling_lab.cli.planning import RULES_CHANGED, defines_plan, pending, settle_plan
from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import require
from scaling_lab.core.reporter import Reporter
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.files import disk_error
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.hydra_jobs import open_launcher
from scaling_lab.launching.progress import LaunchReporter
from scaling_lab.launching.sweeping import SweepJobs, group_into_jobs, report_outcome
from scaling_lab.planning.designs.learning_rate import ROLE as LR_SWEEP
from scaling_lab.planning.preparation import with_corpus
from scaling_lab.tracking.wandb.study import is_mirrored, mirror_study, report_unsynced_runs


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
    """Whether the plan's runs vary the learning rate under several parametrizations; the report shows how it transfers."""
    return tunes_another(plan) and len({run.spec.parametrization.kind for run in plan.runs}) > 1


def tunes_another(plan: Plan) -> bool:
    """Whether all runs of the plan only vary the learning rate, for another sweep."""
    return all(run.spec.role == LR_SWEEP for run in plan.runs)


def mirror_whole_sweep(store: RunStore, text: str, console: Console) -> None:
    """If the sweep's runs are mirrored to W&B, also upload its ledger and report, and report what is still missing."""
    if not is_mirrored(store):
        return
    console.say("W&B: analyzing the finished runs ...")
    try:
        made = write_sweep_report(store, text, console)
        mirror_study(store, console, made.page.parent)
    except Exception as error:  # the runs are trained: a problem with W&B must not change the exit status
        console.warn(f"no report was made for W&B ({type(error).__name__}: {error}).")
    report_unsynced_runs(store, console)


def execute(line: CommandLine, console: Console) -> tuple[int, Plan]:
    """Train the pending runs of the plan; returns the exit status, read from the records, and the plan."""
    require("torch", "training")
    store: RunStore = store_of(line)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "sweep starts its own workers. To train each run on all processes of torchrun, plan the sweep and start "
            f"workers: torchrun --nproc_per_node=N -m scaling_lab.worker {store.folder}"
        )
    if not defines_plan(line.given):
        store.read_plan()  # names the sweeps there are, if this is none of them
    else:
        for combination in line.combinations:
            sweep_settings(combination.tree, (SweepOnly,))  # refuses before Hydra composes
    try:
        plan = launch(line, store, ConsoleReporter(console))
    except OSError as error:
        raise disk_error(error, store.folder) or error from error
    return report_outcome(console, store, plan, [o.text for o in line.hydra]), plan


def launch(line: CommandLine, store: RunStore, reporter: LaunchReporter) -> Plan:
    """Give the pending runs of the plan to the launcher that the command line chooses, and wait; returns the plan."""
    first = line.combinations[0]
    overrides = [*group_overrides(first.groups), *(option.text for option in line.hydra)]
    folders = config_folders(line.config_dir)
    with composed_for_launch("sweep", overrides, first.values, folders) as (config, loader):
        runs_per_job = checked_runs_per_job(config.hydra)
        with open_launcher(config, loader) as run_jobs:
            plan = with_corpus(settled_plan(line, store, reporter), store.folder)
            pending = pending_runs(store, plan, reporter)
            if pending:
                jobs = group_into_jobs(plan.runs, set(pending), runs_per_job)
                # Jobs may run in another folder, and logs are named in records.
                absolute = RunStore(store.folder.absolute())
                tracker, gpu = tracker_options(first.tree), first.tree.get("gpu")
                run_jobs(SweepJobs(absolute, plan, jobs, tracker, reporter, gpu))
    return plan


def checked_runs_per_job(hydra: Any) -> int:
    """`hydra.sweeper.runs_per_job`. Raises `UserError` if another sweeper was chosen."""
    if not str(hydra.sweeper._target_).endswith(".PlanSweeper"):
        raise UserError(
            f"hydra/sweeper={hydra.runtime.choices['hydra/sweeper']}: only train -m takes a sweeper, sweep has its own."
        )
    runs_per_job = hydra.sweeper.runs_per_job
    if not isinstance(runs_per_job, int) or runs_per_job < 1:
        raise UserError(f"hydra.sweeper.runs_per_job={runs_per_job!r} must be a whole number of at least 1.")
    return runs_per_job


def settled_plan(line: CommandLine, store: RunStore, reporter: Reporter) -> Plan:
    """The plan on disk, or a new one, which is then written; with `retry`, its failed runs are reopened."""
    settled = settle_plan(store, [combination.tree for combination in line.combinations], line.given)
    plan = settled.plan
    if settled.rules_changed:
        reporter.say(f"sweep {plan.sweep} was {RULES_CHANGED}")
    if settled.new:
        reporter.say(f"planned {len(plan.runs)} runs, {plan.total_flops:.3g} FLOPs: {store.plan_path}")
        for note in plan.notes:
            reporter.say(f"  {note}")
    if line.tree.get("retry"):
        again = store.reopen_failed(plan)
        reporter.say(f"{len(again)} failed or diverged runs are retried.")
    return plan


def pending_runs(store: RunStore, plan: Plan, reporter: Reporter) -> list[str]:
    """Ids of the runs to train."""
    run_ids = pending(store, plan)
    done = len(plan.runs) - len(run_ids)
    if not run_ids:
        reporter.say(f"nothing to do: all {done} runs of {store.folder} have finished.")
    elif done:
        reporter.say(f"{done} of {len(plan.runs)} runs have finished already; {len(run_ids)} to go.")
    return run_ids
