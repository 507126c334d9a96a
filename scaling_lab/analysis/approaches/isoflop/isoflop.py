"""Approach 2 (Hoffmann et al. 2022, arXiv 2203.15556, section 3.2): the minimum of each IsoFLOP valley, and a power law
through the minima.

A valley whose minimum is not reliable is left out, with the reason. Everything is batched over samples, so a bootstrap
costs a few linear solves.

The loss itself is fitted, not its logarithm: for L = E + A N^-alpha + B D^-beta the valleys of all budgets have the same
shape up to scale. A fit that is linear in the loss then shifts all minima by the same factor, so the exponents stay exact
if the sizes are centered alike at all budgets. A fit in ln L loses this property.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from scaling_lab.analysis.approaches.isoflop.grid_fit import GridFit, fit_grid
from scaling_lab.analysis.approaches.isoflop.minimum import MINIMUM_SIZES, STATUS_CODES
from scaling_lab.analysis.approaches.isoflop.valleys import Valley, split_valleys, tokens_at
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, BudgetOptimum, BudgetStatus, Estimate, FitStatus
from scaling_lab.analysis.frontiers import FrontierPoints, frontier_from, quantities
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval
from scaling_lab.core.errors import UserError, unknown

MINIMUM_METHODS = ("shared", "parabola", "akima", "cubic")
_OK = STATUS_CODES.index(BudgetStatus.OK)


@dataclass(frozen=True)
class IsoFlopSettings:
    """Options `approach.isoflop.*`."""

    minimum: Literal["shared", "parabola", "akima", "cubic"] = "shared"
    """How to find the minimum of a valley in ln N. "shared": an asymmetric valley whose shape all budgets share
    (shared_shape.py); "parabola": least squares, as in the paper; "akima": Akima's interpolant, as in Porian et al. 2024
    (arXiv 2406.19146); "cubic": least squares."""
    window_log_params: float | None = 2.5
    """Fit only sizes within this distance in ln N of the best sampled one (a factor of twelve; at least five sizes),
    because no polynomial describes a wide valley. None fits all sizes; Akima, which is local, always uses all."""
    budget_tolerance: float = 0.10
    """Runs whose FLOPs differ from their budget by more than this fraction are reported and left out."""

    def __post_init__(self) -> None:
        if self.minimum not in MINIMUM_METHODS:
            raise unknown("approach.isoflop.minimum", self.minimum, MINIMUM_METHODS)
        if self.window_log_params is not None and not self.window_log_params > 0:
            raise UserError(f"approach.isoflop.window_log_params={self.window_log_params} must be positive.")
        if not 0 < self.budget_tolerance < 1:
            raise UserError(f"approach.isoflop.budget_tolerance={self.budget_tolerance} must be in (0, 1).")


@dataclass(frozen=True)
class IsoFlop:
    """Approach 2 with its settings."""

    settings: IsoFlopSettings = field(default_factory=IsoFlopSettings)
    name: str = "isoflop"

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        """One point per run (or all rows, with points=all) -> minima -> frontier. Poor data give a status, never an error."""
        valleys, notes = split_valleys(observations, self.settings.budget_tolerance, weights)
        fit = self._fit(valleys)
        budgets = tuple(self._budget(v, fit, i) for i, v in enumerate(valleys))
        usable = [b for b in budgets if b.status is BudgetStatus.OK]
        dropped = [
            f"{b.budget_flops:.4g} FLOPs: {b.status.value}"
            for b in budgets
            if b.status is not BudgetStatus.OK
        ]
        if dropped:
            more = f" and {len(dropped) - 8} more" if len(dropped) > 8 else ""
            notes.append(
                f"{len(dropped)} of {len(budgets)} budgets not used: " + "; ".join(dropped[:8]) + more
            )
        if len(usable) < 2:
            message = _too_few_budgets(budgets)
            return Estimate(
                self.name, FitStatus.NOT_APPLICABLE, message, budgets=budgets, diagnostics=tuple(notes)
            )
        points = self._frontier_points(valleys, fit)
        used = points.log_c[points.weight > 0]
        compute = (float(np.exp(used.min())), float(np.exp(used.max())))
        message = f"{len(usable)} of {len(budgets)} budgets have a minimum inside the sampled sizes."
        if len(usable) == 2:
            message += " A power law through two points has no residuals, so its fit cannot be assessed."
        frontier = frontier_from(points, compute)
        notes += [*fit.notes, *self._parabola_note(valleys, frontier.params.exponent)]
        return Estimate(
            self.name,
            FitStatus.CONVERGED,
            message,
            frontier,
            budgets=budgets,
            diagnostics=tuple(notes),
            details={} if fit.steepness is None else {"steepness": fit.steepness[0]},
        )

    def default_unit(self, observations: Observations) -> str:
        """`residual` (noise about the fitted valleys): resampling runs loses whole budgets of a small grid."""
        return "residual"

    def resample(
        self,
        observations: Observations,
        draws: Draws,
        weights: Array | None = None,
        estimate: Estimate | None = None,
    ) -> dict[str, Array]:
        """(resamples,) each: quantities of the frontier; see `bootstrap.Approach`."""
        valleys, _ = split_valleys(observations, self.settings.budget_tolerance, weights)
        start = self._fit(valleys)
        if draws.unit == "residual":
            fit = self._fit(valleys, losses=_noisy_losses(valleys, start, draws), start=start)
            return quantities(self._frontier_points(valleys, fit), floor_at_zero=False)
        counts = draws.point_counts(observations)
        if draws.unit == "budget":
            drawn = np.stack([counts[:, v.point[0]] for v in valleys], axis=-1)
            return quantities(
                self._frontier_points(valleys, start, budget_weights=drawn), floor_at_zero=False
            )
        fit = self._fit(valleys, weights=[counts[:, v.point] * v.weight for v in valleys], start=start)
        return quantities(self._frontier_points(valleys, fit), floor_at_zero=False)

    def _fit(
        self,
        valleys: Sequence[Valley],
        losses: Sequence[Array] | None = None,
        weights: Sequence[Array] | None = None,
        start: GridFit | None = None,
    ) -> GridFit:
        s = self.settings
        return fit_grid(s.minimum, s.window_log_params, valleys, losses, weights, start)

    def _frontier_points(
        self, valleys: Sequence[Valley], fit: GridFit, budget_weights: Array | None = None
    ) -> FrontierPoints:
        """The fitted minima of many samples, (samples, budgets); a budget without a minimum has weight 0."""
        columns = [
            (*tokens_at(v, m.log_n), m.log_n, m.loss, m.status == _OK) for v, m in zip(valleys, fit.minima)
        ]
        log_c, log_d, log_n, loss, ok = (np.stack(c, axis=-1) for c in zip(*columns))
        weight = ok.astype(np.float64) if budget_weights is None else ok * budget_weights
        used = weight > 0
        return FrontierPoints(
            np.where(used, log_c, 0.0),
            np.where(used, log_n, 0.0),
            np.where(used, log_d, 0.0),
            np.where(used, loss, np.nan),
            weight,
        )

    def _parabola_note(self, valleys: Sequence[Valley], exponent: float) -> list[str]:
        """The exponent from the paper's parabola, for comparison: valleys are asymmetric if alpha != beta."""
        if self.settings.minimum != "shared":
            return []
        plain = IsoFlop(replace(self.settings, minimum="parabola"))
        points = plain._frontier_points(valleys, plain._fit(valleys))
        if np.count_nonzero(points.weight) < 2:
            return []
        a = float(quantities(points)["params_exponent"][0])
        return [
            f"A plain parabola gives an exponent of N of {a:.4f}; the difference, {a - exponent:+.4f}, is its asymmetry bias plus noise."
        ]

    def _budget(self, valley: Valley, fit: GridFit, i: int) -> BudgetOptimum:
        found = fit.minima[i]
        status = STATUS_CODES[int(found.status[0])]
        curve = None if status is BudgetStatus.TOO_FEW else fit.curve(i)
        grid, values = (None, None) if curve is None else curve
        if status is not BudgetStatus.OK:
            message = _reason(status, valley, float(found.log_n[0]), self.settings.minimum)
            return BudgetOptimum(
                valley.budget_flops, valley.loss.size, status, message, fit_log_params=grid, fit_loss=values
            )
        _, log_d = tokens_at(valley, found.log_n)
        return BudgetOptimum(
            valley.budget_flops,
            valley.loss.size,
            status,
            None,
            params_opt=float(np.exp(found.log_n[0])),
            tokens_opt=float(np.exp(log_d[0])),
            loss_opt=float(found.loss[0]),
            curvature=float(found.curvature[0]),
            fit_log_params=grid,
            fit_loss=values,
        )


