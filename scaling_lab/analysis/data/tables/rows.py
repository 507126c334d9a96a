"""The rows of a table: which are usable, why others are not, derived values, and the run of each row.

Everything operates on whole columns, so ten million rows take seconds; only bad cells are handled one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.tables.table import COLUMNS, Table
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError

COUNTS = ("params", "tokens", "flops")
_NEEDED = (*COUNTS, "loss")
LR_HORIZON = "lr_horizon_fraction"
"""The extra column with the length of the LR schedule divided by that of the run: 1 is matched, infinite a constant LR."""
_LR_SCHEDULE = "lr_schedule"
# Documented behavior of analyze: flops = 6 params tokens "to 1%".
SIX_ND_TOLERANCE = 0.01
# A number outside this range is a mistake, and products of such numbers would overflow float64.
_SMALLEST, _LARGEST = 1e-60, 1e60
_FORMULAS = {"flops": "6 params tokens", "tokens": "flops / (6 params)", "params": "flops / (6 tokens)"}
# A median of flops / (6 params tokens) beyond this factor gives a warning: usually a wrong unit, not embeddings or attention.
_UNIT_FACTOR = 3.0
# Below these, and outside this range of tokens per parameter, a table is not in single parameters, tokens and FLOPs. The
# smallest models of the field have some hundred parameters; published tables have .03 to 3,000 tokens per parameter.
_FEWEST_PARAMS, _FEWEST_TOKENS, _FEWEST_FLOPS = 100.0, 1e4, 1e6
_TOKENS_PER_PARAM = (0.01, 1e6)
# The reason quotes the text of at most this many bad cells per column; the others get a general reason.
_REASONS_WITH_TEXT = 10_000


@dataclass(frozen=True)
class Rows:
    """All rows of a table as float64, with a mask of the usable ones."""

    values: dict[str, Array]
    """params, tokens, flops and loss, (rows,) each."""
    good: NDArray[np.bool_]
    """(rows,) whether the row is usable."""
    reasons: dict[int, str]
    """Index of a row -> why it is not usable."""
    notes: list[str]


def read_rows(table: Table) -> Rows:
    """The required columns as numbers; one of params, tokens and flops may be missing and is then derived.

    A missing column is derived from flops = 6 params tokens. Single empty cells are filled in the same way, but only if
    flops = 6 params tokens to 1% in all complete rows: otherwise one fit would mix two ways of counting.
    """
    given = [name for name in COUNTS if table.has(name)]
    values = {name: table.numbers(name) for name in (*given, "loss")}
    notes: list[str] = []
    filled = _fill_cells(table, values, notes) if len(given) == 3 else {}
    reasons = _bad_cells(table, values, filled)
    if "flops" not in given and _budget_is_compute(table, values):
        values["flops"] = table.numbers("budget_flops")
        notes.append(_budget_note(values))
        given.append("flops")
        reasons |= {
            at: "budget_flops is not a usable number"
            for at in np.flatnonzero(~_usable(values["flops"])).tolist()
            if at not in reasons
        }
    if len(given) == 2:
        missing = next(name for name in COUNTS if name not in given)
        values[missing] = _derived(missing, values)
        notes.append(f"{missing} is not in the table; computed as {_FORMULAS[missing]}.")
        filled = {missing: np.ones(values[missing].size, dtype=bool)}
    for name, where in filled.items():  # the result from two good cells may still overflow
        good = _usable(values[name])
        for at in np.flatnonzero(where & ~good).tolist():
            reasons.setdefault(at, f"{name} = {_FORMULAS[name]} is out of range: {values[name][at]:.3g}")
    good = np.ones(len(table.row), dtype=bool)
    good[list(reasons)] = False
    return Rows(values, good, reasons, notes)


def _budget_is_compute(table: Table, values: Mapping[str, Array]) -> bool:
    """Whether a column of budgets gives the compute of each row: not of curves, whose rows have used a part of it."""
    if not table.has("budget_flops"):
        return False
    budget = table.numbers("budget_flops")
    known = [name for name in ("params", "tokens") if name in values]
    if len(known) < 2:
        return len(known) == 1
    with np.errstate(all="ignore"):
        ratio = _derived("flops", values) / budget
    ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
    return bool(ratio.size and ((ratio > 1 / _UNIT_FACTOR) & (ratio < _UNIT_FACTOR)).all())


def _budget_note(values: Mapping[str, Array]) -> str:
    note = "flops is not in the table; C is budget_flops"
    if "params" not in values or "tokens" not in values:
        return note + "."
    with np.errstate(all="ignore"):
        ratio = values["flops"] / _derived("flops", values)
    low, high = np.nanmin(ratio), np.nanmax(ratio)
    if low > 1 - SIX_ND_TOLERANCE and high < 1 + SIX_ND_TOLERANCE:
        return note + ", which is 6 params tokens."
    return (
        note
        + f", which is {low:.3g} to {high:.3g} times 6 params tokens (columns.flops= names another column)."
    )


def _usable(column: Array) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return (column >= _SMALLEST) & (column <= _LARGEST)


def _derived(name: str, values: Mapping[str, Array]) -> Array:
    with np.errstate(all="ignore"):
        if name == "flops":
            return FLOPS_PER_PARAM_TOKEN * values["params"] * values["tokens"]
        other = "params" if name == "tokens" else "tokens"
        return values["flops"] / (FLOPS_PER_PARAM_TOKEN * values[other])


def _fill_cells(table: Table, values: dict[str, Array], notes: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Fill empty cells of params, tokens or flops in rows with the other two; returns which cells were filled, by column."""
    usable = {name: _usable(values[name]) for name in COUNTS}
    whole = usable["params"] & usable["tokens"] & usable["flops"]
    fillable = {
        name: np.isnan(values[name]) & np.logical_and.reduce([usable[o] for o in COUNTS if o != name])
        for name in COUNTS
    }
    if not any(w.any() for w in fillable.values()):
        return {}
    with np.errstate(all="ignore"):
        off = np.abs(values["flops"] / _derived("flops", values) - 1.0)[whole] > SIX_ND_TOLERANCE
    if off.any() or not whole.any():
        return {}
    filled = {}
    for name, cells in fillable.items():
        empty = cells & table.empty(name)
        if empty.any():
            values[name] = np.where(empty, _derived(name, values), values[name])
            notes.append(f"{name} is missing in {int(empty.sum())} row(s); computed as {_FORMULAS[name]}.")
            filled[name] = empty
    return filled


