"""The progress of a sweep on a terminal: a live table, plain lines where stdout is not a terminal, nothing with --quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scaling_lab.cli.display.console import Console
from scaling_lab.core.formatting import human_count
from scaling_lab.launching.progress import (
    EndedRuns,
    LineDisplay,
    ProgressDisplay,
    SweepProgress,
    ending_line,
)

MAX_ROWS = 16


class ConsoleReporter:
    """A `LaunchReporter` that writes to a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.say, self.note, self.warn = console.say, console.note, console.warn

    @contextmanager
    def display(self, sweep: str) -> Iterator[ProgressDisplay]:
        """The display that fits the console's flags and its terminal."""
        if self.console.quiet:
            yield QuietDisplay()
        elif not self.console.out.is_terminal or self.console.json:
            yield LineDisplay(sweep, self.console.say)
        else:
            from rich.live import Live

            # Redrawn by `show` alone: no extra thread in a process that starts others.
            with Live(console=self.console.out, auto_refresh=False, transient=True) as live:
                yield LiveTable(sweep, live)


class QuietDisplay:
    """Shows nothing."""

    def show(self, progress: SweepProgress) -> None:
        pass


class LiveTable:
    """A table that is redrawn in place; runs that end are printed above it."""

    def __init__(self, sweep: str, live: Any) -> None:
        self.sweep, self._live, self._ended = sweep, live, EndedRuns()

    def show(self, progress: SweepProgress) -> None:
        for state in self._ended.new(progress):
            self._live.console.print(ending_line(state), markup=False, soft_wrap=True)
        self._live.update(running_table(self.sweep, progress), refresh=True)


def running_table(sweep: str, progress: SweepProgress) -> Any:
    """The runs that are being trained."""
    from rich.table import Table

    running = progress.running()
    if not running:
        return f"{sweep}: {progress.headline()}"
    table = Table(title=f"{sweep}: {progress.headline()}", title_justify="left", expand=False)
    # Only GPUs whose peak is known have an MFU.
    has_mfu = any(state.claim is not None and state.claim.mfu is not None for state in running)
    names = ("run", "step", "done", "tokens/s", *(["MFU"] if has_mfu else []), "train loss")
    for name in names:
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for state in running[:MAX_ROWS]:
        claim = state.claim
        if claim is None or not claim.step:
            table.add_row(state.run_id, "starting", *[""] * (len(names) - 2))
            continue
        table.add_row(
            state.run_id,
            f"{claim.step:,}/{claim.steps:,}",
            f"{claim.step / claim.steps:.0%}",
            "" if claim.tokens_per_s is None else human_count(claim.tokens_per_s),
            *([] if not has_mfu else ["" if claim.mfu is None else f"{claim.mfu:.1%}"]),
            "" if claim.train_loss_nats is None else f"{claim.train_loss_nats:.3f}",
        )
    if len(running) > MAX_ROWS:
        table.add_row(f"and {len(running) - MAX_ROWS} more", *[""] * (len(names) - 1))
    return table
