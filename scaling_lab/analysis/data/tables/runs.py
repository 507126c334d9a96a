"""Which rows of a table are one run, and which runs have no final loss.

A run has one size and one seed, and one loss per number of tokens. Tables break this: an id used again for another size, a run
started twice, a curve that ends in NaN, a run that crashed. What can be told apart is, and a note says so; what cannot is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.tables.rows import Rows
from scaling_lab.analysis.data.tables.table import Table
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.errors import UserError

_STATES = ("state", "status", "runstate", "runstatus")
_FINISHED = frozenset({"finished", "completed", "complete", "done", "success", "succeeded"})
_NOT_FINISHED = frozenset(
    {
        "crashed",
        "failed",
        "killed",
        "running",
        "preempted",
        "preempting",
        "canceled",
        "cancelled",
        "pending",
        "queued",
    }
    | {"diverged", "interrupted", "timeout", "oom"}
)
# Elapsed times (time, wall_time) are none: they do not say which attempt came later.
_TIMES = ("timestamp", "createdat", "created", "date", "datetime", "startedat", "starttime", "attempt")
# Two losses closer than this are one: a table may be rounded differently in two places.
_SAME_LOSS = 1e-6
_SAME_SIZE = 1e-6


@dataclass(frozen=True)
class Runs:
    """The runs of a table."""

    names: NDArray[np.object_]
    """(runs,)"""
    index: NDArray[np.int64]
    """(rows,) the run of each row."""
    given: NDArray[np.int64]
    """(rows,) the same, -1 for rows without an id."""
    notes: tuple[str, ...] = ()


def assign_runs(table: Table, rows: Rows, *, each_row: bool = False) -> Runs:
    """The run of each row. `rows.reasons` and `rows.good` then also leave out what is not a run's loss.

    Args:
        each_row: every row is analyzed (`points=all`), so that a run may have several losses at one number of tokens.

    Raises:
        UserError: a run has two losses at one number of tokens, and no column says which is the later.
    """
    runs = _by_id(table)
    _leave_out_unfinished(table, rows)
    if not table.has("run_id"):
        return runs
    runs = _split_by_size(table, rows, runs)
    if each_row:
        return runs
    notes = [*runs.notes, *_keep_later_attempts(table, rows, runs), *_leave_out_diverged(rows, runs)]
    notes += _sizes_as_ids(rows, runs)
    return Runs(runs.names, runs.index, runs.given, tuple(notes))


def _by_id(table: Table) -> Runs:
    import pandas as pd

    n_rows = len(table.row)
    if not table.has("run_id"):
        names = np.array([f"row{r}" for r in table.row.tolist()], dtype=object)
        return Runs(names, np.arange(n_rows, dtype=np.int64), np.full(n_rows, -1, dtype=np.int64))
    column = table.frame["run_id"]
    try:
        codes, uniques = pd.factorize(column)
    except TypeError:  # unhashable cells, such as lists
        codes, uniques = pd.factorize(column.where(column.isna(), column.astype(str)))
    names = np.array([str(u) for u in uniques], dtype=object)
    given = np.asarray(codes, dtype=np.int64)
    unnamed = np.flatnonzero(given < 0)
    if not unnamed.size:
        return Runs(names, given, given)
    # Each row without an id is a separate run.
    names = np.concatenate([names, np.array([f"row{table.row[i]}" for i in unnamed], dtype=object)])
    index = given.copy()
    index[unnamed] = np.arange(len(uniques), len(uniques) + unnamed.size)
    return Runs(names, index, given)


def _drop(rows: Rows, which: NDArray[np.bool_], reason: str) -> int:
    """Leave rows out that were good; returns how many."""
    at = np.flatnonzero(which & rows.good).tolist()
    rows.reasons.update(dict.fromkeys(at, reason))
    rows.good[at] = False
    return len(at)


def _named(table: Table, names: tuple[str, ...]) -> str | None:
    """The first column of the table with one of these names, by letters and digits alone."""
    return next((c for c in table.own_names if re.sub(r"[^a-z0-9]", "", c.lower()) in names), None)


def _leave_out_unfinished(table: Table, rows: Rows) -> None:
    column = _named(table, _STATES)
    if column is None:
        return
    words = table.frame[column].astype(str).str.strip().str.lower()
    distinct = set(words.unique())
    if not distinct & (_FINISHED | _NOT_FINISHED):
        return
    for word in sorted(distinct & _NOT_FINISHED):
        _drop(rows, (words == word).to_numpy(dtype=bool), f"{column} is {word}")


def _split_by_size(table: Table, rows: Rows, runs: Runs) -> Runs:
    """Rows of one id with different sizes or seeds are different runs."""
    columns = [(rows.values["params"], _SAME_SIZE)]
    if table.has("seed"):
        columns.append((table.numbers("seed"), 0.0))
    if not any(_vary(values, tolerance, rows, runs) for values, tolerance in columns):
        return runs  # sorting, below, is slow on millions of rows
    keys = [_groups(values, tolerance) for values, tolerance in columns]
    pairs = np.stack([runs.index, *keys], axis=1)[rows.good]
    if not pairs.size:
        return runs
    distinct, inverse = np.unique(pairs, axis=0, return_inverse=True)
    parts = np.bincount(distinct[:, 0], minlength=runs.names.size)
    if parts.max() <= 1:
        return runs
    # Rows that are left out keep the first run of their id: their name is only shown.
    order = np.argsort(distinct[:, 0], kind="stable")
    new_of = np.empty(len(distinct), dtype=np.int64)
    names: list[str] = list(runs.names)
    seen: dict[int, int] = {}
    for k in order.tolist():
        old = int(distinct[k, 0])
        seen[old] = seen.get(old, 0) + 1
        if seen[old] == 1:
            new_of[k] = old
        else:
            new_of[k] = len(names)
            names.append(f"{runs.names[old]}#{seen[old]}")
    index, given = runs.index.copy(), runs.given.copy()
    index[rows.good] = new_of[inverse.ravel()]
    given[rows.good] = np.where(given[rows.good] < 0, -1, index[rows.good])
    reused = int((parts > 1).sum())
    what = "sizes or seeds" if table.has("seed") else "sizes"
    note = f"{reused} run_id(s) are used for runs of different {what}: they are {int(parts[parts > 1].sum())} runs."
    return Runs(np.array(names, dtype=object), index, given, (note,))


def _vary(values: Array, tolerance: float, rows: Rows, runs: Runs) -> bool:
    """Whether a column has several values within a run."""
    index, good = runs.index[rows.good], values[rows.good]
    of_run = np.full(runs.names.size, np.nan)
    of_run[index] = good
    with np.errstate(invalid="ignore"):
        return bool((np.abs(good - of_run[index]) > tolerance * np.abs(good)).any())


def _groups(values: Array, tolerance: float) -> NDArray[np.int64]:
    """(rows,) a number for each group of equal values; values within the relative tolerance of their neighbor are equal."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    with np.errstate(invalid="ignore"):
        step = np.abs(np.diff(ordered)) > tolerance * np.abs(ordered[:-1])
    out = np.empty(values.size, dtype=np.int64)
    out[order] = np.concatenate([[0], np.cumsum(step)])
    return out


