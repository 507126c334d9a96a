"""Owns Approach 1 (Hoffmann et al. 2022, arXiv 2203.15556, section 3.1): the lower envelope of the training curves.

Every run's loss is interpolated at 1500 log-spaced FLOP values; at each, the run with the lowest loss says which size
is best. With discrete sizes that is a staircase: each size is best over a whole range of C. A regression through all its
points is pulled towards flatness, because inside each step N does not move while C does: with k equal steps the slope
comes out (1 - 1/k^2) of the truth, 4% low with seven sizes. So by default the *crossings* are regressed: the compute at
which the envelope passes from one size to the next, paired with the two sizes' geometric mean. For
L = E + A N^-alpha + B D^-beta and sizes in a constant ratio, the crossings lie exactly on a power law with the true
exponent. `edge=keep` regresses every point of the staircase, and `method=hull` the vertices of the convex hull in
(ln C, ln L), as publications did. Where every size has several horizons, `method=ends` (what `auto` then takes) makes the
envelope from the runs' ends alone (`ends.py`): between them a curve with a falling LR is not at its compute's best loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.envelope.annealing import schedule_notes, training_notes
from scaling_lab.analysis.approaches.envelope.ends import (
    LEAST_CROSSINGS,
    EndsDesign,
    design_of,
    ends_frontier,
    ends_points,
    ends_quantities,
    envelope_of_ends,
    serves,
    simulated_quantities,
)
from scaling_lab.analysis.approaches.envelope.hull import hull_points, hull_vertices
from scaling_lab.analysis.data.observations import Curves, Observations
from scaling_lab.analysis.estimate import Array, Estimate, FitStatus
from scaling_lab.analysis.frontiers import FrontierPoints, frontier_from, quantities
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval
from scaling_lab.core.errors import UserError, unknown

METHODS = ("auto", "interpolate", "ends", "hull")
EDGES = ("drop", "keep")
# Up to so many points a run a monotone cubic interpolates between them; denser curves are joined by straight lines.
_SPARSE_CURVE = 200


@dataclass(frozen=True)
class EnvelopeSettings:
    """Options `approach.envelope.*`."""

    method: Literal["auto", "interpolate", "ends", "hull"] = "auto"
    """The lower envelope of interpolated curves, of the losses that each size's runs end at, or the lower convex hull of
    the points in (ln C, ln L). `auto`: `ends` where five sizes have three horizons each (and `edge=drop`), else
    `interpolate`."""
    edge: Literal["drop", "keep"] = "drop"
    """What to do where the best size is the smallest or largest sampled: the true best may lie beyond it."""
    grid_points: int = 1500
    """FLOP values, log-spaced over the curves' range."""
    curve: Literal["auto", "validation", "train"] = "auto"
    """Of a sweep's records: which loss makes the curves (a table's rows are always taken as they are)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("approach.envelope.method", self.method, METHODS)
        if self.edge not in EDGES:
            raise unknown("approach.envelope.edge", self.edge, EDGES)
        if self.curve not in ("auto", "validation", "train"):
            raise unknown("approach.envelope.curve", self.curve, ("auto", "validation", "train"))
        if self.method == "ends" and self.edge == "keep":
            raise UserError(
                "approach.envelope.edge=keep has no meaning with approach.envelope.method=ends, which regresses crossings"
                " only; choose method=interpolate or method=hull."
            )
        if self.grid_points < 50:
            raise UserError(f"approach.envelope.grid_points={self.grid_points} must be at least 50.")


@dataclass(frozen=True)
class Interpolated:
    """Every run's curve on the common grid."""

    log_c: Array
    """(grid,)"""
    log_loss: Array
    """(runs, grid), inf where a run has no data."""
    log_per_token: Array
    """(runs,) ln of FLOPs per token."""
    log_size: Array
    """(sizes,) ascending ln N."""
    size: NDArray[np.int64]
    """(runs,) index into the sizes."""
    log_c_end: Array
    """(runs,) ln C at which each run ended."""
    run: NDArray[np.int64]
    """(runs,) index into the observations' runs."""


@dataclass(frozen=True)
class Staircase:
    """The envelope of one sample of runs on the grid."""

    best: NDArray[np.int64]
    """(grid,) the run with the lowest loss, as index into `Interpolated`; -1 where no run has data."""
    log_loss: Array
    size: NDArray[np.int64]
    """(grid,) its size, -1 where there is none."""


