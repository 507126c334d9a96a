"""Owns fitting every valley of an IsoFLOP grid together, for many samples: minima, fitted curves, and the noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.isoflop.shared_shape import (
    PARAMETERS_PER_VALLEY,
    SHARED_PARAMETERS,
    ValleyData,
    fit_shared,
    shared_curve,
)
from scaling_lab.analysis.approaches.isoflop.valley import Minima, Prepared, fitted, minima, prepare
from scaling_lab.analysis.approaches.isoflop.valleys import Valley
from scaling_lab.analysis.estimate import Array

_CURVE_POINTS = 101


@dataclass(frozen=True)
class NoiseScale:
    """Run-to-run noise of a loss, nats, pooled over the valleys."""

    scale_nats: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class GridFit:
    """The fitted valleys of many samples. Curves and noise are those of the first sample."""

    method: str
    """What was fitted: "shared" becomes "parabola" where the points do not suffice for a shared shape."""
    valleys: Sequence[Valley]
    prepared: Sequence[Prepared]
    minima: Sequence[Minima]
    steepness: Array | None = None
    """(samples, 2), with a shared shape."""
    coefficients: Array | None = None
    """(samples, valleys, 3), with a shared shape; NaN for a valley that had no part in it."""
    notes: tuple[str, ...] = ()

    def curve(self, i: int) -> tuple[Array, Array]:
        """(grid,) ln N over the fitted sizes and the fitted loss there."""
        used = self.prepared[i].weight[0] > 0
        x = self.valleys[i].log_n[used]
        grid = np.linspace(x[0], x[-1], _CURVE_POINTS)
        return grid, self._fitted(i, grid)

    def fitted_loss(self, i: int) -> Array:
        """(points,) the fitted loss at a valley's own sizes, for resampling about it; the mean loss of the size where the
        fit does not reach (outside a local window, or with too few sizes) or passes through everything (Akima)."""
        valley, prepared = self.valleys[i], self.prepared[i]
        mean = (np.bincount(valley.size, valley.loss) / np.bincount(valley.size))[valley.size]
        if self.method == "akima" or not prepared.enough[0]:
            return mean
        return np.where(prepared.weight[0] > 0, self._fitted(i, valley.log_n), mean)

    def _fitted(self, i: int, x: Array) -> Array:
        if self.steepness is not None and self.coefficients is not None:
            own = self.coefficients[:1, i]
            if np.isfinite(own).all():
                return shared_curve(self.steepness[:1], own, x - _centre(self.valleys[i]))[0]
        method = "parabola" if self.method == "shared" else self.method
        return fitted(method, self.valleys[i].log_n, self.valleys[i].size, self.prepared[i], x)

    @property
    def noise(self) -> NoiseScale:
        """Pooled from the residuals about the fitted valleys, replicates (runs that differ only in their seed) counting
        as points of their own. Akima leaves no residuals: there the shared shape's are taken."""
        if self.method == "akima":
            return fit_grid("shared", None, self.valleys).noise
        total, freedom = 0.0, 0
        shared = self.steepness is not None
        for i, (valley, prepared) in enumerate(zip(self.valleys, self.prepared)):
            weight = prepared.weight[0]
            near = weight > 0
            if not prepared.enough[0] or (shared and prepared.at_edge[0]):
                continue
            residual = (valley.loss - self._fitted(i, valley.log_n))[near]
            total += float((weight[near] / weight[near].mean() * residual**2).sum())
            freedom += int(np.count_nonzero(near)) - (4 if self.method == "cubic" else PARAMETERS_PER_VALLEY)
        freedom -= SHARED_PARAMETERS if shared else 0
        return NoiseScale(float(np.sqrt(total / freedom)) if freedom > 0 else float("nan"), max(freedom, 0))


def fit_grid(
    method: str,
    window: float | None,
    valleys: Sequence[Valley],
    losses: Sequence[Array] | None = None,
    weights: Sequence[Array] | None = None,
    start: GridFit | None = None,
) -> GridFit:
    """Fit every valley of every sample.

    Args:
        method: shared, parabola, akima or cubic.
        window: half-width in ln N of the fitted sizes about the best one; None takes all.
        losses, weights: per valley (samples, points); by default as observed, one sample.
        start: the fit of the observations themselves: saves the search, and fixes what "shared" fell back to.
    """
    if start is not None and method == "shared":
        method = start.method
    if method == "akima":
        window = None
    prepared = [
        prepare(
            method,
            v.log_n,
            v.size,
            v.loss if losses is None else losses[i],
            v.weight if weights is None else weights[i],
            window,
        )
        for i, v in enumerate(valleys)
    ]
    if method != "shared":
        found = [minima(method, v.log_n, v.size, p) for v, p in zip(valleys, prepared)]
        return GridFit(method, valleys, prepared, found)
    # A valley whose best size is at its edge shows one flank only: it does not help to shape the others.
    takes_part = [p.enough & ~p.at_edge for p in prepared]
    n_points = sum(int(np.count_nonzero(p.weight[0])) for p, t in zip(prepared, takes_part) if t[0])
    n_valleys = sum(int(t[0]) for t in takes_part)
    if start is None and n_points - PARAMETERS_PER_VALLEY * n_valleys - SHARED_PARAMETERS < 1:
        plain = fit_grid("parabola", window, valleys, losses, weights)
        note = "Too few points for an asymmetry shared by the valleys: plain parabolas, which are biased where alpha != beta."
        return GridFit(
            plain.method, valleys, plain.prepared, plain.minima, notes=(note,) if n_valleys else ()
        )
    members = [i for i, t in enumerate(takes_part) if t.any()]
    n_samples = max((p.loss.shape[0] for p in prepared), default=1)
    blank = np.full((n_samples, len(valleys)), np.nan)
    x_min, loss_min, curvature = blank.copy(), blank.copy(), blank.copy()
    coefficients = np.full((n_samples, len(valleys), PARAMETERS_PER_VALLEY), np.nan)
    steepness = None
    if members:
        data = [_valley_data(valleys[i], prepared[i], takes_part[i]) for i in members]
        fit = fit_shared(data, None if start is None or start.steepness is None else start.steepness[0])
        centres = np.array([_centre(valleys[i]) for i in members])
        x_min[:, members], loss_min[:, members] = fit.x_min + centres, fit.loss_min
        curvature[:, members], coefficients[:, members] = fit.curvature, fit.coefficients
        steepness = fit.steepness
    found = [
        Minima(p.status(x_min[:, i]), x_min[:, i], loss_min[:, i], curvature[:, i])
        for i, p in enumerate(prepared)
    ]
    return GridFit("shared", valleys, prepared, found, steepness, coefficients)


def _valley_data(valley: Valley, p: Prepared, takes_part: NDArray[np.bool_]) -> ValleyData:
    return ValleyData(valley.log_n - _centre(valley), p.loss, np.where(takes_part[:, None], p.weight, 0.0))


def _centre(valley: Valley) -> float:
    return float(valley.log_n.mean())
