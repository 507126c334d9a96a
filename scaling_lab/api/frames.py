"""Parts of an analysis as pandas DataFrames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaling_lab.api.predictions import PredictedRun, Predictions, ends_of
from scaling_lab.core.errors import unknown

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.analysis.data.observations import Observations
    from scaling_lab.analysis.finding import Finding
    from scaling_lab.api.approaches import ApproachResult


def frame(document: Mapping[str, Any], approaches: Sequence[ApproachResult], what: str) -> pd.DataFrame:
    """The table called `what` of an analysis's document. Raises `UserError` for an unknown one."""
    import pandas as pd

    if what not in _TABLES:
        raise unknown("to_frame: the table", what, (*_TABLES, "points", "findings", "STUDY.TABLE"))
    index, rows = _TABLES[what](document, approaches)
    made = pd.DataFrame(rows)
    return made if index is None or made.empty else made.set_index(index)


Rows = tuple[str | list[str] | None, list[dict[str, Any]]]


def _exponents(document: Mapping[str, Any], approaches: Sequence[ApproachResult]) -> Rows:
    rows = []
    for a in approaches:
        row: dict[str, Any] = {"approach": a.name, "status": a.status}
        row |= ends_of("params_exponent", a.exponent) | {"params_coefficient": a.coefficient}
        row |= ends_of("tokens_exponent", a.tokens_exponent) | {"tokens_coefficient": a.tokens_coefficient}
        rows.append(row | {"level": a.level, "message": a.message})
    return "approach", rows


def _parameters(document: Mapping[str, Any], approaches: Sequence[ApproachResult]) -> Rows:
    rows = []
    for fit, name, value in (
        (a, name, value) for a in approaches if a.name == "parametric" for name, value in a.parameters.items()
    ):
        profile = fit.profile_intervals.get(name)
        lo, hi = (None, None) if value.interval is None else (value.interval.lo, value.interval.hi)
        row = {
            "parameter": name,
            "estimate": value.estimate,
            "lo": lo,
            "hi": hi,
            "standard_error": value.standard_error,
        }
        ends = (None, None) if profile is None else (profile.lo, profile.hi)
        rows.append(row | {"profile_lo": ends[0], "profile_hi": ends[1]})
    return "parameter", rows


def _budgets(document: Mapping[str, Any], approaches: Sequence[ApproachResult]) -> Rows:
    return None, [dict(budget) for a in approaches if a.name == "isoflop" for budget in a.budgets]


def _predictions(document: Mapping[str, Any], approaches: Sequence[ApproachResult]) -> Rows:
    level = {a.name: a.level for a in approaches}
    found = Predictions([PredictedRun.of_json(p, level[p["approach"]]) for p in document["predictions"]], {})
    return ["compute_flops", "approach"], found.rows()


def _listed(name: str) -> Callable[[Mapping[str, Any], Sequence[ApproachResult]], Rows]:
    """The rows of a list in the document, their nested parts left out."""

    def rows(document: Mapping[str, Any], approaches: Sequence[ApproachResult]) -> Rows:
        nested = (dict, list)
        return None, [{k: v for k, v in row.items() if not isinstance(v, nested)} for row in document[name]]

    return rows


def _dropped(document: Mapping[str, Any], approaches: Sequence[ApproachResult]) -> Rows:
    observations = document["observations"] or {"dropped": []}
    return None, [dict(row) for row in observations["dropped"]]


_TABLES: Mapping[str, Callable[[Mapping[str, Any], Sequence[ApproachResult]], Rows]] = {
    "exponents": _exponents,
    "parameters": _parameters,
    "budgets": _budgets,
    "predictions": _predictions,
    "sensitivity": _listed("sensitivity"),
    "backtest": _listed("backtest"),
    "dropped": _dropped,
}


def findings(found: Sequence[Finding]) -> pd.DataFrame:
    """One row a finding: name, status, question, answer, reason."""
    import pandas as pd

    names = ("name", "status", "question", "answer", "reason")
    rows = [[str(f.name), f.status.value, f.question, f.answer, f.reason] for f in found]
    return pd.DataFrame(rows, columns=names).set_index("name")


def finding_table(finding: Finding, name: str) -> pd.DataFrame:
    """A table of a finding, an estimate with its interval in three columns. Raises `UserError` for an unknown table."""
    import pandas as pd

    tables = {table.name: table for table in finding.tables}
    if name not in tables:
        raise unknown(f"to_frame: the table of study {finding.name}", name, tables)
    table = tables[name]
    columns: dict[str, list[Any]] = {}
    for at, column in enumerate(table.columns):
        cells = [row[at] for row in table.rows]
        if not any(isinstance(cell, tuple) for cell in cells):
            columns[column.title] = cells
            continue
        for part, end in enumerate(("", " lo", " hi")):
            columns[column.title + end] = [
                cell[part] if isinstance(cell, tuple) else cell if part == 0 else None for cell in cells
            ]
    return pd.DataFrame(columns)


def points(observations: Observations) -> pd.DataFrame:
    """(points, columns): what the fits saw, one row a point, in parameters, tokens, FLOPs and nats per token."""
    import pandas as pd

    return pd.DataFrame(
        {
            "run_id": observations.run_id,
            "params": observations.n_params,
            "tokens": observations.n_tokens,
            "flops": observations.compute_flops,
            "loss": observations.loss_nats,
            "budget_flops": observations.budget_flops,
            **{
                name: values
                for name, values in observations.extra.items()
                if len(values) == observations.n_points
            },
        }
    )