@dataclass(frozen=True)
class Envelope:
    """Approach 1 with its settings; pure methods."""

    settings: EnvelopeSettings = field(default_factory=EnvelopeSettings)
    name: str = "envelope"

    def method(self, observations: Observations) -> str:
        """The method used for these observations: `auto` resolved."""
        return "ends" if self._ends_design(observations) is not None else self._other_method

    @property
    def _other_method(self) -> str:
        return "interpolate" if self.settings.method == "auto" else self.settings.method

    def _ends_design(self, observations: Observations) -> EndsDesign | None:
        """None where another method is used."""
        s = self.settings
        if s.method != "ends" and (s.method != "auto" or s.edge == "keep"):
            return None
        design = design_of(observations.final(), s.grid_points)
        if s.method == "ends":
            return design
        if not (_has_curve(observations.curves, observations.n_runs).any() and serves(design)):
            return None
        crossing = ends_points(design, np.log(observations.final().loss_nats)[None]).weight[0].sum()
        return design if crossing >= LEAST_CROSSINGS else None

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        """Curves -> envelope -> frontier. Always uses every row of every run; `weights` has no meaning here."""
        design = self._ends_design(observations)
        if design is not None:
            return self._ends_estimate(observations, design)
        curves = observations.curves
        is_curve = _has_curve(curves, observations.n_runs)
        with_curve = int(is_curve.sum())
        sizes = np.unique(np.round(np.log(curves.n_params[is_curve[curves.run_index]]), 9)).size
        if with_curve < 2 or sizes < 3:
            what = (
                "every run has a single row, or all its rows at one C: there are no curves."
                if with_curve == 0
                else f"{with_curve} run(s) with a curve, of {sizes} size(s); at least three sizes are needed."
            )
            return Estimate(self.name, FitStatus.NOT_APPLICABLE, f"The envelope needs curves: {what}")
        notes = [
            f"Curves: {curves.kind}, {with_curve} runs, {sizes} sizes.",
            *schedule_notes(observations, is_curve),
        ]
        if self.settings.method == "hull":
            return self._hull_estimate(observations, notes)
        return self._interpolated_estimate(observations, notes)

    def _ends_estimate(self, observations: Observations, design: EndsDesign) -> Estimate:
        final = observations.final()
        log_loss = np.log(final.loss_nats)[None]
        used = sum(s.at.size for s in design.sizes)
        notes = [
            f"The envelope of the runs' ends (method=ends): {used} of {final.n_points} runs, {len(design.sizes)} sizes with"
            " three horizons or more; the curves before their ends play no part.",
            *schedule_notes(observations, np.ones(observations.n_runs, dtype=bool)),
        ]
        if len(design.sizes) < 3:
            message = (
                f"method=ends needs three sizes with three horizons each; {len(design.sizes)} have them."
            )
            return Estimate(self.name, FitStatus.NOT_APPLICABLE, message, diagnostics=tuple(notes))
        points = ends_points(design, log_loss)
        details = envelope_of_ends(design, log_loss, self.settings.grid_points)
        missing = int((points.weight[0] == 0).sum())
        if missing:
            notes.append(
                f"{missing} of {len(design.pairs)} pairs of sizes do not cross within their horizons: left out."
            )
        if points.weight[0].sum() < LEAST_CROSSINGS:
            message = (
                f"{int(points.weight[0].sum())} of {len(design.pairs)} pairs of sizes cross; three at least must, for any"
                " line goes through two. Choices: method=interpolate, or more horizons of each size."
            )
            return Estimate(
                self.name, FitStatus.NOT_APPLICABLE, message, diagnostics=tuple(notes), details=details
            )
        return Estimate(
            self.name,
            FitStatus.CONVERGED,
            f"A power law through {int(points.weight[0].sum())} crossings of sizes' losses at the ends of their runs.",
            ends_frontier(points),
            diagnostics=tuple(notes),
            details=details,
        )

    def _interpolated_estimate(self, observations: Observations, notes: list[str]) -> Estimate:
        grid = interpolate(observations.curves, self.settings.grid_points)
        stairs = staircase(grid, np.arange(grid.run.size))
        details = _details(grid, stairs)
        seen = stairs.best >= 0
        edge = seen & ((stairs.size == 0) | (stairs.size == grid.log_size.size - 1))
        if self.settings.edge == "keep":
            points = _all_points(grid, stairs)
            notes.append(
                f"{int(edge.sum())} of {int(seen.sum())} envelope points lie at the smallest or largest size: kept."
            )
        else:
            points, forced = crossings(grid, stairs)
            notes.append(
                f"{int(edge.sum())} of {int(seen.sum())} envelope points lie at the smallest or largest size: dropped;"
                f" {points.log_c.size} crossings between neighbouring best sizes are regressed."
            )
            if forced:
                notes.append(f"{forced} change(s) of the best size left out: a run's curve ended there.")
        notes += training_notes(grid.log_c[seen], grid.log_c_end[stairs.best[seen]])
        return self._finish(points, details, notes)

    def _hull_estimate(self, observations: Observations, notes: list[str]) -> Estimate:
        curves = observations.curves
        at = hull_vertices(np.log(curves.compute_flops), np.log(curves.loss_nats))
        n = curves.n_params[at]
        edge = (n <= curves.n_params.min()) | (n >= curves.n_params.max())
        keep = at if self.settings.edge == "keep" else at[~edge]
        notes.append(
            "A hull has few vertices, mostly of the luckiest runs: intervals by run are too narrow (90% ones of the exponent"
            " covered 70% of simulated studies: results/calibration.txt)."
        )
        verb = "kept" if self.settings.edge == "keep" else "dropped"
        notes.append(
            f"{int(edge.sum())} of {at.size} hull vertices lie at the smallest or largest size: {verb}."
        )
        details: dict[str, NDArray[Any]] = {
            "compute_flops": curves.compute_flops[at],
            "loss_nats": curves.loss_nats[at],
            "params": n,
            "run_index": curves.run_index[at],
        }
        return self._finish(hull_points(curves, keep), details, notes)

    def default_unit(self, observations: Observations) -> str:
        """Runs, since the rows of a curve are not independent; noise about a fitted law where only the ends are used."""
        return "run" if self._ends_design(observations) is None else "residual"

    def resample(
        self,
        observations: Observations,
        draws: Draws,
        weights: Array | None = None,
        estimate: Estimate | None = None,
    ) -> dict[str, Array]:
        """(resamples,) each: the frontier's quantities; see `uncertainty.Approach`. Curves are drawn whole, whatever the unit."""
        design = self._ends_design(observations)
        if design is not None:
            return self._resampled_ends(observations, design, draws)
        if draws.unit == "residual":
            raise NoInterval("bootstrap.unit=residual is for IsoFLOP grids; curves are resampled by run.")
        drawn = draws.run_counts(observations) > 0
        many = (
            self._resampled_hulls(observations.curves, drawn)
            if self.settings.method == "hull"
            else self._resampled_envelopes(observations.curves, drawn)
        )
        return quantities(_padded(many), floor_at_zero=False)

    def _resampled_ends(
        self, observations: Observations, design: EndsDesign, draws: Draws
    ) -> dict[str, Array]:
        final = observations.final()
        if draws.unit == "residual":
            return simulated_quantities(final, design, draws)
        out: dict[str, list[float]] = {}
        for present in draws.run_counts(observations) > 0:
            some = final.points(present[final.run_index])
            part = design_of(some, self.settings.grid_points, least_horizons=2)
            points = ends_points(part, np.log(some.loss_nats)[None])
            for name, value in ends_quantities(points).items():
                out.setdefault(name, []).append(float(value[0]))
        return {name: np.array(values) for name, values in out.items()}

    def _resampled_envelopes(self, curves: Curves, drawn: NDArray[np.bool_]) -> list[FrontierPoints]:
        grid = interpolate(curves, self.settings.grid_points)
        out = []
        for present in drawn[:, grid.run]:
            runs = np.flatnonzero(present)
            stairs = staircase(grid, runs)
            out.append(
                _all_points(grid, stairs)
                if self.settings.edge == "keep"
                else crossings(grid, stairs, runs)[0]
            )
        return out

    def _resampled_hulls(self, curves: Curves, drawn: NDArray[np.bool_]) -> list[FrontierPoints]:
        x, y = np.log(curves.compute_flops), np.log(curves.loss_nats)
        # A vertex of the hull of several runs is a vertex of its own run's hull: only those need be looked at again.
        order = np.argsort(curves.run_index, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(curves.run_index[order])) + 1)
        near = np.concatenate([part[hull_vertices(x[part], y[part])] for part in parts])
        out = []
        for present in drawn:
            at = near[present[curves.run_index[near]]]
            vertices = at[hull_vertices(x[at], y[at])]
            n = curves.n_params[at]
            inside = (curves.n_params[vertices] > n.min()) & (curves.n_params[vertices] < n.max())
            out.append(hull_points(curves, vertices if self.settings.edge == "keep" else vertices[inside]))
        return out

    def _finish(
        self, points: FrontierPoints, details: Mapping[str, NDArray[Any]], notes: list[str]
    ) -> Estimate:
        n_sizes = np.unique(np.round(points.log_n, 9)).size
        if n_sizes < 2:
            edges = "kept" if self.settings.edge == "keep" else "dropped"
            message = (
                f"The envelope shows {points.log_n.size} usable point(s), the edge sizes {edges}: the best size must"
                " change at least twice along it."
            )
            return Estimate(
                self.name, FitStatus.NOT_APPLICABLE, message, diagnostics=tuple(notes), details=details
            )
        compute = (float(np.exp(points.log_c.min())), float(np.exp(points.log_c.max())))
        what = (
            "vertices"
            if self.settings.method == "hull"
            else "points"
            if self.settings.edge == "keep"
            else "crossings"
        )
        message = f"A power law through {points.log_c.size} {what} of the envelope."
        return Estimate(
            self.name,
            FitStatus.CONVERGED,
            message,
            frontier_from(points, compute),
            diagnostics=tuple(notes),
            details=details,
        )