def _keep_later_attempts(table: Table, rows: Rows, runs: Runs) -> list[str]:
    """Of several losses of one run at one number of tokens, the later one."""
    tokens, loss = rows.values["tokens"], rows.values["loss"]
    at = np.flatnonzero(rows.good & (runs.given >= 0))
    at = at[np.lexsort((at, tokens[at], runs.index[at]))]
    same = (runs.index[at][1:] == runs.index[at][:-1]) & (tokens[at][1:] == tokens[at][:-1])
    differs = same & (np.abs(loss[at][1:] - loss[at][:-1]) > _SAME_LOSS * loss[at][:-1])
    if not differs.any():
        return []
    first = int(np.flatnonzero(differs)[0])
    a, b = int(at[first]), int(at[first + 1])
    column = _named(table, _TIMES)
    when = None if column is None else _as_order(table, column)
    if when is None:
        count = len(np.unique(runs.index[at][1:][differs]))
        raise UserError(
            f"{table.source}: {count} run(s) have two losses at one number of tokens, such as run {runs.names[runs.index[a]]!r} at "
            f"{tokens[a]:.6g} tokens: {loss[a]:.6g} (row {table.row[a]}) and {loss[b]:.6g} (row {table.row[b]}). If one is an "
            "attempt that was given up, remove it, or add a column `attempt` with the larger number for the one that counts. "
            "If each row is a run of its own: points=all"
        )
    group = np.concatenate([[0], np.cumsum(~same)])
    order = np.lexsort((when[at], group))
    last = np.append(group[order][1:] != group[order][:-1], True)
    earlier = np.zeros(rows.good.size, dtype=bool)
    earlier[at[order[~last]]] = True
    dropped = _drop(rows, earlier, f"an earlier attempt, by {column}")
    return [f"{dropped} row(s) are left out: earlier attempts of a run, by the column {column}."]


