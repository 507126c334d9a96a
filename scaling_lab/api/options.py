"""Keyword options of the Python API, named as on the command line: as settings of an analysis, and as the command line's
assignments for a study (`design={"budgets_flops": [1e9]}` is design.budgets_flops=[1e9])."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from scaling_lab.cli.options.arguments import Arguments, Assignment
from scaling_lab.cli.options.values import text
from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    from scaling_lab.analysis.settings import AnalysisSettings

# Characters that mean something in a list or a group of options.


class AnalysisOptions(TypedDict, total=False):
    """What `analyze`, `predict` and `report` take besides the columns of a table; each as in `scaling-lab analyze --help`."""

    points: Literal["final", "all"]
    """One point per run (its last by tokens), or every row. The envelope always uses every row."""
    metric: str
    """Column to analyze in place of the loss; of a sweep, another loss of its records (`eval.NAME`)."""
    metrics: Sequence[str]
    """Further loss columns: the optimum of each, and whether they differ."""
    compare_laws: Sequence[str]
    """Laws to compare by their error on runs that they were not fitted to; `["all"]` takes every law."""
    convention: str
    """What N and C count: as_given, six_n_with_head, six_n_non_embedding, ..."""
    decimal: Literal["point", "comma"]
    best_of: str
    pool: bool
    weights: Literal["loss_sem"]
    """Weight each point by 1 / loss_sem^2."""
    strict: bool
    """Every bad row is an error."""
    seed: int
    """Seed of the resampling: the same seed gives the same intervals."""
    law: str
    """The law of the parametric approach, short for `approach={"parametric": {"law": ...}}`."""
    approach: Mapping[str, Mapping[str, Any]]
    """Options of the three approaches: `{"isoflop": {"minimum": "akima"}, "parametric": {"huber_delta": 1e-4}}`."""
    bootstrap: Mapping[str, Any]
    """`{"resamples": 1000, "level": 0.9, "unit": "auto"}`; 0 resamples give no intervals."""
    predict_flops: float | Sequence[float]
    """Further budgets (FLOPs) to predict at, in addition to ten times the largest observed."""
    sensitivity: bool
    """Whether to repeat the analysis under other choices."""
    backtest: bool
    """Whether to predict the largest budget from the others."""
    profile: bool
    """Whether to trace profile-likelihood intervals of the parametric fit."""
    study: str
    """One study by name, or "none"; by default every study whose data are there."""


def analysis_settings(options: Mapping[str, Any]) -> AnalysisSettings:
    """The typed settings. Raises `UserError` naming an unknown option, or the value and the choices."""
    from scaling_lab.analysis.settings import AnalysisSettings
    from scaling_lab.cli.options.forms import build

    known = tuple(AnalysisOptions.__annotations__)
    for key in options:
        if key not in known:
            raise unknown_option(key, known)
    tree = {key: plain(value) for key, value in options.items() if value is not None}
    law = tree.pop("law", None)
    if law is not None:
        approach = dict(_group(tree, "approach"))
        parametric = dict(_group(approach, "parametric"))
        if parametric.get("law", law) != law:
            raise UserError(
                f"law={law!r} and approach.parametric.law={parametric['law']!r}: give one of them."
            )
        tree["approach"] = {**approach, "parametric": {**parametric, "law": law}}
    settings: AnalysisSettings = build(AnalysisSettings, tree)
    return settings


def unknown_option(key: str, known: Iterable[str]) -> UserError:
    """The one line for a keyword that a function does not take."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return UserError(f"there is no option {key!r}.{hint} Choices: {', '.join(names)}.")


def plain(value: Any) -> Any:
    """NumPy and pandas values as plain Python ones, containers too."""
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, pandas Series and Index
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _group(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = tree.get(name, {})
    if not isinstance(value, Mapping):
        raise UserError(f"{name}={value!r} is not understood: wanted a dictionary of options.")
    return value


def call_text(function: str, data: str, options: Mapping[str, Any]) -> str:
    """The call as a reader may write it again, for analysis.json and the report: `sl.analyze('runs.csv', law='kaplan_nd')`."""
    words = [data, *(f"{key}={plain(value)!r}" for key, value in options.items() if value is not None)]
    return f"sl.{function}({', '.join(words)})"


def arguments(command: str, options: Mapping[str, Any]) -> Arguments:
    """The command line of `options`, nested groups as dotted keys. Raises `UserError` for a key given twice."""
    found: dict[str, Assignment] = {}
    for key, value in options.items():
        for assignment in _assignments(key, plain(value)):
            if assignment.key in found:
                raise UserError(f"{assignment.key} is given twice: give it once.")
            found[assignment.key] = assignment
    return Arguments(command, frozenset(), tuple(found.values()))


def _assignments(key: str, value: Any) -> Iterator[Assignment]:
    """One for a plain value; of a group its choice (`kind`) and each of its options."""
    if not isinstance(value, Mapping):
        yield Assignment(key, text(value))
        return
    for name, item in value.items():
        if name == "kind":
            yield Assignment(key, text(item))
        else:
            yield from _assignments(f"{key}.{name}", item)
