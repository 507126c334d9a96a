"""Console output: results on stdout, progress and warnings on stderr; with --json, only JSON on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

# Wide enough that output to a file or a pipe is not cropped, unless COLUMNS is set.
PIPED_WIDTH = 400


class Console:
    """A rich console that follows --json, --quiet and --verbose."""

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
        """Print a result to stdout, unless --json."""
        if not self.json:
            # Soft wrap keeps long paths intact, so that they can be clicked and copied.
            self.out.print(
                *things, **({"soft_wrap": True} | options if isinstance(things[0], str) else options)
            )

    def say(self, text: str) -> None:
        """Print progress, unless --quiet: to stdout, or with --json to stderr."""
        if not self.quiet:
            (self.err if self.json else self.out).print(text, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """Print a detail to stderr if --verbose."""
        if self.verbose:
            self.err.print(text, style="dim", soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        self.err.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)

    def next_step(self, command: str) -> None:
        """Print the command to try next, the last line of every command."""
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
    """A table whose cells are never cropped: if it is too wide, whole columns are omitted and named in the caption.

    Args:
        columns: name -> alignment.
        rows: cells, str or rich's Text; shorter rows are padded.
        drop: names of columns that may be omitted, the least important first.
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
    omitted: list[str] = []
    for name in (n for n in drop if n in needed):
        if sum(needed[n] + 3 for n in names if n not in omitted) + 1 <= width:
            break
        omitted.append(name)
    caption = f"too narrow for: {', '.join(n for n in names if n in omitted)}" if omitted else None
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    shown = [i for i, name in enumerate(names) if name not in omitted]
    for i in shown:
        table.add_column(names[i], justify=columns[names[i]], no_wrap=True)
    for at, row in enumerate(rows):
        if at in sections:
            table.add_section()
        table.add_row(*(row[i] if i < len(row) else "" for i in shown))
    return table
