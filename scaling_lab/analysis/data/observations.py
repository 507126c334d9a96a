"""`Observations`: the points that all approaches fit, under one convention, and what was dropped and why.

They come from a user's table (`from_table`) or from the run records of a sweep (record_observations.py). All rows are kept,
because the envelope needs curves; `final()` gives one point per run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.table_rows import (
    COUNTS,
    SIX_ND_TOLERANCE,
    check_scale,
    extra_columns,
    optional_column,
    read_rows,
    table_warnings,
)
from scaling_lab.analysis.data.table_runs import assign_runs
from scaling_lab.analysis.data.tables import Table, columns_error
from scaling_lab.analysis.data.units import Unit
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN, Convention
from scaling_lab.core.errors import UserError, unknown

AS_GIVEN = "as_given"
"""The convention of a table for which the user did not say what `params` and `flops` count."""
CONVENTIONS = (AS_GIVEN, *(c.value for c in Convention))
FLOOR = "floor_nats"
"""The extra column with the true irreducible loss of each run's validation set, where the corpus's entropy is known."""

# The minimum for any fit: a five-parameter law, two budgets of three sizes, or three curves of two points.
MIN_ROWS = 6
# An untrained model loses the logarithm of its vocabulary: 12.8 for the largest in use (361,000).
_LARGEST_FINAL_LOSS_NATS = 15.0
# Documented behavior of analyze: points within 10% form one budget.
BUDGET_TOLERANCE = 0.10


@dataclass(frozen=True)
class Dropped:
    """A row (or run) that is not analyzed, and why."""

    run_id: str
    row: int | None
    """Row number in the table (the first row of data is 1); None for a run of a sweep."""
    reason: str


@dataclass(frozen=True)
class Curves:
    """Loss curves for the envelope: flat arrays with one entry per point; `run_index` refers to the runs of the observations."""

    run_index: NDArray[np.int64]
    n_params: Array
    n_tokens: Array
    compute_flops: Array
    loss_nats: Array
    kind: str
    """The kind of loss: "rows of the table", "validation points" or "smoothed training loss"."""

    def of_runs(self, keep: NDArray[np.bool_], new_index: NDArray[np.int64]) -> Curves:
        at = keep[self.run_index]
        return Curves(
            new_index[self.run_index[at]],
            self.n_params[at],
            self.n_tokens[at],
            self.compute_flops[at],
            self.loss_nats[at],
            self.kind,
        )


@dataclass(frozen=True)
class Observations:
    """Float64 arrays of equal length with one entry per point: the final loss of a run, or each row of its curve."""

    run_names: NDArray[np.object_]
    """(runs,) ids of the runs."""
    run_index: NDArray[np.int64]
    """(points,) the run of each point."""
    n_params: Array
    n_tokens: Array
    compute_flops: Array
    budget_flops: Array
    """The budget a point was planned for, FLOPs; NaN if unknown."""
    loss_nats: Array
    loss_sem_nats: Array
    """Standard error of the loss; NaN if unknown."""
    seed: Array
    """NaN if unknown."""
    convention: str
    dropped: tuple[Dropped, ...] = ()
    warnings: tuple[str, ...] = ()
    extra: Mapping[str, Array] = field(default_factory=dict)
    """Other numeric columns by name (width, depth, unique_tokens, ...), for laws that need them."""
    separate_curves: Curves | None = None
    """The curves, if they differ from the points themselves (for records: losses during training)."""
    alternatives: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    """By convention: (runs,) N and FLOPs per token, if the source allows other conventions (the records of a sweep)."""
    budgets_match_convention: bool = True
    """False if `budget_flops` was planned under another convention than that of `compute_flops`."""
    column_curves: Mapping[str, Curves] = field(default_factory=dict)
    """By column of `extra`: the curves of another loss, if they differ from the points themselves. They cover all runs under
    the convention of the source, so a selection of runs has none."""
    units: Mapping[str, Unit] = field(default_factory=dict)
    """By column of the table: the unit it was read in, if one was given. The arrays here are already converted."""

    @classmethod
    def from_arrays(
        cls,
        *,
        n_params: Any,
        n_tokens: Any,
        loss_nats: Any,
        compute_flops: Any = None,
        run_id: Any = None,
        budget_flops: Any = None,
        loss_sem_nats: Any = None,
        seed: Any = None,
        convention: str = AS_GIVEN,
        extra: Mapping[str, Any] | None = None,
    ) -> Observations:
        """Observations from arrays. Without `compute_flops` it is 6 N D; without `run_id` each point is a run."""
        n, d, loss = (np.asarray(v, dtype=np.float64).ravel() for v in (n_params, n_tokens, loss_nats))
        unknown_column = np.full(n.size, np.nan)

        def optional(values: Any) -> Array:
            return unknown_column if values is None else np.asarray(values, dtype=np.float64).ravel()

        names = np.asarray(
            [str(i) for i in range(n.size)] if run_id is None else [str(r) for r in run_id], dtype=object
        )
        unique, index = np.unique(names.astype(str), return_inverse=True)
        return cls(
            unique.astype(object),
            index.astype(np.int64),
            n,
            d,
            FLOPS_PER_PARAM_TOKEN * n * d if compute_flops is None else optional(compute_flops),
            optional(budget_flops),
            loss,
            optional(loss_sem_nats),
            optional(seed),
            convention,
            extra={k: np.asarray(v, dtype=np.float64).ravel() for k, v in (extra or {}).items()},
        )

    def __repr__(self) -> str:
        return f"Observations({self.n_runs} runs, {self.n_points} points, {self.convention})"

    @property
    def n_points(self) -> int:
        return int(self.n_params.size)

    @property
    def n_runs(self) -> int:
        return int(self.run_names.size)

    @property
    def run_id(self) -> NDArray[np.object_]:
        """(points,) the run id of each point."""
        return self.run_names[self.run_index]

    @cached_property
    def is_final(self) -> NDArray[np.bool_]:
        """(points,) whether a point is the last of its run by tokens (in case of ties, the last in the source)."""
        order = np.lexsort((np.arange(self.n_points), self.n_tokens, self.run_index))
        last = np.ones(self.n_points, dtype=bool)
        last[:-1] = self.run_index[order[1:]] != self.run_index[order[:-1]]
        final = np.zeros(self.n_points, dtype=bool)
        final[order[last]] = True
        return final

    @cached_property
    def is_six_nd(self) -> bool:
        """Whether flops = 6 params tokens to 1% at all points, which gives the frontier a closed form."""
        six = FLOPS_PER_PARAM_TOKEN * self.n_params * self.n_tokens
        return bool(np.all(np.abs(self.compute_flops / six - 1.0) <= SIX_ND_TOLERANCE))

    @cached_property
    def curves(self) -> Curves:
        """The curves for the envelope: all rows of all runs."""
        if self.separate_curves is not None:
            return self.separate_curves
        return Curves(
            self.run_index,
            self.n_params,
            self.n_tokens,
            self.compute_flops,
            self.loss_nats,
            "rows of the table",
        )

    def final(self) -> Observations:
        """One point per run, its last by tokens; the curves are kept."""
        return self.points(self.is_final)

    def points(self, keep: NDArray[np.bool_]) -> Observations:
        """Only these points, with unchanged runs and curves."""
        return replace(
            self,
            run_index=self.run_index[keep],
            n_params=self.n_params[keep],
            n_tokens=self.n_tokens[keep],
            compute_flops=self.compute_flops[keep],
            budget_flops=self.budget_flops[keep],
            loss_nats=self.loss_nats[keep],
            loss_sem_nats=self.loss_sem_nats[keep],
            seed=self.seed[keep],
            extra={k: v[keep] for k, v in self.extra.items()},
            separate_curves=self.curves,
        )

    def runs(self, keep: NDArray[np.bool_]) -> Observations:
        """Only these runs ((runs,) mask), with their points and curves."""
        new_index = np.cumsum(keep) - 1
        curves = self.separate_curves
        kept = self.points(keep[self.run_index])
        return replace(
            kept,
            run_names=self.run_names[keep],
            run_index=new_index[kept.run_index],
            separate_curves=None if curves is None else curves.of_runs(keep, new_index),
            alternatives={k: (n[keep], f[keep]) for k, (n, f) in self.alternatives.items()},
            column_curves={},
        )

    def under(self, convention: str) -> Observations:
        """The same runs counted under another convention; budgets remain those of the plan.

        Raises:
            UserError: the convention is not available (a table has only one).
        """
        if convention == self.convention:
            return self
        if convention not in self.alternatives:
            raise unknown("convention", convention, (self.convention, *self.alternatives))
        n, per_token = self.alternatives[convention]
        curves = self.separate_curves
        if curves is not None:
            at = curves.run_index
            curves = replace(curves, n_params=n[at], compute_flops=per_token[at] * curves.n_tokens)
        n, per_token = n[self.run_index], per_token[self.run_index]
        return replace(
            self,
            n_params=n,
            compute_flops=per_token * self.n_tokens,
            convention=convention,
            separate_curves=curves,
            budgets_match_convention=False,
            column_curves={},
        )

    def with_budgets(self) -> Observations:
        """Set each missing budget to the geometric mean of its cluster of FLOPs (within 10%)."""
        missing = ~np.isfinite(self.budget_flops)
        if not missing.any():
            return self
        budgets = self.budget_flops.copy()
        budgets[missing] = cluster_budgets(self.compute_flops[missing])
        return replace(self, budget_flops=budgets)


def cluster_budgets(compute_flops: Array, tolerance: float = BUDGET_TOLERANCE) -> Array:
    """(points,) the budget of each point: the mean of its cluster, whose members lie within `tolerance` of the center.

    The window with the most points is taken first, so that a scattered run does not split a budget in two.
    """
    log_c = np.log(compute_flops)
    order = np.argsort(log_c, kind="stable")
    sorted_c = log_c[order]
    label = np.full(sorted_c.size, np.nan)
    open_at = np.arange(sorted_c.size)
    width = 2.0 * np.log1p(tolerance)
    while open_at.size:
        values = sorted_c[open_at]
        ends = np.searchsorted(values, values + width + 1e-12, side="right")
        counts = ends - np.arange(values.size)
        start = int(np.argmax(counts))
        members = open_at[start : ends[start]]
        label[members] = np.exp(sorted_c[members].mean())
        open_at = np.delete(open_at, np.s_[start : ends[start]])
    budgets = np.empty_like(label)
    budgets[order] = label
    return budgets


def from_table(
    table: Table, *, convention: str = AS_GIVEN, strict: bool = False, each_row: bool = False
) -> Observations:
    """Observations from a table: derive missing values, drop bad rows with a reason for each, and collect warnings.

    Args:
        each_row: every row is analyzed, not only the last of each run (`points=all`).

    Raises:
        UserError: a required column is missing, there are too few usable rows, numbers that cannot be in the units of the
            columns, two losses for one point of a run, or (with `strict`) any bad row.
    """
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, CONVENTIONS)
    warnings = list(table.notes)
    if convention == AS_GIVEN and table.non_embedding:
        convention = Convention.SIX_N_NON_EMBEDDING.value
        warnings.append(f"params counts no embeddings, by its name: convention={convention}.")
    needed, why = needed_columns(table)
    if needed:
        raise columns_error(table, needed, why)
    rows = read_rows(table)
    warnings += rows.notes
    runs = assign_runs(table, rows, each_row=each_row)
    names, index, given = runs.names, runs.index, runs.given
    warnings += runs.notes
    good = rows.good
    dropped = tuple(
        Dropped(str(names[index[at]]), int(table.row[at]), rows.reasons[at]) for at in sorted(rows.reasons)
    )
    if strict and dropped:
        first = dropped[0]
        raise UserError(
            f"strict=true: {table.source} has {len(dropped)} bad row(s); row {first.row} ({first.run_id}): {first.reason}."
        )
    if int(good.sum()) < MIN_ROWS:
        raise _too_few(table, int(good.sum()), dropped)
    warnings += table_warnings(table, rows, given)
    check_scale(table, rows)
    params, tokens, flops = (rows.values[name][good] for name in COUNTS)
    if convention != AS_GIVEN and Convention(convention).is_six_n:
        off = np.abs(flops / (FLOPS_PER_PARAM_TOKEN * params * tokens) - 1.0) > SIX_ND_TOLERANCE
        if off.any():
            warnings.append(
                f"convention={convention} implies flops = 6 params tokens, but {int(off.sum())} of {off.size} rows differ"
                " by more than 1%; the column flops is used as it is."
            )
    run_index = index[good]
    kept = np.bincount(run_index, minlength=names.size) > 0
    found = Observations(
        names[kept],
        (np.cumsum(kept) - 1)[run_index],
        params,
        tokens,
        flops,
        optional_column(table, "budget_flops", positive=True)[good],
        rows.values["loss"][good],
        optional_column(table, "loss_sem", positive=True)[good],
        optional_column(table, "seed", positive=False)[good],
        convention,
        dropped,
        tuple(warnings),
        extra_columns(table, good),
        units=table.units,
    )
    _check_final_losses(table, found)
    return found


def _check_final_losses(table: Table, found: Observations) -> None:
    """Raise `UserError` for final losses that no model has, unless their unit was stated."""
    high = found.loss_nats[found.is_final] > _LARGEST_FINAL_LOSS_NATS
    if "loss" not in table.units and high.any():
        example = found.loss_nats[found.is_final][high][0]
        raise UserError(
            f"{table.source}: {int(high.sum())} final loss(es) are above {_LARGEST_FINAL_LOSS_NATS:g}, such as {example:.4g}: more "
            "than any model loses in nats per token. If they are perplexities: units.loss=perplexity. If they are right: "
            "units.loss=nats. To leave them out: where.loss.max=12"
        )


def needed_columns(table: Table) -> tuple[list[str], str]:
    """The columns that the user must name, because they are missing or can be several, and why."""
    have = [name for name in COUNTS if table.has(name)]
    unclear = [name for name in COUNTS if name in table.unclear]
    missing = [name for name in COUNTS if name not in have and name not in unclear]
    needed = [*unclear, *missing[: max(0, 2 - len(have) - len(unclear))]]
    if not table.has("loss"):
        needed.append("loss")
    return needed, " (two of params, tokens and flops are needed)" if len(have) < 2 else ""


def _too_few(table: Table, usable: int, dropped: tuple[Dropped, ...]) -> UserError:
    """The error for a table with too few usable rows: what is required, and what is wrong with its rows."""
    why = ""
    if dropped:
        common, times = Counter(d.reason.split(":")[0] for d in dropped).most_common(1)[0]
        why = f"; {times} row(s): {common}" if times > 1 else ""
        why += f"; the first bad row is row {dropped[0].row}: {dropped[0].reason}"
    return UserError(
        f"{table.source} has {usable} usable row(s) of {len(table.row)}; at least {MIN_ROWS} are required"
        f" (with finite, positive loss and two of params, tokens, flops){why}."
    )
