"""Progress display of prepare-data on stderr: a bar on a terminal, otherwise occasional lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scaling_lab.cli.display.console import Console
from scaling_lab.core.formatting import human_count, human_time
from scaling_lab.corpora.pipeline import OPENING, TRAINING_BPE, Stage
from scaling_lab.launching.progress import LINE_EVERY_S


class Pace:
    """Speed and ETA of a stage, measured since it began."""

    def __init__(self) -> None:
        self._doing = ""
        self._began = (0.0, 0, 0.0)

    def text(self, stage: Stage) -> str:
        """The stage's tokens, speed and ETA, as far as known."""
        now = time.monotonic()
        if stage.doing != self._doing:
            self._doing, self._began = stage.doing, (now, stage.tokens, stage.share or 0.0)
        began, tokens, share = self._began
        elapsed, gained = now - began, stage.tokens - tokens
        parts = [f"{human_count(stage.tokens)} tokens"] if stage.tokens else []
        # Tokens from an earlier attempt do not count toward the speed.
        if gained > 0 and elapsed > 0:
            parts.append(f"{human_count(gained / elapsed)} tokens/s")
        if stage.share is not None and stage.share > share and elapsed > 0:
            parts.append(f"ETA {human_time(elapsed * (1.0 - stage.share) / (stage.share - share))}")
        return ", ".join(parts)


class PrepareDisplay:
    """Shows nothing, for --quiet."""

    def show(self, stage: Stage) -> None:
        pass

    @staticmethod
    @contextmanager
    def open(console: Console, name: str) -> Iterator[PrepareDisplay]:
        """A bar if stderr is a terminal, lines otherwise, nothing with --quiet."""
        if console.quiet:
            yield PrepareDisplay()
        elif not console.err.is_terminal:
            yield PrepareLines(console, name)
        else:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

            columns = (
                SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
                TaskProgressColumn(text_format_no_percentage=""), TextColumn("{task.fields[text]}", markup=False),
            )  # fmt: skip
            # Updated by its own thread, so that it keeps moving during stages without updates.
            with Progress(*columns, console=console.err, transient=True) as bar:
                yield PrepareBar(bar, name)


class PrepareLines(PrepareDisplay):
    """Plain lines for logs and pipes: every few seconds, and before stages that may take long without updates."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name, self._pace = console, name, Pace()
        self._last = time.monotonic()

    def show(self, stage: Stage) -> None:
        pace = self._pace.text(stage)
        # Announce stages that give no updates; others only when they take long.
        announce = stage.doing == TRAINING_BPE or (stage.doing == OPENING and stage.tokens)
        if not announce and time.monotonic() - self._last < LINE_EVERY_S:
            return
        self._last = time.monotonic()
        share = "" if stage.share is None else f" {stage.share:.0%}"
        line = f"{self._name}: {stage.doing}{share}{', ' if pace else ''}{pace}"
        self._console.err.print(line, soft_wrap=True, markup=False)


class PrepareBar(PrepareDisplay):
    """A bar that stays in place."""

    def __init__(self, bar: Any, name: str) -> None:
        self._bar, self._name, self._pace = bar, name, Pace()
        self._doing, self._task = "", None

    def show(self, stage: Stage) -> None:
        if stage.doing != self._doing:
            # A new task, because rich cannot unset a total, and without a total the bar pulses.
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._doing = stage.doing
            self._task = self._bar.add_task(f"{self._name}: {stage.doing}", total=None, text="")
        if stage.share is not None:
            self._bar.update(self._task, total=1.0, completed=stage.share)
        self._bar.update(self._task, text=self._pace.text(stage))
