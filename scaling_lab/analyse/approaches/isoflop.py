"""Owns Approach 2 (Hoffmann et al. 2022, arXiv 2203.15556, section 3.2): the minimum of each IsoFLOP valley, and a
power law through the minima.

A valley whose minimum cannot be trusted is named with its reason and left out. Everything is batched over samples
(see `minima`), so that a bootstrap costs a few linear solves.

Why the loss and not its logarithm is fitted: for L = E + A N^-alpha + B D^-beta the valleys of all budgets are one
shape, scaled, about their own optimum. A fit linear in the loss then shifts every minimum by the same factor, and the
exponents stay exact when every budget's sizes are centred alike; a fit in ln L loses that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analyse.approaches.valley import (
    MINIMUM_SIZES,
    STATUS_CODES,
    Minima,
    fitted_curve,
    fitted_loss,
    minima,
    polynomial_fit,
)
from scaling_lab.analyse.estimate import Array, BudgetOptimum, BudgetStatus, Estimate, FitStatus
from scaling_lab.analyse.frontiers import FrontierPoints, frontier_from, quantities
from scaling_lab.analyse.observations import Observations
from scaling_lab.analyse.uncertainty import Draws, NoInterval
from scaling_lab.core.errors import UserError, unknown

MINIMUM_METHODS = ("parabola", "akima", "cubic")


@dataclass(frozen=True)
class IsoFlopSettings:
    """Options `approach.isoflop.*`."""

    minimum: Literal["parabola", "akima", "cubic"] = "parabola"
    """How a valley's minimum is found in ln N: least-squares parabola or cubic, or Akima's interpolant."""
    window_log_params: float | None = None
    """Fit only sizes within this distance in ln N of the best sampled one (never fewer than five); None fits all."""
    budget_tolerance: float = 0.10
    """Runs whose FLOPs differ from their budget by more than this fraction are named and left out."""

    def __post_init__(self) -> None:
        if self.minimum not in MINIMUM_METHODS:
            raise unknown("approach.isoflop.minimum", self.minimum, MINIMUM_METHODS)
        if self.window_log_params is not None and not self.window_log_params > 0:
            raise UserError(f"approach.isoflop.window_log_params={self.window_log_params} must be positive.")
        if not 0 < self.budget_tolerance < 1:
            raise UserError(f"approach.isoflop.budget_tolerance={self.budget_tolerance} must be in (0, 1).")


@dataclass(frozen=True)
class Valley:
    """The points of one budget, ascending in N."""

    budget_flops: float
    point: NDArray[np.int64]
    """(points,) positions in the observations."""
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


@dataclass(frozen=True)
class IsoFlop:
    """Approach 2 with its settings; pure methods."""

    settings: IsoFlopSettings = field(default_factory=IsoFlopSettings)
    name: str = "isoflop"

    def valleys(
        self, observations: Observations, weights: Array | None = None
    ) -> tuple[list[Valley], list[str]]:
        """The budgets' points and sentences on what was left out. `weights`: (points,), of the fit."""
        return split_valleys(observations, self.settings.budget_tolerance, weights)

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        """One point a run (or every row, with points=all) -> minima -> frontier. Never raises on poor data."""
        valleys, notes = self.valleys(observations, weights)
        budgets = tuple(self._budget(v) for v in valleys)
        usable = [i for i, b in enumerate(budgets) if b.status is BudgetStatus.OK]
        dropped = [
            f"{b.budget_flops:.4g} FLOPs: {b.status.value}"
            for b in budgets
            if b.status is not BudgetStatus.OK
        ]
        if dropped:
            notes.append(f"{len(dropped)} of {len(budgets)} budgets not used: " + "; ".join(dropped[:8]))
        if len(usable) < 2:
            message = _too_few_budgets(budgets)
            return Estimate(
                self.name, FitStatus.NOT_APPLICABLE, message, budgets=budgets, diagnostics=tuple(notes)
            )
        points = self.frontier_points([valleys[i] for i in usable])
        compute = (float(np.exp(points.log_c.min())), float(np.exp(points.log_c.max())))
        message = f"{len(usable)} of {len(budgets)} budgets have a minimum inside the sampled sizes."
        if len(usable) == 2:
            message += " A power law through two points leaves no residual to judge it by."
        return Estimate(
            self.name,
            FitStatus.CONVERGED,
            message,
            frontier_from(points, compute),
            budgets=budgets,
            diagnostics=tuple(notes),
        )

    def frontier_points(
        self,
        valleys: Sequence[Valley],
        losses: Sequence[Array] | None = None,
        weights: Sequence[Array] | None = None,
        budget_weights: Array | None = None,
    ) -> FrontierPoints:
        """Minima of many samples. `losses` and `weights`: per valley (samples, points); default: as observed."""
        columns: list[tuple[Array, Array, Array, Array, Array]] = []
        for i, valley in enumerate(valleys):
            loss = np.atleast_2d(valley.loss if losses is None else losses[i])
            weight = np.atleast_2d(valley.weight if weights is None else weights[i])
            found = self.minima(valley, loss, weight)
            log_c, log_d = tokens_at(valley, found.log_n)
            ok = (found.status == STATUS_CODES.index(BudgetStatus.OK)).astype(np.float64)
            columns.append((log_c, found.log_n, log_d, found.loss, ok))
        log_c, log_n, log_d, loss, ok = (np.stack(c, axis=-1) for c in zip(*columns))
        weight = ok if budget_weights is None else ok * budget_weights
        used = weight > 0
        return FrontierPoints(
            np.where(used, log_c, 0.0),
            np.where(used, log_n, 0.0),
            np.where(used, log_d, 0.0),
            np.where(used, loss, np.nan),
            weight,
        )

    def minima(self, valley: Valley, loss: Array, weight: Array) -> Minima:
        """Minima of `samples` versions of one valley; loss and weight broadcast to (samples, points)."""
        return minima(
            self.settings.minimum, valley.log_n, valley.size, loss, weight, self.settings.window_log_params
        )

    def default_unit(self, observations: Observations) -> str:
        """Noise about the valleys: drawing runs anew loses whole budgets of a small grid."""
        return "residual"

    def resample(
        self, observations: Observations, draws: Draws, weights: Array | None = None
    ) -> dict[str, Array]:
        """(resamples,) each: the frontier's quantities; see `uncertainty.Approach`."""
        valleys, _ = self.valleys(observations, weights)
        if draws.unit == "residual":
            losses = self._noisy_losses(valleys, draws)
            return quantities(self.frontier_points(valleys, losses=losses))
        counts = draws.point_counts(observations)
        if draws.unit == "budget":
            drawn = np.stack([counts[:, v.point[0]] for v in valleys], axis=-1)
            return quantities(self.frontier_points(valleys, budget_weights=drawn))
        return quantities(
            self.frontier_points(valleys, weights=[counts[:, v.point] * v.weight for v in valleys])
        )

    def _noisy_losses(self, valleys: Sequence[Valley], draws: Draws) -> list[Array]:
        """Per valley (resamples, points): the fitted valley plus noise.

        The scale is redrawn too (chi-squared with its degrees of freedom): a scale pooled from ten residuals is itself
        uncertain by a fifth, and intervals that ignore it are too narrow.
        """
        noise = noise_scale(valleys)
        if noise.degrees_of_freedom < 1:
            raise NoInterval(
                "the valleys have no degrees of freedom left to measure the noise by: more sizes a budget, or seeds."
            )
        rng = draws.rng()
        df = noise.degrees_of_freedom
        scale = noise.scale_nats * np.sqrt(df / rng.chisquare(df, size=draws.resamples))
        losses = []
        for valley in valleys:
            eps = rng.standard_normal((draws.resamples, valley.loss.size))
            s = self.settings
            base = fitted_loss(
                s.minimum, valley.log_n, valley.size, valley.loss, valley.weight, s.window_log_params
            )
            # With weights a point's variance goes as 1 / weight.
            losses.append(base + scale[:, None] * eps * np.sqrt(np.mean(valley.weight) / valley.weight))
        return losses

    def _budget(self, valley: Valley) -> BudgetOptimum:
        found = self.minima(valley, valley.loss[None], valley.weight[None])
        status = STATUS_CODES[int(found.status[0])]
        grid = np.linspace(valley.log_n[0], valley.log_n[-1], 101)
        curve = None
        if status is not BudgetStatus.TOO_FEW:
            s = self.settings
            grid, curve = fitted_curve(
                s.minimum, valley.log_n, valley.size, valley.loss, valley.weight, s.window_log_params
            )
        if status is not BudgetStatus.OK:
            return BudgetOptimum(
                valley.budget_flops,
                valley.loss.size,
                status,
                _reason(status, valley, float(found.log_n[0]), self.settings.minimum),
                fit_log_params=None if curve is None else grid,
                fit_loss=curve,
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
            fit_loss=curve,
        )


