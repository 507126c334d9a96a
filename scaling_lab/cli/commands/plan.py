"""`scaling-lab plan`: print a sweep's grid and its cost before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from scaling_lab.cli.display.console import Console, fitting_table
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import CommandLine, read_command
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.scales import GROUP, choose_scale, scale_config
from scaling_lab.cli.options.study import PlanOnly, SweepOnly, experiment_name, form_of_tree, study_form
from scaling_lab.cli.options.values import unquoted
from scaling_lab.cli.planning import RULES_CHANGED, has_started, settle_plan
from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_amount, human_bytes, human_count, human_time
from scaling_lab.core.installation import require
from scaling_lab.core.spec import Plan, source_class
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.execution import usable_cores
from scaling_lab.planning.preparation import NOT_PREPARED, needed_tokens

if TYPE_CHECKING:
    from scaling_lab.planning.cost import Speeds
    from scaling_lab.planning.plan import GridRow

# Maximum rows and maximum remarks of each kind that are printed; plan.json has all of them.
MAX_ROWS, MAX_REMARKS = 80, 20
# How a note on a size that is left out begins.
NOT_PLANNED = "not planned:"


def form(arguments: Arguments) -> Form:
    return study_form(arguments, "plan", (SweepOnly, PlanOnly))


def run(arguments: Arguments) -> int:
    command = read_study(arguments, "plan", launches=False, extra=(SweepOnly, PlanOnly))
    probes = [combination.tree.pop("probe", False) for combination in command.combinations]
    console = Console.for_flags(arguments.flags)
    store = store_of(command)
    trees = [c.tree for c in command.combinations]
    settled = settle_plan(store, trees, command.given, replace_unstarted=True)
    plan, new = settled.plan, settled.new
    if settled.rules_changed:
        console.say(f"sweep {plan.sweep} was {RULES_CHANGED}")
    if settled.replaced:
        console.warn(
            f"replaced the previous plan in {store.plan_path}, of which no run had started. Differences: "
            f"{'; '.join(settled.replaced)}."
        )
    if any(probes):
        measure(plan, console)
    if "json" in arguments.flags:
        print(store.plan_path.read_text(encoding="utf-8"), end="")
        return 0
    if not console.quiet:
        print_plan(console, plan, command.tree)
    console.print(f"plan: {store.plan_path}" + ("" if new else " (unchanged)"), highlight=False, markup=False)
    if not new and has_started(store, plan):
        console.say("the sweep has already started: `scaling-lab status` shows its progress.")
    results = command.tree["results_dir"]
    where = "" if results == "results" else f" results_dir={results}"
    console.next_step(f"scaling-lab sweep sweep={plan.sweep}{where}")
    return 0


def read_study(
    arguments: Arguments,
    config_name: str,
    *,
    launches: bool = True,
    experiment: str | None = None,
    extra: Sequence[type] = (SweepOnly,),
) -> CommandLine:
    """Parse and check a study's command line; the sweep's name defaults to the experiment's, the scale to the device's."""
    groups = {} if experiment is None else {"experiment": experiment}
    if (scale := choose_scale(arguments, experiment)) is not None:
        groups[GROUP] = scale_config(unquoted(arguments.get("experiment") or experiment or ""), scale)
    command = read_command(
        arguments,
        config_name,
        lambda tree: form_of_tree(tree, extra=extra),
        multirun=True,
        launches=launches,
        groups=groups,
    )
    for combination in command.combinations:
        combination.tree["scale"] = scale
    chosen = next(
        (choice for group, choice in command.combinations[0].groups.items() if group.package == "experiment"),
        None,
    )
    if not command.tree.get("sweep"):
        name = experiment_name(chosen, command.config_dir)
        if name is None:
            raise UserError(
                "sweep=NAME is missing: give the name of a sweep to resume or of a new one, or give experiment=NAME."
            )
        for combination in command.combinations:
            combination.tree["sweep"] = name
            combination.values["sweep"] = name
    return command


def measure(plan: Plan, console: Console) -> None:
    """Measure planned steps on this machine, and keep the result."""
    require("torch", "plan probe=true")
    from scaling_lab.launching.probing import measure_plan

    measure_plan(plan.runs, console)


def store_of(line: CommandLine) -> RunStore:
    """The store of the sweep. Raises `UserError` for an invalid name."""
    return RunStore.for_sweep(line.tree["results_dir"], str(line.tree["sweep"]))


def print_plan(console: Console, plan: Plan, options: Mapping[str, Any]) -> None:
    """Print the grid, cost, roundings and notes; `options`: the command's `workers`, `gpu`, `count`, `price_per_hour`."""
    console.print(grid_table(plan, console.out.width))
    console.print(
        f"{len(plan.runs)} runs, {plan.total_flops:.3g} FLOPs in total ({plan.convention})", markup=False
    )
    console.print(f"  time: {time_and_money(plan, options)}", markup=False)
    console.print(f"  disk: {disk_text(plan, options)}", markup=False)
    for title, lines in (("rounded", plan.rounding), ("note", shortened(plan.notes))):
        for line in lines[:MAX_REMARKS]:
            console.print(f"  {title}: {line}", markup=False)
        if len(lines) > MAX_REMARKS:
            console.print(
                f"  {title}: and {len(lines) - MAX_REMARKS:,} more; plan.json has them all", markup=False
            )


def shortened(notes: Sequence[str]) -> list[str]:
    """The notes with one of each series of sizes that are not planned: the other sizes of a budget have the same reason."""
    lines: list[str] = []
    for unplanned, series in groupby(notes, key=lambda note: note.startswith(NOT_PLANNED)):
        same = list(series)
        if unplanned and len(same) > 2:
            same = [same[0], f"{NOT_PLANNED} {len(same) - 1} more sizes of this budget; plan.json has them."]
        lines += same
    return lines


