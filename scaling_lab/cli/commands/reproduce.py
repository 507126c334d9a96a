"""`scaling-lab reproduce`: published results from the packaged data, side by side with the papers' numbers."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from scaling_lab.cli.commands.analyze import command_text
from scaling_lab.cli.display.console import Console
from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of

if TYPE_CHECKING:
    from scaling_lab.analysis.reproduce import ComparisonRow, ComparisonTable, Reproduction

_COLUMNS = ("quantity", "published", "ours", "difference", "published interval", "agreement", "note")


def form(arguments: Arguments) -> Form:
    from scaling_lab.analysis.reproduce import ALL, ReproduceSettings, publication_names

    options = options_of(ReproduceSettings)
    names = (*publication_names(), ALL)
    options["published"] = replace(options["published"], value_type=Literal[names] | None)
    return Form(options)


def run(arguments: Arguments) -> int:
    from scaling_lab.analysis.reproduce import ReproduceSettings, reproduce

    command = read_command(arguments, None, lambda tree: form(arguments))
    settings: ReproduceSettings = build(ReproduceSettings, command.tree)
    console = Console.for_flags(arguments.flags)
    made: list[Reproduction] = []
    for name in settings.names:
        made.append(reproduce(name, resamples=settings.resamples, seed=settings.seed))
        if not console.json:
            print_reproduction(console, made[-1])
    if console.json:
        print(json.dumps(_document(made, command_text(arguments)), indent=1, allow_nan=False))
    console.next_step(_next(made[0]) if len(made) == 1 else "scaling-lab analyze runs=FILE")
    return 0


def print_reproduction(console: Console, made: Reproduction) -> None:
    """Print a heading, a table for each part, and the numbered notes of the tables."""
    console.print(f"{made.name}: {made.title}", style="bold", markup=False)
    console.print(f"  {made.reference}", markup=False)
    console.print(f"  data: {made.data}", markup=False)
    notes: dict[str, int] = {}
    for part in made.parts:
        console.print(_table(part, notes))
        if part.options and made.table is not None:
            console.note(f"scaling-lab analyze runs={shlex.quote(str(made.table))} {part.options}")
    if any(row.published is not None and row.source == "reference" for row in made.rows):
        console.print(
            "  * not in the paper: computed independently of this project from the same data or constants",
            markup=False,
        )
    for remark, number in notes.items():
        console.print(f"  ({number}) {remark}", markup=False)
    console.print("")


def _table(part: ComparisonTable, notes: dict[str, int]) -> Table:
    """Columns that are empty in every row are omitted."""
    cells = [_cells(row, notes) for row in part.rows]
    table = Table(title=part.title, title_justify="left")
    shown = [k for k in range(len(_COLUMNS)) if any(row[k] for row in cells)]
    for k in shown:
        table.add_column(
            _COLUMNS[k], justify="right" if _COLUMNS[k] in ("published", "ours", "difference") else "left"
        )
    for row in cells:
        table.add_row(*(row[k] for k in shown))
    return table


def _cells(row: ComparisonRow, notes: dict[str, int]) -> tuple[str, ...]:
    number = "" if row.remark is None else f"({notes.setdefault(row.remark, len(notes) + 1)})"
    star = "*" if row.source == "reference" and row.published is not None else ""
    published = f"{row.published or ''}{star}"
    return row.quantity, published, _ours(row), _difference(row), _interval(row), row.verdict, number


def _ours(row: ComparisonRow) -> str:
    """Our value with one digit more than the published one, so that differences below its rounding are visible."""
    if row.published is None:
        return f"{row.ours:.4g}"
    published = Decimal(row.published)
    exponent = int(published.as_tuple().exponent)
    if "e" in row.published.lower():
        return f"{row.ours:.{len(published.as_tuple().digits)}e}".replace("e+", "e")
    return f"{row.ours:.{min(16, max(0, -exponent + 1))}f}"


def _difference(row: ComparisonRow) -> str:
    return "" if row.difference is None else f"{row.difference:+.2g}" if row.difference else "0"


def _interval(row: ComparisonRow) -> str:
    if row.interval is None:
        return ""
    return f"{row.interval.lo:.4g} to {row.interval.hi:.4g} ({row.interval_kind})"


def _next(made: Reproduction) -> str:
    """The command that computes the first part's numbers; if there is none, another publication."""
    options = next((p.options for p in made.parts if p.options), None)
    if made.table is None or options is None:
        return "scaling-lab reproduce published=all"
    return f"scaling-lab analyze runs={shlex.quote(str(made.table))} {options} out=reproduced"


def _document(made: list[Reproduction], command: str) -> dict[str, object]:
    from scaling_lab.analysis.analysis_json import default_versions
    from scaling_lab.analysis.reproduce import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "versions": default_versions(),
        "publications": [m.to_json_dict() for m in made],
    }