def _has_curve(curves: Curves, n_runs: int) -> NDArray[np.bool_]:
    """(runs,) whether a run's loss is known at two values of C at least."""
    log_c = np.log(curves.compute_flops)
    lowest, highest = np.full(n_runs, np.inf), np.full(n_runs, -np.inf)
    np.minimum.at(lowest, curves.run_index, log_c)
    np.maximum.at(highest, curves.run_index, log_c)
    return highest > lowest


def interpolate(curves: Curves, grid_points: int) -> Interpolated:
    """Put every run with at least two points on a common log-spaced grid of FLOPs, ln L over ln C."""
    log_c, log_loss = np.log(curves.compute_flops), np.log(curves.loss_nats)
    order = np.lexsort((log_c, curves.run_index))
    run = curves.run_index[order]
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    ends = np.append(starts[1:], run.size)
    x, y = log_c[order], log_loss[order]
    log_n, log_d = np.log(curves.n_params[order]), np.log(curves.n_tokens[order])
    kept = [(a, b) for a, b in zip(starts, ends) if b - a >= 2 and x[b - 1] > x[a]]
    lo, hi = min(x[a] for a, _ in kept), max(x[b - 1] for _, b in kept)
    grid = np.linspace(lo, hi, grid_points)
    on_grid = np.full((len(kept), grid_points), np.inf)
    for i, (a, b) in enumerate(kept):
        on_grid[i] = _interpolate_run(x[a:b], y[a:b], grid)
    first = np.array([a for a, _ in kept])
    last = np.array([b - 1 for _, b in kept])
    # One size is one N to nine digits: a product of floats may differ in the last place.
    log_size, size = np.unique(np.round(log_n[first], 9), return_inverse=True)
    return Interpolated(grid, on_grid, x[last] - log_d[last], log_size, size, x[last], run[first])


