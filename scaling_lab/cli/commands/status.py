"""`scaling-lab status`: the state of every run of a sweep, and why runs failed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_lab.cli.commands.analyze import sweeps_of
from scaling_lab.cli.commands.report import existing_sweep
from scaling_lab.cli.display.console import Console, fitting_table
from scaling_lab.cli.display.sweep_status import RunRow, SweepStatus, grouped_reasons, read_status
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_count, human_time
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.store import LIVE, RunStore

if TYPE_CHECKING:
    from scaling_lab.analysis.finding import Finding

WATCH_EVERY_S = 2.0
# The most runs and reasons that the screen shows; runs in the states that may need attention come first.
MAX_ROWS, MAX_REASONS = 80, 20
URGENCY = ("running", "claimed", "failed", "diverged", "interrupted", "planned", "completed")
COLORS = {
    "completed": "green",
    "running": "cyan",
    "claimed": "cyan",
    "failed": "red",
    "diverged": "red",
    "interrupted": "yellow",
}


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
    plan = plan_of(store)
    now = read_status(store, plan)
    if console.json:
        found = [finding.to_json() for finding in findings_of_report(store)]
        print(json.dumps({**status_json(settings.sweep, now), "findings": found}, indent=1, allow_nan=False))
        return 0
    if "watch" in arguments.flags:
        now = _watch(console, store, plan, settings.sweep, now)
    _print_status(console, settings.sweep, now)
    for finding in findings_of_report(store):
        console.print(f"{finding.title}: {finding.answer}", markup=False)
    bad = sum(now.counts.get(name, 0) for name in ("failed", "diverged"))
    if bad:
        console.say(f"to retry them: scaling-lab sweep sweep={settings.sweep}{where} retry=failed")
    at_work = any(now.counts.get(name) for name in LIVE)
    following = "analyze" if now.is_finished else "report" if at_work else "sweep"
    console.next_step(f"scaling-lab {following} sweep={settings.sweep}{where}")
    return 0


def findings_of_report(store: RunStore) -> tuple[Finding, ...]:
    """What the sweep's last report found; nothing where there is no report that this version can read."""
    from scaling_lab.analysis.analysis_json import findings_of, read_document

    path = store.report_folder / "analysis.json"
    try:
        return findings_of(read_document(path)) if path.exists() else ()
    except UserError:
        return ()


def plan_of(store: RunStore) -> Plan | None:
    """The sweep's plan; single runs of `train` have none."""
    return store.read_plan() if store.plan_path.exists() else None


def _watch(console: Console, store: RunStore, plan: Plan | None, sweep: str, now: SweepStatus) -> SweepStatus:
    """Show the sweep until it is finished or the user presses Ctrl-C; returns its latest status."""
    try:
        if not console.out.is_terminal:
            while not now.is_finished:
                console.print(f"{sweep}: {now.headline()}", markup=False)
                time.sleep(WATCH_EVERY_S)
                now = read_status(store, plan, now)
            return now
        from rich.console import Group
        from rich.live import Live

        with Live(console=console.out, auto_refresh=False, transient=True) as live:
            while not now.is_finished:
                # The table's frame, its two captions, its last row and the headline take eight lines.
                rows = max(1, min(MAX_ROWS, console.out.height - 8))
                live.update(
                    Group(status_table(sweep, now.rows, console.out.width, rows), now.headline()),
                    refresh=True,
                )
                time.sleep(WATCH_EVERY_S)
                now = read_status(store, plan, now)
    except KeyboardInterrupt:
        pass
    return now


def _print_status(console: Console, sweep: str, now: SweepStatus) -> None:
    """The table of runs, why runs failed, and the totals."""
    if not console.quiet:
        console.print(status_table(sweep, now.rows, console.out.width))
        for line in grouped_reasons(now.rows, MAX_REASONS):
            console.print(line, markup=False)
    counts = ", ".join(f"{n} {name}" for name, n in now.counts.items())
    console.print(f"{counts}; {now.headline()}" if counts else "no runs yet", markup=False)
    error = now.last_error
    if error is not None and sum(now.counts.get(name, 0) for name in ("failed", "diverged")) > 1:
        reason = " ".join((error.reason or "").split())
        console.print(f"last error: {error.run_id} {error.state}: {reason}", markup=False)


def status_table(sweep: str, rows: Sequence[RunRow], width: int, limit: int = MAX_ROWS) -> Any:
    """One row per run; of more than `limit` runs those that may need attention. A narrow screen omits columns."""
    shown = rows
    if len(rows) > limit:
        shown = sorted(rows, key=lambda row: URGENCY.index(row.state.state))[:limit]
    cells = [_cells(row) for row in shown]
    if len(rows) > len(shown):
        rest = SweepStatus(tuple(sorted(rows, key=lambda row: URGENCY.index(row.state.state))[limit:])).counts
        cells.append([f"and {', '.join(f'{n:,} {name}' for name, n in rest.items())}"])
    return fitting_table(
        f"sweep {sweep}",
        {
            "run": "left", "FLOPs": "right", "N": "right", "D": "right", "state": "left", "progress": "left",
            "loss, nats": "left", "time": "left", "host and pid": "left",
        },
        cells,
        width,
        drop=("host and pid", "time", "D", "N", "FLOPs", "progress", "loss, nats"),
    )  # fmt: skip


def _cells(row: RunRow) -> list[Any]:
    from rich.text import Text

    spec, state, claim = row.spec, row.state, row.state.claim
    loss = state.final_val_loss_nats
    return [
        state.run_id,
        "" if spec is None else f"{spec.budget_flops:.3g}",
        "" if spec is None else human_count(spec.n_params()),
        "" if spec is None else human_count(spec.train_tokens),
        Text(state.state, style=COLORS.get(state.state, "")),
        f"{claim.step:,}/{claim.steps:,}" if claim is not None and claim.step else "",
        "" if loss is None else f"{loss:.4f}",
        "" if state.wall_time_s is None else human_time(state.wall_time_s),
        f"{claim.host} {claim.pid}" if claim is not None and state.state in LIVE else "",
    ]


def status_json(sweep: str, now: SweepStatus) -> dict[str, Any]:
    """The status as JSON."""
    runs = []
    for row in now.rows:
        cells = dataclasses.asdict(row.state)
        cells["budget_flops"] = None if row.spec is None else row.spec.budget_flops
        runs.append(cells)
    done, total = now.flops
    error = now.last_error
    return {
        "sweep": sweep,
        "counts": now.counts,
        "progress": {
            "flops_done": done,
            "flops_total": total,
            "flops_per_s": now.flops_per_s,
            "eta_s": now.eta_s,
        },
        "last_error": None if error is None else {"run_id": error.run_id, "reason": error.reason},
        "runs": runs,
    }


def _all_sweeps(settings: StatusCommand, console: Console, where: str) -> int:
    names = sweeps_of(settings.results_dir)
    if not names:
        raise UserError(f"there are no sweeps in {settings.results_dir}: `scaling-lab quickstart` makes one.")
    found: dict[str, dict[str, int] | None] = {}
    for name in names:
        store = RunStore.for_sweep(settings.results_dir, name)
        try:
            now = read_status(store, plan_of(store))
        except UserError as error:  # a broken plan must not hide the other sweeps
            found[name] = None
            console.warn(str(error))
            continue
        found[name] = now.counts
        console.print(
            f"{name}: " + (", ".join(f"{n} {state}" for state, n in now.counts.items()) or "no runs"),
            markup=False,
        )
    if console.json:
        print(json.dumps({"sweeps": found}, indent=1))
    console.next_step(f"scaling-lab status sweep={names[0]}{where}")
    return 0
