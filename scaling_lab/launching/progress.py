"""The progress of a sweep, read from its run folders, and the protocol through which launchers report it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from scaling_lab.core.formatting import human_time
from scaling_lab.core.reporter import Reporter
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.claims import ClaimInfo
from scaling_lab.core.storage.store import FINISHED, LIVE, RunState, RunStore

LINE_EVERY_S = 15.0


class SweepProgress:
    """The states of some runs of a sweep, updated from disk by `look`."""

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
        """Runs that the live process `pid` of this machine is training."""
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
                # An interrupted run counts too: work restored from its checkpoint is not progress of this launch.
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
    """Whether a claim belongs to process `pid` of this machine: other machines reuse the same numbers."""
    return claim.pid == pid and claim.is_local


class ProgressDisplay(Protocol):
    """Shows the progress of one sweep while it trains."""

    def show(self, progress: SweepProgress) -> None:
        """Called about once a second."""
        ...


class LaunchReporter(Reporter, Protocol):
    """Receives a launcher's messages and shows its progress; `cli/display/progress.py` has the terminal's."""

    def display(self, sweep: str) -> AbstractContextManager[ProgressDisplay]:
        """The display of one sweep, open while the sweep trains."""
        ...


class EndedRuns:
    """Which runs have ended since the last call."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def new(self, progress: SweepProgress) -> list[RunState]:
        ended = [
            s for s in progress.states.values() if s.state in FINISHED and s.run_id not in self._reported
        ]
        self._reported |= {s.run_id for s in ended}
        return ended


class LineDisplay:
    """Plain lines for logs and pipes: one for each run that ends, and a summary every 15 s."""

    def __init__(self, sweep: str, say: Callable[[str], None]) -> None:
        self.sweep, self.say = sweep, say
        self._ended, self._last_line = EndedRuns(), time.monotonic()

    def show(self, progress: SweepProgress) -> None:
        ended = self._ended.new(progress)
        for state in ended:
            self.say(ending_line(state))
        if ended or time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{self.sweep}: {progress.headline()}")


class LineReporter:
    """Prints lines to stdout and warnings to stderr: for jobs of a cluster and for scripts."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Details are not printed."""

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def display(self, sweep: str) -> Iterator[ProgressDisplay]:
        yield LineDisplay(sweep, self.say)


def ending_line(state: RunState) -> str:
    """How one run ended."""
    loss = (
        "" if state.final_val_loss_nats is None else f", validation loss {state.final_val_loss_nats:.4f} nats"
    )
    took = "" if state.wall_time_s is None else f" in {human_time(state.wall_time_s)}"
    why = f": {state.reason}" if state.reason else ""
    return f"{state.run_id} {state.state}{took}{loss}{why}"