def _interpolate_run(x: Array, y: Array, grid: Array) -> Array:
    distinct = np.append(np.diff(x) > 1e-12, True)  # of points at one C the last in order stays
    x, y = x[distinct], y[distinct]
    out = np.full(grid.size, np.inf)
    inside = slice(
        int(np.searchsorted(grid, x[0] - 1e-12)), int(np.searchsorted(grid, x[-1] + 1e-12, side="right"))
    )
    if 3 <= x.size <= _SPARSE_CURVE:
        from scipy.interpolate import PchipInterpolator

        out[inside] = PchipInterpolator(x, y)(np.clip(grid[inside], x[0], x[-1]))
    else:
        out[inside] = np.interp(grid[inside], x, y)
    return out


def staircase(grid: Interpolated, runs: NDArray[np.int64]) -> Staircase:
    """The lower envelope of these runs (indices into the grid's runs)."""
    losses = grid.log_loss[runs]
    at = np.argmin(losses, axis=0)
    lowest = losses[at, np.arange(at.size)]
    seen = np.isfinite(lowest)
    best = np.where(seen, runs[at], -1)
    return Staircase(best, lowest, np.where(seen, grid.size[best], -1))


def crossings(
    grid: Interpolated, stairs: Staircase, runs: NDArray[np.int64] | None = None
) -> tuple[FrontierPoints, int]:
    """Where the envelope passes from one best size to the next, and how many such places a curve's end forced.

    Noise makes the best size flicker near a crossing. The staircase is therefore sorted first (its monotone
    rearrangement), which gives each pair of neighbouring best sizes one crossing, in the middle of the flicker.
    """
    seen = np.flatnonzero(stairs.best >= 0)
    ordered = np.sort(stairs.size[seen])
    step = np.flatnonzero(np.diff(ordered))
    low, high = ordered[step], ordered[step + 1]
    left, right = seen[step], seen[step + 1]
    member = np.arange(grid.run.size) if runs is None else runs
    genuine = np.zeros(step.size, dtype=bool)
    log_c, log_loss = np.full(step.size, np.nan), np.full(step.size, np.nan)
    for i in range(step.size):
        lo_runs, hi_runs = member[grid.size[member] == low[i]], member[grid.size[member] == high[i]]
        window = slice(max(left[i] - 1, 0), right[i] + 2)
        lower, upper = grid.log_loss[lo_runs, window].min(axis=0), grid.log_loss[hi_runs, window].min(axis=0)
        genuine[i] = bool(np.isfinite(lower).all() and np.isfinite(upper).all())
        if genuine[i]:
            log_c[i] = _refined(
                grid.log_c[window], lower - upper, 0.5 * (grid.log_c[left[i]] + grid.log_c[right[i]])
            )
            log_loss[i] = 0.5 * (stairs.log_loss[left[i]] + stairs.log_loss[right[i]])
    log_n = 0.5 * (grid.log_size[low] + grid.log_size[high])
    per_token = _per_token(grid)
    log_d = log_c - 0.5 * (per_token[low] + per_token[high])
    g = genuine
    points = FrontierPoints(log_c[g], log_n[g], log_d[g], np.exp(log_loss[g]), np.ones(int(g.sum())))
    return points, int((~g).sum())


