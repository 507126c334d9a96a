"""Fit all valleys of an IsoFLOP grid, for many samples: minima, fitted curves, and the noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.isoflop.minimum import (
    ValleyMinima,
    WindowedValley,
    apply_window,
    find_minima,
    fitted_curve,
)
from scaling_lab.analysis.approaches.isoflop.shared_shape import (
    PARAMETERS_PER_VALLEY,
    SHARED_PARAMETERS,
    ValleyData,
    fit_shared,
    shared_curve,
)
from scaling_lab.analysis.approaches.isoflop.valleys import Valley
from scaling_lab.analysis.estimate import Array

_CURVE_POINTS = 101


@dataclass(frozen=True)
class NoiseScale:
    """Run-to-run noise of the loss (nats), pooled over the valleys."""

    scale_nats: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class GridFit:
    """The fitted valleys of many samples. Curves and noise scale are those of the first sample."""

    method: str
    """The method used: "shared" falls back to "parabola" if there are too few points for a shared shape."""
    valleys: Sequence[Valley]
    windowed: Sequence[WindowedValley]
    minima: Sequence[ValleyMinima]
    steepness: Array | None = None
    """(samples, 2); only for a shared shape."""
    coefficients: Array | None = None
    """(samples, valleys, 3); only for a shared shape; NaN for a valley that was not part of the fit."""
    notes: tuple[str, ...] = ()

    def curve(self, i: int) -> tuple[Array, Array]:
        """(grid,) ln N over the fitted sizes, and the fitted loss."""
        used = self.windowed[i].weight[0] > 0
        x = self.valleys[i].log_n[used]
        grid = np.linspace(x[0], x[-1], _CURVE_POINTS)
        return grid, self._fitted(i, grid)

    def fitted_loss(self, i: int) -> Array:
        """(points,) the fitted loss at the sizes of a valley, to which resampling adds noise.

        It is the mean loss of the size where there is no fit (outside a local window, or too few sizes), and for Akima,
        whose interpolant passes through all means.
        """
        valley, windowed = self.valleys[i], self.windowed[i]
        mean = (np.bincount(valley.size, valley.loss) / np.bincount(valley.size))[valley.size]
        if self.method == "akima" or not windowed.enough[0]:
            return mean
        return np.where(windowed.weight[0] > 0, self._fitted(i, valley.log_n), mean)

    def _fitted(self, i: int, x: Array) -> Array:
        if self.steepness is not None and self.coefficients is not None:
            own = self.coefficients[:1, i]
            if np.isfinite(own).all():
                return shared_curve(self.steepness[:1], own, x - _center(self.valleys[i]))[0]
        method = "parabola" if self.method == "shared" else self.method
        return fitted_curve(method, self.valleys[i].log_n, self.valleys[i].size, self.windowed[i], x)

    @property
    def noise(self) -> NoiseScale:
        """The noise scale from the residuals of all fitted valleys; replicates (runs that differ only in their seed) count
        as separate points. Akima leaves no residuals, so the residuals of the shared shape are used."""
        if self.method == "akima":
            return fit_grid("shared", None, self.valleys).noise
        total, freedom = 0.0, 0
        shared = self.steepness is not None
        for i, (valley, windowed) in enumerate(zip(self.valleys, self.windowed)):
            weight = windowed.weight[0]
            near = weight > 0
            if not windowed.enough[0] or (shared and windowed.at_edge[0]):
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
        window: half-width in ln N of the sizes to fit, around the best one; None fits all.
        losses, weights: per valley, (samples, points); by default the observed ones, as one sample.
        start: the fit of the observed losses; skips the search for steepnesses and keeps its fallback from "shared".
    """
    if start is not None and method == "shared":
        method = start.method
    if method == "akima":
        window = None
    windowed = [
        apply_window(
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
        found = [find_minima(method, v.log_n, v.size, p) for v, p in zip(valleys, windowed)]
        return GridFit(method, valleys, windowed, found)
    # A valley whose best size is at its edge shows only one flank, so it does not contribute to the shared shape.
    contributes = [p.enough & ~p.at_edge for p in windowed]
    n_points = sum(int(np.count_nonzero(p.weight[0])) for p, t in zip(windowed, contributes) if t[0])
    n_valleys = sum(int(t[0]) for t in contributes)
    if start is None and n_points - PARAMETERS_PER_VALLEY * n_valleys - SHARED_PARAMETERS < 1:
        plain = fit_grid("parabola", window, valleys, losses, weights)
        note = "Too few points for a shared asymmetry of the valleys: plain parabolas were fitted, which are biased if alpha != beta."
        return GridFit(
            plain.method, valleys, plain.windowed, plain.minima, notes=(note,) if n_valleys else ()
        )
    members = [i for i, t in enumerate(contributes) if t.any()]
    n_samples = max((p.loss.shape[0] for p in windowed), default=1)
    blank = np.full((n_samples, len(valleys)), np.nan)
    x_min, loss_min, curvature = blank.copy(), blank.copy(), blank.copy()
    coefficients = np.full((n_samples, len(valleys), PARAMETERS_PER_VALLEY), np.nan)
    steepness = None
    if members:
        data = [_valley_data(valleys[i], windowed[i], contributes[i]) for i in members]
        fit = fit_shared(data, None if start is None or start.steepness is None else start.steepness[0])
        centers = np.array([_center(valleys[i]) for i in members])
        x_min[:, members], loss_min[:, members] = fit.x_min + centers, fit.loss_min
        curvature[:, members], coefficients[:, members] = fit.curvature, fit.coefficients
        steepness = fit.steepness
    found = [
        ValleyMinima(p.status(x_min[:, i]), x_min[:, i], loss_min[:, i], curvature[:, i])
        for i, p in enumerate(windowed)
    ]
    return GridFit("shared", valleys, windowed, found, steepness, coefficients)


def _valley_data(valley: Valley, p: WindowedValley, contributes: NDArray[np.bool_]) -> ValleyData:
    return ValleyData(valley.log_n - _center(valley), p.loss, np.where(contributes[:, None], p.weight, 0.0))


def _center(valley: Valley) -> float:
    return float(valley.log_n.mean())
