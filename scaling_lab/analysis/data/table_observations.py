"""`Observations` from a user's table: columns, rows and runs are checked, and what cannot be used has a reason."""

from __future__ import annotations

from collections import Counter

import numpy as np

from scaling_lab.analysis.data.mixed_groups import best_of_grid, check_mixed
from scaling_lab.analysis.data.observations import AS_GIVEN, CONVENTIONS, Dropped, Observations
from scaling_lab.analysis.data.tables.rows import (
    COUNTS,
    SIX_ND_TOLERANCE,
    check_scale,
    extra_columns,
    optional_column,
    read_rows,
    table_warnings,
)
from scaling_lab.analysis.data.tables.runs import assign_runs
from scaling_lab.analysis.data.tables.table import Table, columns_error
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN, Convention
from scaling_lab.core.errors import UserError, unknown

# The minimum for any fit: a five-parameter law, two budgets of three sizes, or three curves of two points.
MIN_ROWS = 6
# An untrained model loses the logarithm of its vocabulary: 12.8 for the largest in use (361,000).
_LARGEST_FINAL_LOSS_NATS = 15.0


def from_table(
    table: Table,
    *,
    convention: str = AS_GIVEN,
    strict: bool = False,
    each_row: bool = False,
    best_of: str | None = None,
    pool: bool = False,
) -> Observations:
    """Observations from a table: derive missing values, drop bad rows with a reason for each, and collect warnings.

    Args:
        each_row: every row is analyzed, not only the last of each run (`points=all`).
        best_of: a column of hyperparameters; of the runs of equal N and D only the best is kept.
        pool: runs of equal N and D may differ in loss by more than seeds do.

    Raises:
        UserError: a required column is missing, there are too few usable rows, numbers that cannot be in the units of the
            columns, two losses for one point of a run, groups of runs that one law does not hold for, or (with `strict`) any
            bad row.
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
    if not (pool or each_row):
        check_mixed(table, found, np.flatnonzero(good), best_of)
    return found if best_of is None else best_of_grid(table, found, best_of)


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
    # A budget stands in for FLOPs (tables/rows.py).
    have = [name for name in COUNTS if table.has(name) or (name == "flops" and table.has("budget_flops"))]
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
