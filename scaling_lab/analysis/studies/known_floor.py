"""Owns what a corpus of known entropy tells: the true irreducible loss beside the fitted one, and the reducible loss itself.

The floor is the mean true -ln p of the very validation windows, so L - floor is measured and not fitted. Where it is a
straight line on log axes, the loss is a power law of compute; how straight it is, is measured too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.parametric import Parametric
from scaling_lab.analysis.data.observations import FLOOR, Observations
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.studies.known_floor_error import floor_errors

# A stretch counts as straight if no point is further than this from its line, in ln(L - floor).
STRAIGHT_WITHIN = 0.03
# A line through fewer points says nothing.
MIN_POINTS = 3
# Neighbours in ln C closer than this are of one budget.
SAME_BUDGET = 0.05


@dataclass(frozen=True)
class KnownFloor:
    """The true floor, the fitted one, and the reducible loss of the best models at each compute."""

    floor_nats: float
    fitted_nats: float | None
    """E of the parametric fit; None where it has none."""
    interval: tuple[float, float] | None
    standard_error_nats: float | None
    """How far a fitted E strays from the true one, on the side where this one lies."""
    compute_flops: Array
    """(points,) ascending: the frontier of the runs' ends, each point the lowest loss up to there."""
    reducible_nats: Array
    """(points,) loss less the floor."""
    line: ReducibleLine | None
    """The straight part; None with too few points."""
    error_simulated: bool = False
    """The standard error is that of fits to sweeps simulated at the true E (`known_floor_error`), for which z is calibrated;
    otherwise the spread of the resamples."""

    @property
    def z(self) -> float | None:
        """How many standard errors the fitted E lies from the true one: (fitted - true) / standard error."""
        if self.fitted_nats is None or not self.standard_error_nats:
            return None
        return (self.fitted_nats - self.floor_nats) / self.standard_error_nats


@dataclass(frozen=True)
class ReducibleLine:
    """ln(L - floor) = intercept - exponent ln C over the longest straight stretch, and how it bends over the whole."""

    exponent: float
    intercept: float
    compute_range_flops: tuple[float, float]
    n_points: int
    largest_deviation: float
    """In ln(L - floor), within the range."""
    curvature_per_decade: float | None
    """How much the local exponent grows for each factor of 10 in C, over all points: 0 for a power law."""
    local_exponents: tuple[float, float] | None
    """At the smallest and the largest compute, from the same parabola."""

    def __call__(self, compute_flops: Array) -> Array:
        """Reducible loss on the line, nats."""
        return np.asarray(np.exp(self.intercept - self.exponent * np.log(compute_flops)))


def known_floor(
    observations: Observations,
    approach: Parametric,
    parametric: Estimate,
    band: Band,
    weights: Array | None = None,
) -> KnownFloor | None:
    """None where the floor is not known, or the observations have different ones (different validation sets).

    Args:
        approach: what made `parametric` from the observations and `weights`, and `band` from their resamples.
    """
    column = observations.extra.get(FLOOR)
    if column is None or not np.isfinite(column).all() or np.ptp(column) > 1e-9:
        return None
    floor = float(column[0])
    fit = parametric.fits[0] if parametric.fits else None
    interval = band.interval("E")
    # Where the resamples tell nothing of E (none were asked for, it is not identified), neither would a simulation.
    error, simulated = band.standard_error("E"), None
    if fit is not None and error is not None:
        errors = floor_errors(observations, approach, fit, floor, band.requested, band.seed, weights)
        simulated = None if errors is None else errors.standard_error(fit.parameters["E"] - floor)
    compute, loss = loss_frontier(observations)
    above = loss > floor
    compute, reducible = compute[above], loss[above] - floor
    return KnownFloor(
        floor_nats=floor,
        fitted_nats=None if fit is None else fit.parameters.get("E"),
        interval=None if interval is None else (interval.lo, interval.hi),
        standard_error_nats=error if simulated is None else simulated,
        compute_flops=compute,
        reducible_nats=reducible,
        line=straight_line(compute, reducible),
        error_simulated=simulated is not None,
    )


def loss_frontier(observations: Observations) -> tuple[Array, Array]:
    """(C, L) of every run's end that no run's end at less compute beats, ascending in C.

    Points inside a run are left out: there the learning rate has not fallen, and the loss is not what C can buy.
    """
    order = np.lexsort((observations.loss_nats, observations.compute_flops))
    flops, nats = observations.compute_flops[order], observations.loss_nats[order]
    # Runs of one budget differ by rounding in what they spend: the best of those within 5% speaks for them.
    group = np.concatenate([[0], np.cumsum(np.diff(np.log(flops)) > SAME_BUDGET)])
    best = [np.flatnonzero(group == g)[nats[group == g].argmin()] for g in range(int(group[-1]) + 1)]
    flops, nats = flops[best], nats[best]
    before = np.concatenate([[np.inf], np.minimum.accumulate(nats)[:-1]])
    return flops[nats < before], nats[nats < before]


def straight_line(compute_flops: Array, reducible_nats: Array) -> ReducibleLine | None:
    """The longest stretch in ln C whose points all lie within `STRAIGHT_WITHIN` of its least-squares line."""
    x, y = np.log(compute_flops), np.log(reducible_nats)
    if x.size < MIN_POINTS:
        return None
    best: tuple[float, int, int] | None = None
    for first in range(x.size - MIN_POINTS + 1):
        for last in range(x.size, first + MIN_POINTS - 1, -1):
            length = float(x[last - 1] - x[first])
            if best is not None and length <= best[0]:
                break
            if _deviation(x[first:last], y[first:last]) <= STRAIGHT_WITHIN:
                best = (length, first, last)
                break
    # Noise may leave no stretch straight: then the line is that through all points, and its deviation says so.
    first, last = best[1:] if best else (0, x.size)
    slope, intercept = np.polyfit(x[first:last], y[first:last], 1)
    bend = _parabola(x, y)
    return ReducibleLine(
        exponent=-float(slope),
        intercept=float(intercept),
        compute_range_flops=(float(compute_flops[first]), float(compute_flops[last - 1])),
        n_points=last - first,
        largest_deviation=_deviation(x[first:last], y[first:last]),
        curvature_per_decade=bend[0] if bend else None,
        local_exponents=bend[1] if bend else None,
    )


def _deviation(x: Array, y: Array) -> float:
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.abs(y - slope * x - intercept).max())


def _parabola(x: Array, y: Array) -> tuple[float, tuple[float, float]] | None:
    """(growth of the local exponent per decade, local exponents at both ends) of a parabola through all points."""
    if x.size < MIN_POINTS + 1:
        return None
    centre = x.mean()
    a, b, _ = np.polyfit(x - centre, y, 2)
    ends: NDArray[np.float64] = -(2 * a * (x[[0, -1]] - centre) + b)
    return float(-2 * a * np.log(10)), (float(ends[0]), float(ends[1]))
