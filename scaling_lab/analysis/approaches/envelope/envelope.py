"""Approach 1 (Hoffmann et al. 2022, arXiv 2203.15556, section 3.1): the lower envelope of the training curves.

The loss of every run is interpolated at 1500 log-spaced FLOP values; at each, the run with the lowest loss determines the
best size. With discrete sizes that is a staircase: each size is best over a whole range of C. A regression through all its
points is biased toward a flat line, because N is constant along each step while C grows: with k equal steps the slope
is (1 - 1/k^2) of the true one, 4% low for five steps. By default the *crossings* are regressed instead: the compute at
which the envelope passes from one size to the next, paired with the geometric mean of the two sizes. For
L = E + A N^-alpha + B D^-beta and sizes in a constant ratio, the crossings lie exactly on a power law with the true
exponent. `edge=keep` regresses all points of the staircase, and `method=hull` the vertices of the convex hull in
(ln C, ln L), as some publications do. With several horizons per size, `method=ends` (chosen by `auto`) builds the envelope
from final losses alone (`ends.py`), since before its LR has decayed a run is not at the best loss for its compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.envelope.annealing import schedule_notes, training_notes
from scaling_lab.analysis.approaches.envelope.ends import (
    MIN_CROSSINGS,
    EndsGrid,
    ends_frontier,
    ends_grid,
    ends_points,
    envelope_of_ends,
    has_enough_sizes,
    resampled_quantities,
    simulated_quantities,
)
from scaling_lab.analysis.approaches.envelope.hull import hull_points, hull_vertices, resampled_hulls
from scaling_lab.analysis.approaches.envelope.staircase import (
    all_points,
    crossings,
    figure_arrays,
    interpolate,
    resampled_envelopes,
    staircase,
)
from scaling_lab.analysis.data.observations import Curves, Observations
from scaling_lab.analysis.estimate import Array, Estimate, FitStatus
from scaling_lab.analysis.frontiers import FrontierPoints, frontier_from, quantities, stack_points
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval
from scaling_lab.core.errors import UserError, unknown

METHODS = ("auto", "interpolate", "ends", "hull")
EDGES = ("drop", "keep")


@dataclass(frozen=True)
class EnvelopeSettings:
    """Options `approach.envelope.*`."""

    method: Literal["auto", "interpolate", "ends", "hull"] = "auto"
    """The lower envelope of interpolated curves (interpolate) or of the final losses of each size (ends), or the lower
    convex hull of all points in (ln C, ln L) (hull). `auto`: `ends` if five sizes have three horizons each (and
    `edge=drop`), else `interpolate`."""
    edge: Literal["drop", "keep"] = "drop"
    """What to do if the best size is the smallest or largest sampled one: the true optimum may lie beyond it."""
    grid_points: int = 1500
    """Number of FLOP values, log-spaced over the range of the curves."""
    curve: Literal["auto", "validation", "train"] = "auto"
    """Which loss of a sweep's records forms the curves (the rows of a table are used as they are)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("approach.envelope.method", self.method, METHODS)
        if self.edge not in EDGES:
            raise unknown("approach.envelope.edge", self.edge, EDGES)
        if self.curve not in ("auto", "validation", "train"):
            raise unknown("approach.envelope.curve", self.curve, ("auto", "validation", "train"))
        if self.method == "ends" and self.edge == "keep":
            raise UserError(
                "approach.envelope.edge=keep does not apply to approach.envelope.method=ends, which regresses only"
                " crossings. Choices: method=interpolate, method=hull."
            )
        if self.grid_points < 50:
            raise UserError(f"approach.envelope.grid_points={self.grid_points} must be at least 50.")