@dataclass(frozen=True)
class NoiseScale:
    """Run-to-run noise of a loss, nats, pooled over the valleys."""

    scale_nats: float
    degrees_of_freedom: int


# Residuals are taken from a cubic over the sizes near the best one: over a wide valley the misfit of any polynomial,
# not noise, would set the scale.
_NOISE_WINDOW_LOG_PARAMS = 1.5


def noise_scale(valleys: Sequence[Valley]) -> NoiseScale:
    """Pooled from the residuals of every valley (about a cubic where there are six sizes or more, else a parabola),
    replicates (runs that differ only in their seed) counting as points of their own."""
    total, freedom = 0.0, 0
    for v in valleys:
        mean = np.bincount(v.size, v.loss) / np.bincount(v.size)
        x = v.log_n[np.unique(v.size, return_index=True)[1]]
        distance = np.abs(x - x[int(np.argmin(mean))])
        limit = max(_NOISE_WINDOW_LOG_PARAMS, float(np.sort(distance)[min(6, x.size) - 1]))
        near = (distance <= limit)[v.size]
        sizes = int(np.unique(v.size[near]).size)
        degree = 3 if sizes >= 6 else 2
        if sizes <= degree and np.count_nonzero(near) <= sizes:
            continue
        if sizes <= degree:  # too few sizes for a curve: the replicates alone
            residual = v.loss[near] - mean[v.size[near]]
            df = int(np.count_nonzero(near)) - sizes
        else:
            residual = v.loss[near] - polynomial_fit(v.log_n[near], v.loss[near], v.weight[near], degree)
            df = int(np.count_nonzero(near)) - degree - 1
        total += float((v.weight[near] / v.weight[near].mean() * residual**2).sum())
        freedom += df
    return NoiseScale(float(np.sqrt(total / freedom)) if freedom else float("nan"), freedom)