def _noisy_losses(valleys: Sequence[Valley], fit: GridFit, draws: Draws) -> list[Array]:
    """Per valley, (resamples, points): the fitted valley plus noise.

    The noise scale is redrawn as well (chi-squared with its degrees of freedom): a scale estimated from ten residuals is
    uncertain by a fifth, and intervals that ignore this are too narrow.
    """
    noise = fit.noise
    if noise.degrees_of_freedom < 1:
        raise NoInterval(
            "the valleys leave no degrees of freedom to estimate the noise; add sizes per budget, or seeds."
        )
    rng = draws.rng()
    df = noise.degrees_of_freedom
    scale = noise.scale_nats * np.sqrt(df / rng.chisquare(df, size=draws.resamples))
    losses = []
    for i, valley in enumerate(valleys):
        eps = rng.standard_normal((draws.resamples, valley.loss.size))
        # The variance of a point is proportional to 1 / weight.
        spread = np.sqrt(np.mean(valley.weight) / valley.weight)
        losses.append(fit.fitted_loss(i) + scale[:, None] * eps * spread)
    return losses


def _reason(status: BudgetStatus, valley: Valley, log_n: float, minimum: str) -> str:
    lo, hi = np.exp(valley.log_n[0]), np.exp(valley.log_n[-1])
    if status is BudgetStatus.TOO_FEW:
        return f"{valley.n_sizes} distinct size(s); a minimum needs at least {MINIMUM_SIZES[minimum]}."
    if status is BudgetStatus.CONCAVE:
        return "The curve fitted to the losses has no minimum (it opens downward)."
    if status is BudgetStatus.EDGE:
        mean = np.bincount(valley.size, valley.loss) / np.bincount(valley.size)
        which = "smallest" if int(np.argmin(mean)) == 0 else "largest"
        n = lo if which == "smallest" else hi
        return f"The best sampled size is the {which} (N = {n:.4g}): the minimum may lie beyond the sampled sizes."
    return (
        f"The fitted minimum, N = {np.exp(log_n):.4g}, lies outside the sampled sizes, {lo:.4g} to {hi:.4g}."
    )


def _too_few_budgets(budgets: Sequence[BudgetOptimum]) -> str:
    usable = sum(b.status is BudgetStatus.OK for b in budgets)
    first = next((b.message for b in budgets if b.status is not BudgetStatus.OK and b.message), None)
    why = f" First reason: {first}" if first else ""
    if len(budgets) < 2:
        return f"IsoFLOP needs at least two budgets, got {len(budgets)}.{why}"
    return f"IsoFLOP needs at least two budgets with a minimum; {usable} of {len(budgets)} have one.{why}"
