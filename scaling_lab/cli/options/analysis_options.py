"""Owns the options of an analysis on the command line: the form made from `AnalysisSettings`, and the way back to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scaling_lab.cli.options.arguments import Arguments, Assignment
from scaling_lab.cli.options.configs import config_folders, plain_tree
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.cli.options.values import unquoted

if TYPE_CHECKING:
    from scaling_lab.analysis.settings import AnalysisSettings

FREE = {
    "approach.parametric.law_options.": "an option of the law's own",
    "where.": "keep rows with this value; where.COLUMN.min= and where.COLUMN.max= keep a range",
    "columns.": "the table's name of a column of ours: params, tokens, flops, loss, run_id, ...",
    "units.": "a column's unit: a number or K, M, B, T for params, tokens, flops (PF-days too); nats or bits for losses",
}


def analysis_form(command: str, own: type, config_dir: str | None) -> Form:
    """The options of `own` (a command's dataclass) and of every analysis."""
    from scaling_lab.analysis.settings import AnalysisSettings

    _, words = plain_tree(command, {}, config_folders(config_dir))
    options = options_of(own) | options_of(AnalysisSettings, words=words)
    for key, choices in _choices().items():
        options[key] = replace(options[key], wanted=choices)
    return Form(options, free=FREE)


def _choices() -> dict[str, Any]:
    """Options that the settings declare as text and check themselves: known here, so that help can list them."""
    from scaling_lab.analysis.data.observations import CONVENTIONS
    from scaling_lab.analysis.laws import law_names
    from scaling_lab.analysis.settings import ALL_LAWS, WEIGHTS

    laws = (ALL_LAWS, *law_names())
    return {
        "convention": Literal[CONVENTIONS] | None,
        "weights": Literal[WEIGHTS] | None,
        "approach.parametric.law": Literal[law_names()],
        "compare_laws": tuple[Literal[laws], ...],  # type: ignore[valid-type]
    }


def analysis_settings(tree: Mapping[str, Any], *, skip: Sequence[str] = ()) -> AnalysisSettings:
    """The typed settings of a composed tree. Raises `UserError`."""
    from scaling_lab.analysis.settings import AnalysisSettings

    settings: AnalysisSettings = build(AnalysisSettings, tree, skip=skip)
    return settings


def settle_where(arguments: Arguments) -> Arguments:
    """Decide which '=' of `where.a=b=3` ends the column's name: the one that makes it a column of the table."""
    path = arguments.get("runs")
    doubtful = [a for a in arguments.assignments if a.key.startswith("where.") and "=" in a.value]
    if path is None or not doubtful:
        return arguments
    from scaling_lab.analysis.data.table_files import header_names

    names = header_names(Path(unquoted(path)).expanduser())
    settled = [_settled(a, names) if a in doubtful else a for a in arguments.assignments]
    return Arguments(arguments.command, arguments.flags, tuple(settled))


def _settled(assignment: Assignment, names: Sequence[str]) -> Assignment:
    pieces = assignment.text.removeprefix("where.").split("=")
    for cut in range(1, len(pieces)):
        column, value = "=".join(pieces[:cut]), "=".join(pieces[cut:])
        if value and any(column in (name, f"{name}.min", f"{name}.max") for name in names):
            return Assignment(f"where.{column}", value)
    return assignment
