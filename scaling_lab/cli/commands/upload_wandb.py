"""`scaling-lab upload-wandb`: upload a sweep's runs, ledger and analysis to W&B from the records on disk.

This works regardless of what was tracked during training (offline mode, server outages, wrong keys, killed processes).
Runs that are already complete on W&B are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scaling_lab.cli.commands.report import existing_sweep
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError


@dataclass(frozen=True)
class UploadWandb:
    """Options of `upload-wandb`."""

    sweep: str
    """The sweep, a folder of results_dir"""
    results_dir: str = "results"
    """Folder of the sweeps"""
    project: str | None = None
    """The W&B project; default: the project that the sweep was tracked in, else scaling_lab"""
    entity: str | None = None
    """The W&B user or team; default: as tracked, else your default"""


def form(arguments: Arguments) -> Form:
    return Form(options_of(UploadWandb))


def run(arguments: Arguments) -> int:
    from scaling_lab.tracking.sink import wandb_client
    from scaling_lab.tracking.wandb import study as wandb_study

    command = read_command(arguments, None, lambda tree: form(arguments))
    options: UploadWandb = build(UploadWandb, command.tree)
    console = Console.for_flags(arguments.flags)
    store = existing_sweep(options.results_dir, options.sweep)
    wandb_client.require_wandb()
    if not wandb_client.logged_in():
        raise UserError(
            f"you are not logged in at {wandb_client.base_url()}: run `wandb login`, then this command again."
        )
    target = wandb_client.Target.load(wandb_client.wandb_folder(store.folder)) or wandb_client.Target()
    target = replace(
        target, project=options.project or target.project, entity=options.entity or target.entity, mode="auto"
    )
    wandb_study.upload(store, target, console)
    address = wandb_study.upload_study(store, target)
    if address:
        console.print(f"W&B: {address}", highlight=False, markup=False)
    where = "" if options.results_dir == "results" else f" results_dir={options.results_dir}"
    analyzed = (store.report_folder / "analysis.json").exists()
    console.next_step(
        f"scaling-lab status sweep={options.sweep}{where}"
        if analyzed
        else f"scaling-lab analyze sweep={options.sweep}{where}, whose report is then uploaded too"
    )
    return 0