def _refined(x: Array, difference: Array, default: float) -> float:
    """ln C at which the lower size's loss rises above the upper's, by a straight line between grid points."""
    change = np.flatnonzero((difference[:-1] <= 0) & (difference[1:] > 0))
    if change.size != 1:
        return default
    j = int(change[0])
    return float(x[j] - difference[j] * (x[j + 1] - x[j]) / (difference[j + 1] - difference[j]))


def _per_token(grid: Interpolated) -> Array:
    """(sizes,) ln FLOPs per token, the mean over a size's runs."""
    return np.bincount(grid.size, grid.log_per_token) / np.bincount(grid.size)


def _all_points(grid: Interpolated, stairs: Staircase) -> FrontierPoints:
    at = np.flatnonzero(stairs.best >= 0)
    best = stairs.best[at]
    log_n = grid.log_size[grid.size[best]]
    log_d = grid.log_c[at] - grid.log_per_token[best]
    return FrontierPoints(grid.log_c[at], log_n, log_d, np.exp(stairs.log_loss[at]), np.ones(at.size))


def _padded(many: list[FrontierPoints]) -> FrontierPoints:
    """Samples with different numbers of points as one array, the missing ones with weight 0."""
    width = max(1, max(p.log_c.size for p in many))
    arrays = [np.zeros((len(many), width)) for _ in range(5)]
    for i, p in enumerate(many):
        for array, values in zip(arrays, (p.log_c, p.log_n, p.log_d, p.loss, p.weight)):
            array[i, : values.size] = values
    return FrontierPoints(*arrays)


def _details(grid: Interpolated, stairs: Staircase) -> dict[str, NDArray[Any]]:
    seen = stairs.best >= 0
    best = stairs.best[seen]
    return {
        "compute_flops": np.exp(grid.log_c[seen]),
        "loss_nats": np.exp(stairs.log_loss[seen]),
        "params": np.exp(grid.log_size[grid.size[best]]),
        "run_index": grid.run[best],
    }
