"""`Observations`: the points that all approaches fit, under one convention, and what was dropped and why.

They come from a user's table (table_observations.py) or from the run records of a sweep (record_observations.py). All rows are kept,
because the envelope needs curves; `final()` gives one point per run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.tables.rows import SIX_ND_TOLERANCE
from scaling_lab.analysis.data.tables.units import Unit
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN, Convention
from scaling_lab.core.errors import unknown

AS_GIVEN = "as_given"
"""The convention of a table for which the user did not say what `params` and `flops` count."""
CONVENTIONS = (AS_GIVEN, *(c.value for c in Convention))
FLOOR = "floor_nats"
"""The extra column with the true irreducible loss of each run's validation set, where the corpus's entropy is known."""

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