def _bad_cells(
    table: Table, values: Mapping[str, Array], filled: Mapping[str, NDArray[np.bool_]]
) -> dict[int, str]:
    """Index -> reason, for each row with a cell that is missing, not a number, infinite, not positive, or out of range."""
    reasons: dict[int, str] = {}
    for name, column in values.items():
        bad = ~_usable(column)
        if name in filled:
            bad &= ~filled[name]
        if not bad.any():
            continue
        empty = table.empty(name)
        with_text = 0
        for at in np.flatnonzero(bad).tolist():
            if empty[at]:
                reason = f"{name} is missing"
            elif with_text < _REASONS_WITH_TEXT:
                with_text += 1
                reason = f"{name} {_problem(float(column[at]), table.cell(name, at))}"
            else:
                reason = f"{name} is not a usable number"
            reasons[at] = f"{reasons[at]}; {reason}" if at in reasons else reason
    return reasons


def _problem(value: float, text: str) -> str:
    text = text if len(text) <= 40 else text[:37] + "..."
    text = " ".join(text.split())
    if np.isnan(value):
        return f"is not a number: {text!r}"
    if np.isinf(value):
        return f"is not finite: {text}"
    if value <= 0:
        return f"is not positive: {text}"
    return f"is out of range: {text} (must be {_SMALLEST:g} to {_LARGEST:g})"


