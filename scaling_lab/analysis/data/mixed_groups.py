"""Tables that mix groups (datasets, architectures) or contain a grid of hyperparameters.

A law through both is a law of neither. Rows of equal N and D whose losses differ far more than those of seeds show it, and
the column that tells them apart is named. `best_of` then keeps the best of a grid.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.tables.names import listed, nearest_column
from scaling_lab.analysis.data.tables.table import COLUMNS, Table
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.errors import UserError

# N and D closer than this are equal.
_EQUAL = 1e-3
# Seeds of small models differ by about 1% (results/LOG.md); a root mean square of twice that has another cause.
_BEYOND_SEEDS = 0.02
_FEWEST_GROUPS = 3
# A column with more values than this names runs, not groups.
_MOST_VALUES = 40


@dataclass(frozen=True)
class Column:
    """A column whose values differ among runs of equal N and D."""

    name: str
    values: tuple[str, ...]
    """The values there are, in the order of the table."""
    is_number: bool
    explained: float
    """The share of the variance of ln L among runs of equal N and D that the means of its values remove."""


def check_mixed(
    table: Table, observations: Observations, rows: NDArray[np.int64], grid: str | None = None
) -> None:
    """Raise `UserError` where runs of equal N and D have different losses and columns that tell them apart.

    Args:
        rows: (points,) the row of the table of each point.
        grid: a column whose best value will be taken; only others that explain most of the differences matter then.
    """
    final = observations.final()
    group = like_groups(final.n_params, final.n_tokens)
    counts = np.bincount(group)
    repeated = counts[group] > 1
    if np.count_nonzero(counts > 1) < _FEWEST_GROUPS or repeated.mean() < 0.3:
        return
    deviation = _within(np.log(final.loss_nats), group)
    spread = float(np.sqrt(np.mean(deviation[repeated] ** 2)))
    if spread < _BEYOND_SEEDS:
        return
    columns = _columns(table, rows[observations.is_final], group, deviation)
    if grid is not None:
        columns = [c for c in columns if c.name != grid and c.explained > 0.5]
    if not columns:
        return
    first = columns[0]
    lines = [shlex.quote(f"where.{first.name}={first.values[0]}")]
    if first.is_number:
        lines.insert(0, shlex.quote(f"best_of={first.name}"))
    also = f" (also {', '.join(c.name for c in columns[1:4])})" if len(columns) > 1 else ""
    raise UserError(
        f"{table.source}: runs of equal N and D differ by {100 * spread:.2g}% in loss, and by the column {first.name}{also}: "
        f"{listed(list(first.values), 6)}. One law does not hold for all. Choose: {' or '.join(lines)}; or pool=true to fit "
        "them all together"
    )


def best_of_grid(table: Table, observations: Observations, name: str) -> Observations:
    """The best run for each N and D over a grid of one column; a note says what was kept.

    Its loss is the vertex of a parabola in the logarithm of the column where the best value has a neighbor on both sides, which
    is less biased than the least of several noisy losses; else the least loss.

    Raises:
        UserError: no such column of positive numbers.
    """
    if name not in table.names:
        near = nearest_column(name, list(table.own_names))
        hint = f" Did you mean {shlex.quote(f'best_of={near}')}?" if near else ""
        raise UserError(
            f"best_of={name}: {table.source} has no such column; its columns are {listed(list(table.own_names))}.{hint}"
        )
    if name not in observations.extra:
        raise UserError(f"best_of={name}: the cells of {name} in {table.source} are not all numbers.")
    final = observations.final()
    x = final.extra[name]
    if not (np.isfinite(x).all() and (x > 0).all()):
        raise UserError(f"best_of={name}: {name} must be positive in every row of {table.source}.")
    group = like_groups(final.n_params, final.n_tokens)
    keep = np.zeros(observations.n_runs, dtype=bool)
    loss = observations.loss_nats.copy()
    at_points = np.flatnonzero(observations.is_final)
    edges = vertices = 0
    for g in range(int(group.max()) + 1):
        members = np.flatnonzero(group == g)
        best, value, at_edge = _best(np.log(x[members]), final.loss_nats[members])
        run = int(final.run_index[members[best]])
        keep[run] = True
        loss[at_points[members[best]]] = value
        edges += at_edge
        vertices += not at_edge
    note = f"best_of={name}: {int(keep.sum())} of {observations.n_runs} runs are kept, one for each N and D"
    note += f"; {vertices} at the vertex of a parabola" if vertices else ""
    note += f"; {edges} at an edge of its grid, where a better value may lie beyond" if edges else ""
    changed = replace(
        observations,
        loss_nats=loss,
        separate_curves=observations.curves,
        warnings=(*observations.warnings, note + "."),
    )
    return changed.runs(keep)


def like_groups(n_params: Array, n_tokens: Array) -> NDArray[np.int64]:
    """(points,) a number for each pair of N and D; differences below a thousandth are none."""
    pairs = np.stack([_clusters(np.log(n_params)), _clusters(np.log(n_tokens))], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].ravel()


def _clusters(values: Array) -> NDArray[np.int64]:
    order = np.argsort(values, kind="stable")
    out = np.empty(values.size, dtype=np.int64)
    out[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > _EQUAL)])
    return out


def _within(values: Array, group: NDArray[np.int64]) -> Array:
    """Deviations from the mean of each group."""
    return values - (np.bincount(group, values) / np.bincount(group))[group]


def _columns(
    table: Table, rows: NDArray[np.int64], group: NDArray[np.int64], deviation: Array
) -> list[Column]:
    """The columns that may explain the deviations, the one that explains most first."""
    import pandas as pd

    found = []
    for name in table.own_names:
        if name in COLUMNS or any(table.frame[name].equals(table.frame[c]) for c in COLUMNS if table.has(c)):
            continue
        cells = table.frame[name].iloc[rows]
        codes, values = pd.factorize(cells.astype(str))
        if not 2 <= len(values) <= min(_MOST_VALUES, len(rows) // 2):
            continue
        # A property of the size (its width) does not differ within a group.
        if len({*zip(group.tolist(), codes.tolist())}) == int(group.max()) + 1:
            continue
        rest = _within(deviation, codes.astype(np.int64))
        explained = 1.0 - float((rest**2).sum() / (deviation**2).sum())
        found.append(Column(name, tuple(map(str, values)), pd.api.types.is_numeric_dtype(cells), explained))
    return sorted(found, key=lambda column: -column.explained)


def _best(log_x: Array, loss: Array) -> tuple[int, float, bool]:
    """(index of the least loss, the loss at the optimum, whether it is at an edge)."""
    best = int(np.argmin(loss))
    below, above = log_x < log_x[best] - 1e-9, log_x > log_x[best] + 1e-9
    if not (below.any() and above.any()):
        return best, float(loss[best]), True
    left = int(np.flatnonzero(below)[np.argmax(log_x[below])])
    right = int(np.flatnonzero(above)[np.argmin(log_x[above])])
    at = [left, best, right]
    a, b, c = np.polyfit(log_x[at] - log_x[best], loss[at], 2)
    return best, float(c - b * b / (4 * a)) if a > 0 else float(loss[best]), False