def time_and_money(plan: Plan, options: Mapping[str, Any]) -> str:
    """How long the plan takes and what it costs, with where the estimate comes from."""
    from scaling_lab.launching.speeds import speeds_for
    from scaling_lab.planning.cost import estimate_plan_seconds

    device = plan.runs[0].execution.device
    speeds = speeds_for(device, options.get("gpu"))
    if device == "cuda":
        return gpu_time_and_money(plan, speeds, options)
    workers = concurrent_runs(plan, options)
    seconds = estimate_plan_seconds(plan.runs, workers, speeds)
    if seconds is None:
        return f"unknown on {device}: probe=true measures it"
    plural = "s" * (workers != 1)
    return f"about {human_time(seconds)} with {workers} worker{plural} on {device} (from {speeds.source(plan.runs)})"


def gpu_time_and_money(plan: Plan, speeds: Speeds, options: Mapping[str, Any]) -> str:
    """The same for a plan on CUDA."""
    from scaling_lab.planning.devices import gpu_cost

    gpu = speeds.gpu
    if gpu is None:
        return "unknown on cuda: gpu=NAME (h100, a100, ...) shows it, with price_per_hour=P the cost"
    count = int(options.get("count") or 1)
    cost = gpu_cost(plan.runs, gpu, count, options.get("price_per_hour"), speeds.run_seconds)
    if cost is None:
        lacking = {run.spec.dtype for run in plan.runs if gpu.peak_flops_per_s(run.spec.dtype) is None}
        return f"{gpu.label} has no {' and no '.join(sorted(lacking))}: plan with dtype=float32"
    money = "" if cost.price is None else f", cost {human_amount(cost.price)}"
    return (
        f"about {human_time(cost.seconds)} on {count} x {gpu.label} ({human_amount(cost.gpu_seconds / 3600)} GPU hours{money}; "
        f"from {speeds.source(plan.runs)})"
    )


def concurrent_runs(plan: Plan, options: Mapping[str, Any]) -> int:
    """How many runs (or stacks) the local launcher would train at a time; on CUDA one on each of `count` GPUs."""
    execution = plan.runs[0].execution
    if execution.device == "cuda":
        return int(options.get("count") or 1)
    return int(options.get("workers") or max(1, usable_cores() // execution.threads))


def disk_text(plan: Plan, options: Mapping[str, Any]) -> str:
    """What the sweep takes on disk: curves, checkpoints while it runs, and what finished runs leave."""
    from scaling_lab.planning.cost import LEFT_BEHIND, disk_use

    keep = plan.runs[0].execution.keep
    use = disk_use(plan.runs, concurrent_runs(plan, options), keep)
    return (
        f"{human_bytes(use.curves)} of curves; checkpoints while it runs: up to {human_bytes(use.running)}; left behind: "
        f"{human_bytes(use.left)} ({LEFT_BEHIND[keep][1]})"
    )


def grid_table(plan: Plan, width: int) -> Any:
    """One row per run; on a narrow screen the least important columns are omitted."""
    from scaling_lab.planning.plan import describe

    rows = describe(plan, corpus_tokens(plan))
    columns: dict[str, Callable[[GridRow], str]] = {
        "param.": lambda row: row.parametrization,
        "budget FLOPs": lambda row: f"{row.budget_flops:.3g}",
        "width": lambda row: str(row.width),
        "depth": lambda row: str(row.depth),
        "N": lambda row: human_count(row.n_params),
        "tokens D": lambda row: human_count(row.train_tokens),
        "D/N": lambda row: (
            f"{row.tokens_per_param:.3g}" if row.tokens_per_param < 1000 else f"{row.tokens_per_param:,.0f}"
        ),
        "epochs": lambda row: f"{row.epochs:.2f}",
        "steps": lambda row: f"{row.steps:,}",
        "batch": lambda row: f"{row.batch_tokens:,}",
        "peak LR": lambda row: f"{row.peak_lr:.2g}",
        "seed": lambda row: str(row.seed),
        "compiled": lambda row: "yes" if row.compiled else "no",
    }
    # Columns that would say the same of every run: the standard parametrization, and no passes over an endless corpus.
    if all(row.parametrization == "standard" for row in rows):
        del columns["param."]
    if all(row.epochs < 0.005 for row in rows):
        del columns["epochs"]
    cells: list[tuple[str, ...]] = [tuple(text(row) for text in columns.values()) for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        cells.append((f"and {len(rows) - MAX_ROWS} more",))
    return fitting_table(
        f"sweep {plan.sweep}",
        dict.fromkeys(columns, "right"),
        cells,
        width,
        drop=("compiled", "seed", "peak LR", "batch", "steps", "epochs", "depth", "width", "D/N"),
        sections={i for i in range(1, len(rows)) if section_of(plan, i) != section_of(plan, i - 1)},
    )


def section_of(plan: Plan, row: int) -> Any:
    """The budget, by which rows are grouped; trunks, which have none, form a group of their own."""
    spec = plan.runs[row].spec
    return "trunk" if spec.role == "trunk" else spec.budget_flops


def corpus_tokens(plan: Plan) -> int | None:
    """Tokens in the training split, expected ones while it is not prepared; None if the data are not on this machine."""
    if plan.data_fingerprint == NOT_PREPARED:
        return needed_tokens(plan)
    try:
        data = plan.runs[0].spec.data
        assert isinstance(data, source_class(data.kind))
        return int(data.n_tokens("train"))
    except UserError:
        return None
