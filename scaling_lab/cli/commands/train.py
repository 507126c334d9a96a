"""`scaling-lab train`: one run; with -m, an ordinary Hydra multirun of such runs."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import CommandLine, hydra_overrides, read_command
from scaling_lab.cli.options.configs import config_folders
from scaling_lab.cli.options.forms import Form
from scaling_lab.cli.options.hydra_config import run_multirun
from scaling_lab.cli.options.machine import has_bfloat16
from scaling_lab.cli.options.study import TrainOnly, form_of_tree, study_form, sweep_settings, tracker_options
from scaling_lab.core.errors import Interrupted, UserError
from scaling_lab.core.formatting import human_count, human_time
from scaling_lab.core.installation import require
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.progress import ending_line
from scaling_lab.launching.sweeping import plain
from scaling_lab.planning.plan import plan_single, single_notes
from scaling_lab.planning.settings import SweepSettings
from scaling_lab.tracking.wandb.study import report_unsynced_runs

LINE_EVERY_S = 5.0


def form(arguments: Arguments) -> Form:
    return study_form(arguments, "train", (TrainOnly,))


def run(arguments: Arguments) -> int:
    """Under torchrun every process comes here; all but the first follow it in what is trained, and say nothing."""
    multirun = "multirun" in arguments.flags
    command = read_command(
        arguments,
        "train",
        lambda tree: form_of_tree(tree, extra=(TrainOnly,)),
        multirun=multirun,
        launches=multirun,
    )
    require("torch", "training")
    # Every run is planned before the first one starts: if one is impossible, none is trained.
    planned = {p.run_id: p for p in (planned_run(c.tree) for c in command.combinations)}
    from scaling_lab.training.parallel.team import joined

    with joined(str(command.tree["parallel"]), str(command.tree.get("device", "auto"))) as team:
        if team is not None and not team.leads:
            from scaling_lab.training.run.follower import Follower

            return Follower(team).serve()
        return train_planned(command, planned, arguments.flags)


def train_planned(command: CommandLine, planned: dict[str, PlannedRun], flags: frozenset[str]) -> int:
    store = RunStore.for_sweep(command.tree["results_dir"], str(command.tree["sweep"]))
    console, multirun = Console.for_flags(flags), "multirun" in flags
    if multirun:
        job = partial(train_job, flags=flags)
        run_multirun("train", hydra_overrides(command), job, config_folders(command.config_dir))
    else:
        train_one(command.tree, console)
    states = [store.state(run_id) for run_id in planned]
    if multirun:
        for state in states:
            console.say(ending_line(state))
    report_unsynced_runs(store, console)
    console.print(f"records: {store.folder / 'runs'}", highlight=False, markup=False)
    results = command.tree["results_dir"]
    console.next_step(
        f"scaling-lab status sweep={store.folder.name}"
        + ("" if results == "results" else f" results_dir={results}")
    )
    return 0 if all(state.state == RunStatus.COMPLETED for state in states) else 1


def planned_run(tree: dict[str, Any]) -> PlannedRun:
    """The run that a composed tree describes. Raises `UserError` for options that make no run, or none on this machine."""
    planned = plan_single(*run_settings(tree))
    lacking = planned.execution.device == "cuda" and has_bfloat16(None) is False
    if planned.spec.dtype == "bfloat16" and lacking:
        raise UserError("dtype=bfloat16: this machine's GPU does not have it. Choices: auto, float32.")
    return planned


def run_settings(tree: dict[str, Any]) -> tuple[SweepSettings, float]:
    """(settings, tokens) of one run. Raises `UserError` for a missing or bad option."""
    if tree.get("train_tokens") is None:
        raise UserError("train_tokens is missing: how long to train, for example train_tokens=2M.")
    return sweep_settings(tree, (TrainOnly,)), float(tree["train_tokens"])


def train_job(config: Any, flags: frozenset[str] = frozenset()) -> str:
    """The job of a multirun, in whichever process a launcher runs it. Returns the run's id."""
    return train_one(plain(config), Console.for_flags(flags))


def train_one(tree: dict[str, Any], console: Console) -> str:
    """Train one run in this process. Returns its id."""
    from scaling_lab.launching.worker import train_claimed
    from scaling_lab.tracking.sink.trackers import mirrors_closed
    from scaling_lab.training.engine.devices import resolve_device

    planned = planned_run(tree)
    resolve_device(planned.execution.device)
    store = RunStore.for_sweep(Path(str(tree["results_dir"])), str(tree["sweep"]))
    spec = planned.spec
    claim = store.claim(spec)
    if claim is None:
        state = store.state(planned.run_id)
        refuse_changed_data(store, planned)
        console.say(f"{planned.run_id} is {state.state} already: nothing to do.")
        return planned.run_id
    console.say(
        f"{planned.run_id}: N={human_count(spec.n_params())}, D={human_count(spec.train_tokens)}, "
        f"{spec.train_flops():.3g} FLOPs, {spec.steps:,} steps of {spec.batch_tokens:,} tokens on {planned.execution.device}"
    )
    for note in single_notes(*run_settings(tree)):
        console.say(f"  note: {note}")
    try:
        with mirrors_closed(), _ProgressLines(store, planned, console):
            train_claimed(planned, store, claim, None, tracker_options(tree))
    except Interrupted as stop:
        raise stop.with_hint("the run has not finished; the same command resumes it.") from None
    console.say(ending_line(store.state(planned.run_id)))
    return planned.run_id


def refuse_changed_data(store: RunStore, planned: PlannedRun) -> None:
    """Raise `UserError` if the run was completed on data that have changed since."""
    data = planned.spec.data
    if store.state(planned.run_id).state != RunStatus.COMPLETED:
        return
    seen = store.read_record(planned.run_id, curve=False).environment.data_fingerprint
    if seen != data.fingerprint():
        raise UserError(
            f"data={data.kind} has changed since {planned.run_id} was trained (content {seen[:12]} then, "
            f"{data.fingerprint()[:12]} now): give the new runs their own folder, sweep=NAME."
        )


class _ProgressLines:
    """Reports the run's progress every few seconds, read from its claim."""

    def __init__(self, store: RunStore, planned: PlannedRun, console: Console) -> None:
        self.store, self.planned, self.console = store, planned, console

    def __enter__(self) -> None:
        import threading

        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(LINE_EVERY_S):
            claim = self.store.state(self.planned.run_id).claim
            if claim is None or not claim.step or claim.released:
                continue
            elapsed = time.monotonic() - started
            eta = elapsed * (claim.steps - claim.step) / claim.step
            loss = "" if claim.train_loss_nats is None else f", train loss {claim.train_loss_nats:.3f}"
            self.console.say(f"  step {claim.step:,}/{claim.steps:,}{loss}, ETA {human_time(eta)}")