@dataclass(frozen=True)
class Envelope:
    """Approach 1 with its settings."""

    settings: EnvelopeSettings = field(default_factory=EnvelopeSettings)
    name: str = "envelope"

    def method(self, observations: Observations) -> str:
        """The method for these observations, with `auto` resolved."""
        return "ends" if self._ends_grid(observations) is not None else self._other_method

    @property
    def _other_method(self) -> str:
        return "interpolate" if self.settings.method == "auto" else self.settings.method

    def _ends_grid(self, observations: Observations) -> EndsGrid | None:
        """The sizes and pairs for `method=ends`; None if another method is used."""
        s = self.settings
        if s.method != "ends" and (s.method != "auto" or s.edge == "keep"):
            return None
        grid = ends_grid(observations.final(), s.grid_points)
        if s.method == "ends":
            return grid
        if not (_has_curve(observations.curves, observations.n_runs).any() and has_enough_sizes(grid)):
            return None
        crossing = ends_points(grid, np.log(observations.final().loss_nats)[None]).weight[0].sum()
        return grid if crossing >= MIN_CROSSINGS else None

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        """Curves -> envelope -> frontier. Always uses all rows of all runs; `weights` is ignored."""
        grid = self._ends_grid(observations)
        if grid is not None:
            return self._ends_estimate(observations, grid)
        curves = observations.curves
        is_curve = _has_curve(curves, observations.n_runs)
        n_curves = int(is_curve.sum())
        sizes = np.unique(np.round(np.log(curves.n_params[is_curve[curves.run_index]]), 9)).size
        if n_curves < 2 or sizes < 3:
            what = (
                "every run has a single row, or all its rows at one C."
                if n_curves == 0
                else f"{n_curves} run(s) with a curve, of {sizes} size(s); at least three sizes are needed."
            )
            return Estimate(self.name, FitStatus.NOT_APPLICABLE, f"The envelope needs curves: {what}")
        notes = [
            f"Curves: {curves.kind}, {n_curves} runs, {sizes} sizes.",
            *schedule_notes(observations, is_curve),
        ]
        if self.settings.method == "hull":
            return self._hull_estimate(observations, notes)
        return self._interpolated_estimate(observations, notes)

    def _ends_estimate(self, observations: Observations, grid: EndsGrid) -> Estimate:
        final = observations.final()
        log_loss = np.log(final.loss_nats)[None]
        used = sum(s.at.size for s in grid.sizes)
        notes = [
            f"Envelope of the final losses (method=ends): {used} of {final.n_points} runs, {len(grid.sizes)} sizes with at"
            " least three horizons; losses during training are not used.",
            *schedule_notes(observations, np.ones(observations.n_runs, dtype=bool)),
        ]
        if len(grid.sizes) < 3:
            message = (
                f"method=ends needs three sizes with three horizons each; {len(grid.sizes)} of them qualify."
            )
            return Estimate(self.name, FitStatus.NOT_APPLICABLE, message, diagnostics=tuple(notes))
        points = ends_points(grid, log_loss)
        details = envelope_of_ends(grid, log_loss, self.settings.grid_points)
        missing = int((points.weight[0] == 0).sum())
        if missing:
            notes.append(
                f"{missing} of {len(grid.pairs)} pairs of sizes do not cross within their horizons and are not used."
            )
        if points.weight[0].sum() < MIN_CROSSINGS:
            message = (
                f"{int(points.weight[0].sum())} of {len(grid.pairs)} pairs of sizes cross; at least three are"
                " needed, since a line always fits two points. Choices: method=interpolate, or more horizons per size."
            )
            return Estimate(
                self.name, FitStatus.NOT_APPLICABLE, message, diagnostics=tuple(notes), details=details
            )
        return Estimate(
            self.name,
            FitStatus.CONVERGED,
            f"A power law through {int(points.weight[0].sum())} crossings between the final losses of pairs of sizes.",
            ends_frontier(points),
            diagnostics=tuple(notes),
            details=details,
        )

    def _interpolated_estimate(self, observations: Observations, notes: list[str]) -> Estimate:
        grid = interpolate(observations.curves, self.settings.grid_points)
        stairs = staircase(grid, np.arange(grid.run.size))
        details = figure_arrays(grid, stairs)
        seen = stairs.best >= 0
        edge = seen & ((stairs.size == 0) | (stairs.size == grid.log_size.size - 1))
        if self.settings.edge == "keep":
            points = all_points(grid, stairs)
            notes.append(
                f"{int(edge.sum())} of {int(seen.sum())} envelope points lie at the smallest or largest size: kept."
            )
        else:
            points, n_cut = crossings(grid, stairs)
            notes.append(
                f"{int(edge.sum())} of {int(seen.sum())} envelope points lie at the smallest or largest size: dropped;"
                f" {points.log_c.size} crossings between neighboring best sizes are regressed."
            )
            if n_cut:
                notes.append(
                    f"{n_cut} change(s) of the best size left out, because a run's curve ended there."
                )
        notes += training_notes(grid.log_c[seen], grid.log_c_end[stairs.best[seen]])
        return self._finish(points, details, notes)

    def _hull_estimate(self, observations: Observations, notes: list[str]) -> Estimate:
        curves = observations.curves
        at = hull_vertices(np.log(curves.compute_flops), np.log(curves.loss_nats))
        n = curves.n_params[at]
        edge = (n <= curves.n_params.min()) | (n >= curves.n_params.max())
        keep = at if self.settings.edge == "keep" else at[~edge]
        notes.append(
            "A hull has few vertices, mostly from runs with favorable noise, so intervals by run are too narrow (90% intervals"
            " of the exponent covered the truth in 70% of simulated studies; results/benchmarks/calibration.txt)."
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
        """`run`, since the rows of a curve are not independent; `residual` (noise about a fitted law) for final losses alone."""
        return "run" if self._ends_grid(observations) is None else "residual"

    def resample(
        self,
        observations: Observations,
        draws: Draws,
        weights: Array | None = None,
        estimate: Estimate | None = None,
    ) -> dict[str, Array]:
        """(resamples,) each: quantities of the frontier; see `bootstrap.Approach`. Whole curves are drawn for every unit."""
        grid = self._ends_grid(observations)
        if grid is not None:
            return self._resampled_ends(observations, grid, draws)
        if draws.unit == "residual":
            raise NoInterval("bootstrap.unit=residual is for IsoFLOP grids; curves are resampled by run.")
        drawn = draws.run_counts(observations) > 0
        keep_edges = self.settings.edge == "keep"
        resampled = (
            resampled_hulls(observations.curves, drawn, keep_edges)
            if self.settings.method == "hull"
            else resampled_envelopes(observations.curves, drawn, self.settings.grid_points, keep_edges)
        )
        return quantities(stack_points(resampled), floor_at_zero=False)

    def _resampled_ends(self, observations: Observations, grid: EndsGrid, draws: Draws) -> dict[str, Array]:
        final = observations.final()
        if draws.unit == "residual":
            return simulated_quantities(final, grid, draws)
        return resampled_quantities(final, draws.run_counts(observations) > 0, self.settings.grid_points)

    def _finish(
        self, points: FrontierPoints, details: Mapping[str, NDArray[Any]], notes: list[str]
    ) -> Estimate:
        n_sizes = np.unique(np.round(points.log_n, 9)).size
        if n_sizes < 2:
            edges = "kept" if self.settings.edge == "keep" else "dropped"
            message = (
                f"The envelope has {points.log_n.size} usable point(s) with the edge sizes {edges}; the best size must"
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
    """(runs,) whether the loss of a run is known at two or more values of C."""
    log_c = np.log(curves.compute_flops)
    lowest, highest = np.full(n_runs, np.inf), np.full(n_runs, -np.inf)
    np.minimum.at(lowest, curves.run_index, log_c)
    np.maximum.at(highest, curves.run_index, log_c)
    return highest > lowest
