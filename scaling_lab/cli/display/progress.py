"""Owns what is shown while a sweep trains: how far each run is (read from the run folders) and when all will be done.

On a terminal a live table; elsewhere a line now and then, and one for each run that ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from scaling_lab.cli.display.console import Console, human_count, human_time
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.claims import ClaimInfo
from scaling_lab.core.storage.store import FINISHED, LIVE, RunState, RunStore

LINE_EVERY_S = 15.0
MAX_ROWS = 16


class Progress:
    """The states of some runs of a sweep, looked at again and again."""

    def __init__(self, store: RunStore, runs: Sequence[PlannedRun]) -> None:
        self.store = store
        self.flops = {run.run_id: run.spec.own_train_flops() for run in runs}
        self.states = {run.run_id: RunState(run.run_id, "planned") for run in runs}
        self.started = time.monotonic()
        self._done_at_start: float | None = None

    def look(self) -> None:
        """Read the folders of the runs that are not over."""
        runs = self.store.folder / "runs"
        present = {p.name for p in runs.iterdir()} if runs.is_dir() else set()
        for run_id, state in self.states.items():
            if state.state not in FINISHED and run_id in present:
                self.states[run_id] = self.store.state(run_id)
        if self._done_at_start is None:
            self._done_at_start = self.done_flops()

    def is_over(self, run_id: str) -> bool:
        return run_id in self.states and self.states[run_id].state in FINISHED

    def open_ids(self) -> list[str]:
        return [i for i, s in self.states.items() if s.state not in FINISHED]

    def claimable_ids(self) -> list[str]:
        return [i for i, s in self.states.items() if s.state in ("planned", "interrupted")]

    def running(self) -> list[RunState]:
        return [s for s in self.states.values() if s.state in LIVE]

    def claimed_by(self, pid: int) -> list[str]:
        """Runs that a live process of this number computes."""
        return [s.run_id for s in self.running() if s.claim is not None and _is_of(s.claim, pid)]

    def last_claimed_by(self, pid: int) -> list[str]:
        """Runs whose newest claim, live or not, is this process's."""
        return [s.run_id for s in self.states.values() if s.claim is not None and _is_of(s.claim, pid)]

    def count(self, *names: str) -> int:
        return sum(s.state in names for s in self.states.values())

    def done_flops(self) -> float:
        """FLOPs of the runs that are over and of the steps done in those that are not."""
        total = 0.0
        for run_id, state in self.states.items():
            if state.state in FINISHED:
                total += self.flops[run_id]
            elif state.claim is not None and state.claim.steps:
                # An interrupted run counts too: what its checkpoint brings back is not gained in this launch.
                total += self.flops[run_id] * state.claim.step / state.claim.steps
        return total

    def flops_per_s(self) -> float | None:
        """Measured since the launch; None until something was measured."""
        elapsed = time.monotonic() - self.started
        gained = self.done_flops() - (self._done_at_start or 0.0)
        return gained / elapsed if gained > 0 and elapsed > 0 else None

    def eta_s(self) -> float | None:
        """FLOPs left over measured FLOP/s."""
        rate = self.flops_per_s()
        return None if rate is None else (sum(self.flops.values()) - self.done_flops()) / rate

    def headline(self) -> str:
        """One line about all runs."""
        n, bad = len(self.states), self.count("failed", "diverged")
        parts = [f"{self.count(*FINISHED)}/{n} runs done", f"{self.count(*LIVE)} running"]
        if bad:
            parts.append(f"{bad} failed or diverged")
        rate, eta = self.flops_per_s(), self.eta_s()
        if rate is not None and eta is not None:
            parts += [f"{rate / 1e9:.3g} GFLOP/s", f"ETA {human_time(eta)}"]
        parts.append(f"{human_time(time.monotonic() - self.started)} so far")
        return ", ".join(parts)


def _is_of(claim: ClaimInfo, pid: int) -> bool:
    """Whether a claim is this machine's process `pid`'s: other machines' processes may have the same number."""
    return claim.pid == pid and claim.is_local


class Display:
    """Shows a `Progress`, as the place allows."""

    def __init__(self, console: Console, sweep: str) -> None:
        self.console, self.sweep = console, sweep
        self._told: set[str] = set()
        self._last_line = time.monotonic()

    @staticmethod
    @contextmanager
    def open(console: Console, sweep: str) -> Iterator[Display]:
        """The display that suits: a live table on a terminal, lines elsewhere, nothing under --quiet."""
        if console.quiet:
            yield Display(console, sweep)
        elif not console.out.is_terminal or console.json:
            yield Lines(console, sweep)
        else:
            from rich.live import Live

            # Redrawn by `show` alone: no thread beside the one that starts processes.
            with Live(console=console.out, auto_refresh=False, transient=True) as live:
                yield LiveTable(console, sweep, live)

    def show(self, progress: Progress) -> None:
        pass

    def newly_over(self, progress: Progress) -> list[RunState]:
        """Runs that ended since the last call."""
        new = [s for s in progress.states.values() if s.state in FINISHED and s.run_id not in self._told]
        self._told |= {s.run_id for s in new}
        return new


class Lines(Display):
    """Plain lines for logs and pipes."""

    def show(self, progress: Progress) -> None:
        ended = self.newly_over(progress)
        for state in ended:
            self.console.say(ending_line(state))
        if ended or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.console.say(f"{self.sweep}: {progress.headline()}")


class LiveTable(Display):
    """A table that stays in place."""

    def __init__(self, console: Console, sweep: str, live: Any) -> None:
        super().__init__(console, sweep)
        self._live = live

    def show(self, progress: Progress) -> None:
        for state in self.newly_over(progress):
            self._live.console.print(ending_line(state), markup=False, soft_wrap=True)
        self._live.update(running_table(self.sweep, progress), refresh=True)


def ending_line(state: RunState) -> str:
    """How one run ended."""
    loss = (
        "" if state.final_val_loss_nats is None else f", validation loss {state.final_val_loss_nats:.4f} nats"
    )
    took = "" if state.wall_time_s is None else f" in {human_time(state.wall_time_s)}"
    why = f": {state.reason}" if state.reason else ""
    return f"{state.run_id} {state.state}{took}{loss}{why}"


def running_table(sweep: str, progress: Progress) -> Any:
    """The runs under way."""
    from rich.table import Table

    running = progress.running()
    if not running:
        return f"{sweep}: {progress.headline()}"
    table = Table(title=f"{sweep}: {progress.headline()}", title_justify="left", expand=False)
    for name in ("run", "step", "done", "tokens/s", "train loss"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for state in running[:MAX_ROWS]:
        claim = state.claim
        if claim is None or not claim.step:
            table.add_row(state.run_id, "starting", "", "", "")
            continue
        table.add_row(
            state.run_id,
            f"{claim.step:,}/{claim.steps:,}",
            f"{claim.step / claim.steps:.0%}",
            "" if claim.tokens_per_s is None else human_count(claim.tokens_per_s),
            "" if claim.train_loss_nats is None else f"{claim.train_loss_nats:.3f}",
        )
    if len(running) > MAX_ROWS:
        table.add_row(f"and {len(running) - MAX_ROWS} more", "", "", "", "")
    return table
