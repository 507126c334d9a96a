"""Group observations into IsoFLOP valleys, one per budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, FitStatus
from scaling_lab.analysis.fitting.fit import fit
from scaling_lab.analysis.laws import get_law


@dataclass(frozen=True)
class Valley:
    """The points of one budget, ascending in N."""

    budget_flops: float
    point: NDArray[np.int64]
    """(points,) indices into the observations."""
    log_n: Array
    log_c: Array
    log_d: Array
    loss: Array
    weight: Array
    size: NDArray[np.int64]
    """(points,) index of the distinct size of each point."""

    @property
    def n_sizes(self) -> int:
        return int(self.size[-1]) + 1


def split_valleys(
    observations: Observations, tolerance: float, weights: Array | None = None
) -> tuple[list[Valley], list[str]]:
    """Group points by budget and leave out runs off their budget.

    Budgets that the source does not give are clusters of FLOPs. Also returns sentences that describe what was done.
    `weights`: (points,) weights of the fit.
    """
    obs = observations.with_budgets()
    given = np.isfinite(observations.budget_flops)
    weight = np.ones(obs.n_points) if weights is None else weights
    notes = [] if given.all() else ["Budgets are clusters of FLOPs within 10%."]
    if not obs.budgets_match_convention:
        obs = _slide_to_budgets(obs, notes)
    order = np.lexsort((obs.n_params, obs.budget_flops))
    starts = np.flatnonzero(np.diff(obs.budget_flops[order], prepend=-1.0))
    valleys = []
    for at in np.split(order, starts[1:]):
        budget = float(obs.budget_flops[at[0]])
        off = given[at] & (np.abs(np.log(obs.compute_flops[at] / budget)) > np.log1p(tolerance))
        if obs.budgets_match_convention and off.any():
            if off.mean() > 0.5:
                notes.append(
                    f"Budget {budget:.4g}: {int(off.sum())} of {at.size} runs are off it by more than {tolerance:.0%}, so"
                    " budget_flops seems to be counted differently from flops; it is used only to group the runs."
                )
            else:
                named = ", ".join(str(r) for r in obs.run_id[at[off]][:5])
                more = f" and {int(off.sum()) - 5} more" if off.sum() > 5 else ""
                notes.append(
                    f"Budget {budget:.4g}: left out because off the budget by more than {tolerance:.0%}: {named}{more}."
                )
                at = at[~off]
        size = np.unique(np.round(np.log(obs.n_params[at]), 9), return_inverse=True)[1]
        valleys.append(
            Valley(
                budget,
                at.astype(np.int64),
                np.log(obs.n_params[at]),
                np.log(obs.compute_flops[at]),
                np.log(obs.n_tokens[at]),
                obs.loss_nats[at],
                weight[at],
                size.astype(np.int64),
            )
        )
    return valleys, notes


def _slide_to_budgets(obs: Observations, notes: list[str]) -> Observations:
    """Move each loss to the mean FLOPs of its budget, along a fitted law at the N of the run.

    Runs that cost the same under the plan's convention do not under another, so there the plan's valleys are not IsoFLOP.
    Without this correction the exponents would be those of the plan with renamed axes.
    """
    law = get_law("chinchilla")
    columns = {"n_params": obs.n_params, "n_tokens": obs.n_tokens}
    result = fit(law, columns, loss_nats=obs.loss_nats)
    index = np.unique(obs.budget_flops, return_inverse=True)[1]
    log_c = np.log(obs.compute_flops)
    target = (np.bincount(index, log_c) / np.bincount(index))[index]
    spread = float(np.exp(np.abs(log_c - target).max()))
    if result.status is FitStatus.NOT_IDENTIFIED:
        notes.append(
            f"The budgets were planned under another FLOP convention; runs are up to {spread:.2f}x off the mean of their"
            " budget, and no law could be fitted to correct for it."
        )
        return obs
    moved = {"n_params": obs.n_params, "n_tokens": obs.n_tokens * np.exp(target - log_c)}
    shift = np.asarray(law.loss_nats(result.parameters, moved)) - np.asarray(
        law.loss_nats(result.parameters, columns)
    )
    notes.append(
        f"The budgets were planned under another FLOP convention: each loss was moved to the mean FLOPs of its budget (up"
        f" to {spread:.2f}x away) along the fitted Chinchilla law."
    )
    return replace(
        obs,
        n_tokens=moved["n_tokens"],
        compute_flops=np.exp(target),
        budget_flops=np.exp(target),
        loss_nats=obs.loss_nats + shift,
    )


def tokens_at(valley: Valley, log_n: Array) -> tuple[Array, Array]:
    """(samples,) ln C and ln D of the valley at ln N, interpolated between its runs, so that D follows the observed FLOPs per
    token instead of 6 N D."""
    first = np.unique(valley.size, return_index=True)[1]
    x = valley.log_n[first]
    per_size = np.bincount(valley.size)
    log_c = np.bincount(valley.size, valley.log_c) / per_size
    log_d = np.bincount(valley.size, valley.log_d) / per_size
    known = np.where(np.isfinite(log_n), log_n, x[0])
    c = np.interp(known, x, log_c)
    # D itself is not smooth, because runs are rounded to whole steps; ln(FLOPs per token) - ln N is smooth and nearly constant.
    excess = np.interp(known, x, log_c - log_d - x)
    return c, c - excess - known
