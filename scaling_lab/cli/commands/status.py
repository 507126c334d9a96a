"""Owns `scaling-lab status`: where every run of a sweep stands, and why those that failed did."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from scaling_lab.cli.arguments import Arguments
from scaling_lab.cli.commands.analyze import sweeps_of
from scaling_lab.cli.commands.report import existing_sweep
from scaling_lab.cli.compose import read_command
from scaling_lab.cli.console import Console, fitting_table, human_count, human_time
from scaling_lab.cli.forms import Form, build, options_of
from scaling_lab.cli.progress import OVER
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import RunSpec
from scaling_lab.core.store import RunState, RunStore

WATCH_EVERY_S = 2.0


@dataclass(frozen=True)
class StatusCommand:
    """Options of `status`."""

    sweep: str | None = None
    """The sweep, a folder of results_dir; without it, one line for each sweep"""
    results_dir: str = "results"
    """Folder of the sweeps"""


def form(arguments: Arguments) -> Form:
    return Form(options_of(StatusCommand))


def run(arguments: Arguments) -> int:
    command = read_command(arguments, None, lambda tree: form(arguments))
    settings: StatusCommand = build(StatusCommand, command.tree)
    console = Console.for_flags(arguments.flags)
    where = "" if settings.results_dir == "results" else f" results_dir={settings.results_dir}"
    if settings.sweep is None:
        return _all_sweeps(settings, console, where)
    store = existing_sweep(settings.results_dir, settings.sweep)
    states = read_states(store)
    if "json" in arguments.flags:
        print(json.dumps(status_json(settings.sweep, states), indent=1, allow_nan=False))
        return 0
    while "watch" in arguments.flags and any(s.state not in OVER for _, s in states):
        if console.out.is_terminal:
            console.out.clear()
        _print_states(console, settings.sweep, states)
        time.sleep(WATCH_EVERY_S)
        states = read_states(store)
    _print_states(console, settings.sweep, states)
    counts = Counter(state.state for _, state in states)
    console.print(", ".join(f"{n} {name}" for name, n in counts.items()) or "no runs yet")
    over = all(state.state in OVER for _, state in states)
    running = bool(counts["running"])
    following = "analyze" if over else "report" if running else "sweep"
    console.next_step(f"scaling-lab {following} sweep={settings.sweep}{where}")
    return 0


def read_states(store: RunStore) -> list[tuple[RunSpec | None, RunState]]:
    """Every run of the plan, and those that have a folder without being in it (train's), with their specs."""
    specs: dict[str, RunSpec | None] = {}
    if store.plan_path.exists():
        specs = {run.run_id: run.spec for run in store.read_plan().runs}
    runs = store.folder / "runs"
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        if folder.name not in specs and (folder / "spec.json").is_file():
            specs[folder.name] = _spec(folder / "spec.json")
    return [(spec, store.state(run_id)) for run_id, spec in specs.items()]


def _spec(path: Any) -> RunSpec | None:
    try:
        return RunSpec.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, OSError):
        return None  # shown without its numbers; what is wrong with it is the analysis's to say


def _print_states(console: Console, sweep: str, states: list[tuple[RunSpec | None, RunState]]) -> None:
    """The table, and below it, whole, why runs did not end well."""
    console.print(status_table(sweep, states, console.out.width))
    for _, state in states:
        if state.reason:
            reason = " ".join(state.reason.split())
            console.print(f"{state.run_id} {state.state}: {reason}", markup=False)


def status_table(sweep: str, states: list[tuple[RunSpec | None, RunState]], width: int) -> Any:
    """One row a run; on a screen of few columns without the least important ones."""
    from rich.text import Text

    colours = {
        "completed": "green",
        "running": "cyan",
        "failed": "red",
        "diverged": "red",
        "interrupted": "yellow",
    }
    rows = []
    for spec, state in states:
        claim = state.claim
        loss = state.final_val_loss_nats
        cells: list[Any] = [
            state.run_id,
            "" if spec is None else f"{spec.budget_flops:.3g}",
            "" if spec is None else human_count(spec.n_params()),
            "" if spec is None else human_count(spec.train_tokens),
            Text(state.state, style=colours.get(state.state, "")),
            f"{claim.step:,}/{claim.steps:,}" if claim is not None and claim.step else "",
            "" if loss is None else f"{loss:.4f}",
            "" if state.wall_time_s is None else human_time(state.wall_time_s),
        ]
        rows.append(cells)
    return fitting_table(
        f"sweep {sweep}",
        {
            "run": "left", "FLOPs": "right", "N": "right", "D": "right", "state": "left", "progress": "left",
            "loss, nats": "left", "time": "left",
        },
        rows,
        width,
        drop=("time", "D", "N", "FLOPs", "progress", "loss, nats"),
    )  # fmt: skip


def status_json(sweep: str, states: list[tuple[RunSpec | None, RunState]]) -> dict[str, Any]:
    """The same for programs."""
    runs = []
    for spec, state in states:
        row = dataclasses.asdict(state)
        row["budget_flops"] = None if spec is None else spec.budget_flops
        runs.append(row)
    return {"sweep": sweep, "counts": dict(Counter(s.state for _, s in states)), "runs": runs}


def _all_sweeps(settings: StatusCommand, console: Console, where: str) -> int:
    names = sweeps_of(settings.results_dir)
    if not names:
        raise UserError(f"there are no sweeps in {settings.results_dir}: `scaling-lab quickstart` makes one.")
    found = {}
    for name in names:
        counts = Counter(s.state for _, s in read_states(RunStore.for_sweep(settings.results_dir, name)))
        found[name] = dict(counts)
        console.print(
            f"{name}: " + (", ".join(f"{n} {state}" for state, n in counts.items()) or "no runs"),
            markup=False,
        )
    if console.json:
        print(json.dumps({"sweeps": found}, indent=1))
    console.next_step(f"scaling-lab status sweep={names[0]}{where}")
    return 0