def table_warnings(table: Table, rows: Rows, run: NDArray[np.int64]) -> list[str]:
    """Warnings about the table: duplicates, repeated runs, inconsistent numbers.

    Args:
        run: (rows,) the run of each row, -1 for rows without an id.
    """
    found = []
    good = rows.good
    copies = _count_copies([rows.values[name][good] for name in _NEEDED] + [run[good].astype(np.float64)])
    if copies:
        found.append(f"{copies} exact duplicate row(s) are kept.")
    if table.has("run_id"):
        named = run[(run >= 0) & good]
        repeated = named.size - int(np.count_nonzero(np.bincount(named))) if named.size else 0
        if repeated:
            found.append(f"{repeated} row(s) repeat a run_id; the rows of one run form its curve.")
    else:
        found.append("run_id is not in the table, so each row is a run.")
    if all(table.has(name) for name in COUNTS):
        ratio = float(
            np.median(
                rows.values["flops"][good] / _derived("flops", {k: v[good] for k, v in rows.values.items()})
            )
        )
        if not 1 / _UNIT_FACTOR <= ratio <= _UNIT_FACTOR:
            found.append(
                f"flops is about {ratio:.2g} times 6 params tokens. Check the units, which should be one parameter, one"
                " token and one FLOP; otherwise set units.params=, units.tokens= or units.flops=."
            )
    return found


def check_scale(table: Table, rows: Rows) -> None:
    """Raise `UserError` where most numbers cannot be single parameters, tokens, FLOPs: a unit is missing.

    A unit that is stated, also `units.params=1`, is taken as it is.
    """
    stated = [name for name in ("params", "tokens") if name in table.units]
    if len(stated) == 2:
        return
    n, d, c = (float(np.median(rows.values[name][rows.good])) for name in COUNTS)
    low, high = _TOKENS_PER_PARAM
    wrong = None
    if "params" not in stated and n < _FEWEST_PARAMS:
        wrong = f"a typical row has {n:.3g} parameters"
    elif "tokens" not in stated and d < _FEWEST_TOKENS:
        wrong = f"a typical row has {d:.3g} tokens"
    elif c < _FEWEST_FLOPS:
        wrong = f"a typical row has {c:.3g} FLOPs"
    elif not low <= d / n <= high:
        wrong = f"a typical row has {d / n:.3g} tokens per parameter ({n:.3g} parameters, {d:.3g} tokens)"
    if wrong is not None:
        raise UserError(
            f"{table.source}: {wrong}, so a unit seems to be missing. Give the units of the columns, for example units.params=M "
            "units.tokens=B; if the numbers are right: units.params=1 units.tokens=1"
        )


def _count_copies(columns: list[Array]) -> int:
    """Number of rows that equal an earlier row in all columns. Only rows with equal hashes are compared in full."""
    mixed = np.zeros(columns[0].size, dtype=np.uint64)
    for column in columns:
        bits = np.ascontiguousarray(column + 0.0).view(np.uint64)
        mixed ^= bits
        mixed *= np.uint64(
            0x9E3779B97F4A7C15
        )  # odd, hence a bijection: equal hashes of a single column mean equal values
        mixed ^= mixed >> np.uint64(29)
    ordered = np.sort(mixed)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not twice.size:
        return 0
    suspects = np.isin(mixed, np.unique(twice))
    rows = np.stack([column[suspects] for column in columns], axis=1)
    return rows.shape[0] - np.unique(rows, axis=0).shape[0]


def extra_columns(table: Table, good: NDArray[np.bool_]) -> dict[str, Array]:
    """The other numeric columns, for laws that need them (width, depth, unique_tokens, ...).

    A text column `lr_schedule` becomes `lr_horizon_fraction`: infinite for a constant LR, else 1 (a schedule matched to the
    run). A table may contain `lr_horizon_fraction` itself instead.
    """
    import pandas as pd

    found = {
        name: table.numbers(name)[good]
        for name in table.names
        if name not in COLUMNS and pd.api.types.is_numeric_dtype(table.frame[name])
    }
    if _LR_SCHEDULE in table.names and LR_HORIZON not in found:
        kinds = table.frame[_LR_SCHEDULE].astype(str).str.strip().str.lower()[good]
        constant, unknown = kinds.str.contains("constant"), kinds.isin(("", "nan", "none", "null", "<na>"))
        found[LR_HORIZON] = np.where(constant, np.inf, np.where(unknown, np.nan, 1.0))
    return found


def optional_column(table: Table, name: str, *, positive: bool) -> Array:
    """(rows,) an optional column, NaN where the value is missing or not usable."""
    if not table.has(name):
        return np.full(len(table.row), np.nan)
    values = table.numbers(name)
    usable = _usable(values) if positive else np.isfinite(values)
    return np.where(usable, values, np.nan)
