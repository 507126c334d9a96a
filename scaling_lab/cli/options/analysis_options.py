"""Options of analysis commands: the form derived from `AnalysisSettings`, and settings from a composed config."""

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
    "approach.parametric.law_options.": "an option specific to the law",
    "where.": "keep rows with this value; where.COLUMN.min= and where.COLUMN.max= keep a range",
    "columns.": "the table's name for one of our columns: params, tokens, flops, loss, run_id, ...",
    "units.": "a column's unit: a number or K, M, B, T for params, tokens, flops (or PF-days); nats or bits for losses",
}


def analysis_form(command: str, own: type, config_dir: str | None) -> Form:
    """The options of `own` (a command's dataclass) and of `AnalysisSettings`."""
    from scaling_lab.analysis.settings import AnalysisSettings

    _, meanings = plain_tree(command, {}, config_folders(config_dir))
    options = options_of(own) | options_of(AnalysisSettings, meanings=meanings)
    for key, choices in _choices().items():
        options[key] = replace(options[key], value_type=choices)
    return Form(options, free=FREE)


def _choices() -> dict[str, Any]:
    """Choices of options that `AnalysisSettings` declares as text and checks itself, so that help can list them."""
    from scaling_lab.analysis.data.observations import CONVENTIONS
    from scaling_lab.analysis.laws import law_names
    from scaling_lab.analysis.settings import ALL_LAWS, WEIGHTS
    from scaling_lab.analysis.studies import NO_STUDY, study_names

    laws = (ALL_LAWS, *law_names())
    return {
        "convention": Literal[CONVENTIONS] | None,
        "study": Literal[(*study_names(), NO_STUDY)] | None,
        "weights": Literal[WEIGHTS] | None,
        "approach.parametric.law": Literal[law_names()],
        "compare_laws": tuple[Literal[laws], ...],  # type: ignore[valid-type]
    }


def analysis_settings(tree: Mapping[str, Any], *, skip: Sequence[str] = ()) -> AnalysisSettings:
    """Typed settings from a composed config tree. Raises `UserError`."""
    from scaling_lab.analysis.settings import AnalysisSettings

    settings: AnalysisSettings = build(AnalysisSettings, tree, skip=skip)
    return settings


def resolve_where(arguments: Arguments) -> Arguments:
    """Decide which '=' in `where.a=b=3` ends the column's name: the one that gives a column of the table."""
    path = arguments.get("runs")
    ambiguous = [a for a in arguments.assignments if a.key.startswith("where.") and "=" in a.value]
    if path is None or not ambiguous:
        return arguments
    from scaling_lab.analysis.data.tables.files import header_names

    names = header_names(Path(unquoted(path)).expanduser())
    resolved = [_resolved(a, names) if a in ambiguous else a for a in arguments.assignments]
    return Arguments(arguments.command, arguments.flags, tuple(resolved))


def _resolved(assignment: Assignment, names: Sequence[str]) -> Assignment:
    pieces = assignment.text.removeprefix("where.").split("=")
    for cut in range(1, len(pieces)):
        column, value = "=".join(pieces[:cut]), "=".join(pieces[cut:])
        if value and any(column in (name, f"{name}.min", f"{name}.max") for name in names):
            return Assignment(f"where.{column}", value)
    return assignment
