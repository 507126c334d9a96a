"""Owns what people see: results on stdout, progress and warnings on stderr, nothing beside JSON where JSON is asked."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any


class Console:
    """A rich console that knows --json, --quiet and --verbose."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.json, self.quiet, self.verbose = json, quiet, verbose
        width = None if sys.stdout.isatty() else 110
        self.out = RichConsole(file=sys.stdout, width=width, soft_wrap=False, highlight=False)
        self.err = RichConsole(file=sys.stderr, width=None if sys.stderr.isatty() else 200, highlight=False)

    @staticmethod
    def for_flags(flags: Collection[str]) -> Console:
        return Console(json="json" in flags, quiet="quiet" in flags, verbose="verbose" in flags)

    def print(self, *things: Any, **options: Any) -> None:
        """A result, on stdout; nothing under --json."""
        if not self.json:
            # Long paths stay whole, to be clicked and copied.
            self.out.print(
                *things, **({"soft_wrap": True} | options if isinstance(things[0], str) else options)
            )

    def say(self, text: str) -> None:
        """What is going on, unless --quiet: on stdout, or on stderr where stdout is for JSON."""
        if not self.quiet:
            (self.err if self.json else self.out).print(text, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """A detail, under --verbose."""
        if self.verbose:
            self.err.print(text, style="dim", soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        """Something that the user should know, on stderr."""
        self.err.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)

    def next_step(self, command: str) -> None:
        """The command to try next: the last line of every command."""
        if not self.json and not self.quiet:
            self.out.print(f"next: {command}", soft_wrap=True, markup=False)


def human_count(value: float) -> str:
    """12_345 as 12.3K: parameters and tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def human_time(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    s = round(max(0.0, seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