def _as_order(table: Table, column: str) -> Array | None:
    """(rows,) times or attempts as numbers; None where they are neither."""
    import pandas as pd

    cells = table.frame[column]
    numbers = pd.to_numeric(cells, errors="coerce")
    if numbers.notna().all():
        return numbers.to_numpy(dtype=np.float64)
    times = pd.to_datetime(cells, errors="coerce", utc=True, format="ISO8601")
    return np.asarray(times.astype("int64"), dtype=np.float64) if times.notna().all() else None


def _leave_out_diverged(rows: Rows, runs: Runs) -> list[str]:
    """Runs whose curve ends without a loss: a final loss taken from before that would be that of another run."""
    counts = rows.values["tokens"]
    with np.errstate(invalid="ignore"):
        placed = np.isfinite(counts) & (counts > 0) & (runs.given >= 0)
    at = np.flatnonzero(placed)
    at = at[np.lexsort((at, counts[at], runs.index[at]))]
    if not at.size:
        return []
    run, good = runs.index[at], rows.good[at]
    no_loss = ~np.isfinite(rows.values["loss"][at])
    ends = np.append(run[1:] != run[:-1], True)
    starts = np.append(True, ends[:-1])
    diverged = []
    no_end = no_loss[ends]
    for begin, end in zip(np.flatnonzero(starts)[no_end].tolist(), np.flatnonzero(ends)[no_end].tolist()):
        missing = no_loss[begin : end + 1]
        losses = np.flatnonzero(~missing)
        # Losses that are logged now and then have gaps before the end too; then the last one is final.
        if losses.size and not missing[: losses[-1]].any() and good[begin : end + 1].any():
            diverged.append(int(run[begin]))
    if not diverged:
        return []
    _drop(rows, np.isin(runs.index, diverged), "its run ends without a loss: it diverged, or is not finished")
    shown = ", ".join(str(runs.names[k]) for k in diverged[:5]) + (", ..." if len(diverged) > 5 else "")
    return [
        f"{len(diverged)} run(s) are left out because their curves end without a loss (diverged): {shown}."
    ]


def _sizes_as_ids(rows: Rows, runs: Runs) -> list[str]:
    """A note where ids name sizes, so that runs of one size and several budgets look like points of a curve."""
    good = rows.good
    run, n, c = runs.index[good], rows.values["params"][good], rows.values["flops"][good]
    if run.size == 0:
        return []
    per_run = np.bincount(run)
    size_of_run = np.full(per_run.size, np.nan)
    size_of_run[run] = n
    sizes, per_run = size_of_run[per_run > 0], per_run[per_run > 0]
    if sizes.size < 3 or per_run.max() < 2 or len(np.unique(np.round(np.log(sizes), 6))) != sizes.size:
        return []
    # Curves of different sizes do not pass through the same compute: evaluation follows steps, not FLOPs.
    budgets, members = np.unique(np.round(np.log(c) / np.log1p(0.1)), return_counts=True)
    if len(budgets) > 2 * per_run.max() or members.min() < 3:
        return []
    return [
        "each run_id has one size, and its rows lie on common budgets. They are taken as points of one curve; if each row is a "
        "run of its own, add points=all."
    ]
