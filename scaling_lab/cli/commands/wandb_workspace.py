"""`scaling-lab wandb-workspace`: create a saved W&B view of a sweep with the optional package wandb-workspaces."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from scaling_lab.cli.commands.report import existing_sweep
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import missing


@dataclass(frozen=True)
class WandbWorkspace:
    """Options of `wandb-workspace`."""

    sweep: str
    """The sweep, a folder of results_dir"""
    results_dir: str = "results"
    """Folder of the sweeps"""
    project: str | None = None
    """The W&B project; default: the project that the sweep was tracked in, else scaling_lab"""
    entity: str | None = None
    """The W&B user or team; default: as tracked, else your default"""


def form(arguments: Arguments) -> Form:
    return Form(options_of(WandbWorkspace))


def run(arguments: Arguments) -> int:
    from scaling_lab.tracking.sink.wandb_client import (
        Target,
        base_url,
        logged_in,
        require_wandb,
        wandb_folder,
    )

    command = read_command(arguments, None, lambda tree: form(arguments))
    options: WandbWorkspace = build(WandbWorkspace, command.tree)
    store = existing_sweep(options.results_dir, options.sweep)
    wandb = require_wandb()
    try:
        workspaces, reports = (
            import_module(f"wandb_workspaces.{name}") for name in ("workspaces", "reports.v2")
        )
    except ImportError:
        raise missing("wandb-workspaces", "wandb-workspace", "wandb") from None
    if not logged_in():
        raise UserError(f"you are not logged in at {base_url()}: run `wandb login`, then this command again.")
    target = Target.load(wandb_folder(store.folder)) or Target()
    project = options.project or target.project
    try:
        entity = options.entity or target.entity or wandb.Api(timeout=30).default_entity
        view = workspace(workspaces, reports, entity, project, options.sweep)
        view.save()
        address = view.url
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"W&B at {base_url()} did not accept the workspace ({problem}).") from None
    console = Console.for_flags(arguments.flags)
    console.print(f"workspace: {address}", highlight=False, markup=False)
    where = "" if options.results_dir == "results" else f" results_dir={options.results_dir}"
    console.next_step(f"scaling-lab upload-wandb sweep={options.sweep}{where}")
    return 0


def workspace(ws: Any, wr: Any, entity: str, project: str, sweep: str) -> Any:
    """The view: the sweep's runs grouped by budget, with loss against FLOPs by size, valleys, and curves over tokens."""
    n, budget = wr.Config("N"), wr.Config("budget_flops")
    final = wr.SummaryMetric("final_val_loss_nats")
    laws = [
        wr.LinePlot(
            title="Loss against FLOPs, by size (approach 1: their lower envelope)",
            x="train_flops",
            y=["val_loss_nats"],
            log_x=True,
            log_y=True,
            groupby=n,
            title_x="training FLOPs",
            title_y="validation loss, nats",
        ),
        wr.ScatterPlot(
            title="IsoFLOP valleys: final loss against N, color by budget",
            x=n,
            y=final,
            z=budget,
            log_x=True,
            log_z=True,
        ),
        wr.ScatterPlot(
            title="Final loss against FLOPs", x=wr.Config("C"), y=final, z=n, log_x=True, log_z=True
        ),
    ]
    training = [
        wr.LinePlot(title="Training loss", x="tokens", y=["train_loss_nats"], log_x=True),
        wr.LinePlot(title="Learning rate", x="tokens", y=["lr"]),
    ]
    return ws.Workspace(
        name=f"Scaling laws of {sweep}",
        entity=entity,
        project=project,
        sections=[
            ws.Section(name="Scaling laws", panels=laws, is_open=True),
            ws.Section(name="Training", panels=training, is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis="train_flops", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == sweep, ws.Metric("JobType") != "analysis"],
            groupby=[ws.Config("budget_flops")],
        ),
    )