def split_valleys(
    observations: Observations, tolerance: float, weights: Array | None = None
) -> tuple[list[Valley], list[str]]:
    """Group points by budget (clusters of FLOPs where the source gives none) and leave out runs off their budget."""
    obs = observations.with_budgets()
    given = np.isfinite(observations.budget_flops)
    weight = np.ones(obs.n_points) if weights is None else weights
    valleys: list[Valley] = []
    notes: list[str] = []
    if not given.all():
        notes.append("Budgets are clusters of FLOPs within 10%.")
    if not obs.budgets_match_convention:
        notes.append(
            "The budgets were planned under another FLOP convention: the valleys are those of the plan, their minima"
            " are restated in this convention's N and C."
        )
    order = np.lexsort((obs.n_params, obs.budget_flops))
    starts = np.flatnonzero(np.diff(obs.budget_flops[order], prepend=-1.0))
    for at in np.split(order, starts[1:]):
        budget = float(obs.budget_flops[at[0]])
        off = given[at] & (np.abs(np.log(obs.compute_flops[at] / budget)) > np.log1p(tolerance))
        if obs.budgets_match_convention and off.any():
            if off.mean() > 0.5:
                notes.append(
                    f"Budget {budget:.4g}: {int(off.sum())} of {at.size} runs are off it by more than {tolerance:.0%}, so"
                    " budget_flops seems to count otherwise than flops; it only groups the runs."
                )
            else:
                named = ", ".join(str(r) for r in obs.run_id[at[off]][:5])
                notes.append(
                    f"Budget {budget:.4g}: left out, off the budget by more than {tolerance:.0%}: {named}."
                )
                at = at[~off]
        _, size = np.unique(obs.n_params[at], return_inverse=True)
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


def tokens_at(valley: Valley, log_n: Array) -> tuple[Array, Array]:
    """(samples,) ln C and ln D of the valley's runs at ln N, interpolated: so D follows the observed FLOPs per token,
    not 6 N D, when the convention differs."""
    first = np.unique(valley.size, return_index=True)[1]
    x = valley.log_n[first]
    per_size = np.bincount(valley.size)
    log_c = np.bincount(valley.size, valley.log_c) / per_size
    log_d = np.bincount(valley.size, valley.log_d) / per_size
    known = np.where(np.isfinite(log_n), log_n, x[0])
    c = np.interp(known, x, log_c)
    # FLOPs per token is the smooth one to interpolate; D alone is as rough as the runs' rounding to whole steps.
    per_token = np.interp(known, x, log_c - log_d)
    return c, c - per_token


def _reason(status: BudgetStatus, valley: Valley, log_n: float, minimum: str) -> str:
    lo, hi = np.exp(valley.log_n[0]), np.exp(valley.log_n[-1])
    if status is BudgetStatus.TOO_FEW:
        need = MINIMUM_SIZES[minimum]
        return f"{valley.n_sizes} distinct size(s); a {minimum} needs at least {need}."
    if status is BudgetStatus.CONCAVE:
        return f"The {minimum} through the losses opens downwards: no minimum."
    if status is BudgetStatus.EDGE:
        mean = np.bincount(valley.size, valley.loss) / np.bincount(valley.size)
        which = "smallest" if int(np.argmin(mean)) == 0 else "largest"
        n = lo if which == "smallest" else hi
        return f"The best sampled size is the {which} (N = {n:.4g}): the minimum may lie beyond the sampled sizes."
    return f"The {minimum}'s minimum, N = {np.exp(log_n):.4g}, lies outside the sampled sizes, {lo:.4g} to {hi:.4g}."


def _too_few_budgets(budgets: Sequence[BudgetOptimum]) -> str:
    usable = sum(b.status is BudgetStatus.OK for b in budgets)
    first = next((b.message for b in budgets if b.status is not BudgetStatus.OK and b.message), None)
    why = f" First reason: {first}" if first else ""
    if len(budgets) < 2:
        return f"IsoFLOP needs at least two budgets, there is {len(budgets)}.{why}"
    return f"IsoFLOP needs at least two budgets with a minimum, {usable} of {len(budgets)} have one.{why}"
