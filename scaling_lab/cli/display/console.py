"""Owns what people see: results on stdout, progress and warnings on stderr, nothing beside JSON where JSON is asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

# Of output into a file or a pipe nothing is cropped; COLUMNS says otherwise.
PIPED_WIDTH = 400


class Console:
    """A rich console that knows --json, --quiet and --verbose."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.json, self.quiet, self.verbose = json, quiet, verbose
        columns = os.environ.get("COLUMNS", "")
        width = None if sys.stdout.isatty() else int(columns) if columns.isdecimal() else PIPED_WIDTH
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


def fitting_table(
    title: str,
    columns: Mapping[str, Literal["left", "right"]],
    rows: Sequence[Sequence[Any]],
    width: int,
    *,
    drop: Sequence[str] = (),
    sections: Collection[int] = (),
) -> Any:
    """A table whose cells are never cropped: where `width` does not do, whole columns are left out and named.

    Args:
        columns: name -> how its cells stand.
        rows: cells, texts or rich's Text, as many as there are columns (a shorter row is filled up).
        drop: names of columns that may be left out, the least important first.
        sections: rows before which a line is drawn.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    names = list(columns)
    needed = {
        name: max([cell_len(name), *(cell_len(str(row[i])) for row in rows if i < len(row))])
        for i, name in enumerate(names)
    }
    left_out: list[str] = []
    for name in (n for n in drop if n in needed):
        if sum(needed[n] + 3 for n in names if n not in left_out) + 1 <= width:
            break
        left_out.append(name)
    caption = f"too narrow for: {', '.join(n for n in names if n in left_out)}" if left_out else None
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    shown = [i for i, name in enumerate(names) if name not in left_out]
    for i in shown:
        table.add_column(names[i], justify=columns[names[i]], no_wrap=True)
    for at, row in enumerate(rows):
        if at in sections:
            table.add_section()
        table.add_row(*(row[i] if i < len(row) else "" for i in shown))
    return table
