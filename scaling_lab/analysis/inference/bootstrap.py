"""Bootstrap: the resampling units, the draws, and the resulting `Band`.

A unit is what is assumed to be independent: runs (rows of their curves only on request), runs that differ only in their
seed, whole budgets, or residuals (noise about the fit). Each approach refits all resamples at once; this module makes the
draws and counts failures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.core.errors import UserError, unknown

UNITS = ("auto", "run", "row", "seed", "budget", "residual")


@dataclass(frozen=True)
class BootstrapSettings:
    """Options `bootstrap.*`."""

    resamples: int = 1000
    """Number of resamples; 0 gives no intervals."""
    unit: Literal["auto", "run", "row", "seed", "budget", "residual"] = "auto"
    """What is resampled; auto: the default of the approach for these data, which is calibrated."""
    level: float = 0.9
    """Level of all intervals, in (0, 1)."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise unknown("bootstrap.unit", self.unit, UNITS)
        if not 0 < self.level < 1:
            raise UserError(f"bootstrap.level={self.level} must be in (0, 1).")
        if self.resamples < 0:
            raise UserError(f"bootstrap.resamples={self.resamples} must not be negative.")


@dataclass(frozen=True)
class Draws:
    """The draws of a bootstrap: reproducible from `seed`, and the same for all approaches."""

    unit: str
    resamples: int
    seed: int

    def rng(self) -> np.random.Generator:
        """A new generator, so that all callers get the same stream."""
        return np.random.default_rng([self.seed, UNITS.index(self.unit)])

    def point_counts(self, observations: Observations) -> Array:
        """(resamples, points) number of times each point is drawn."""
        return self._counts(observations, per_run=False)

    def run_counts(self, observations: Observations) -> Array:
        """(resamples, runs) number of times each run is drawn, always with all its rows."""
        return self._counts(observations.final(), per_run=True)

    def _counts(self, observations: Observations, *, per_run: bool) -> Array:
        rng = self.rng()
        n_points = observations.n_points
        if self.unit == "seed":
            counts = _within_cells(rng, _seed_cells(observations), self.resamples)
        else:
            cluster = _clusters(observations, "run" if per_run and self.unit == "row" else self.unit)
            n_clusters = int(cluster.max()) + 1
            # The same points in the same order give the same draws for every approach.
            drawn = rng.multinomial(n_clusters, np.full(n_clusters, 1.0 / n_clusters), size=self.resamples)
            counts = drawn[:, cluster]
        if not per_run:
            return counts.astype(np.float64)
        by_run = np.zeros((self.resamples, observations.n_runs))
        by_run[:, observations.run_index] = counts.reshape(self.resamples, n_points)
        return by_run


class Approach(Protocol):
    """The interface of the three approaches: an estimate, and a batch of estimates from resampled observations."""

    @property
    def name(self) -> str: ...

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate: ...

    def default_unit(self, observations: Observations) -> str: ...

    def resample(
        self,
        observations: Observations,
        draws: Draws,
        weights: Array | None = None,
        estimate: Estimate | None = None,
    ) -> Mapping[str, Array]:
        """(resamples,) each: the quantities of the estimate of each resample, NaN if it failed.

        Passing `estimate`, of the same observations and weights, skips fitting them again; the result is the same.

        Raises:
            NoInterval: resampling is not possible.
        """
        ...


class NoInterval(Exception):
    """No interval is possible; the message says why."""


def bootstrap(
    approach: Approach,
    observations: Observations,
    estimate: Estimate,
    settings: BootstrapSettings,
    seed: int,
    weights: Array | None = None,
) -> Band:
    """Resample and refit. Failures are counted; if there are no intervals the message of the band says why."""
    unit = approach.default_unit(observations) if settings.unit == "auto" else settings.unit
    method = "residual bootstrap" if unit == "residual" else "bootstrap"

    def empty(why: str, failed: int = 0) -> Band:
        return Band(approach.name, settings.level, unit, method, settings.resamples, failed, seed, {}, why)

    if estimate.frontier is None:
        return empty(f"No interval: {estimate.message}")
    if settings.resamples == 0:
        return empty("No interval: bootstrap.resamples=0.")
    try:
        samples = approach.resample(observations, Draws(unit, settings.resamples, seed), weights, estimate)
    except NoInterval as reason:
        return empty(f"No interval: {reason}")
    succeeded = np.isfinite(samples["params_exponent"]) & np.isfinite(samples["tokens_exponent"])
    failed = int(settings.resamples - succeeded.sum())
    kept = {name: values[succeeded] for name, values in samples.items()}
    message = None
    if failed > 0.1 * settings.resamples:
        message = (
            f"{failed} of {settings.resamples} resamples gave no estimate; the interval is from the others, and is too"
            " narrow."
        )
    if succeeded.sum() < 20:
        return empty(f"No interval: {failed} of {settings.resamples} resamples gave no estimate.", failed)
    band = Band(approach.name, settings.level, unit, method, settings.resamples, failed, seed, kept, message)
    interval = band.interval("params_exponent")
    if interval is not None and not interval.contains(estimate.frontier.params.exponent):
        outside = "The estimate lies outside its own interval, because resampling shifts it systematically; neither is reliable."
        band = replace(band, message=f"{message} {outside}" if message else outside)
    return band


def _clusters(observations: Observations, unit: str) -> NDArray[np.int64]:
    """(points,) the cluster of each point; clusters are drawn whole."""
    if unit == "row":
        return np.arange(observations.n_points)
    if unit == "run":
        return np.unique(observations.run_index, return_inverse=True)[1].astype(np.int64)
    if unit == "budget":
        budgets = observations.with_budgets().budget_flops
        cluster = np.unique(budgets, return_inverse=True)[1].astype(np.int64)
        if cluster.max() < 2:
            raise NoInterval("bootstrap.unit=budget needs at least three budgets.")
        return cluster
    raise NoInterval(f"bootstrap.unit={unit} is not available for this approach.")


def _seed_cells(observations: Observations) -> NDArray[np.int64]:
    """(points,) the cell of each point: runs of the same size and budget, which differ only in their seed."""
    key = np.stack(
        [np.round(np.log(observations.n_params), 9), np.log(observations.with_budgets().budget_flops)]
    )
    cell = np.unique(key, axis=1, return_inverse=True)[1].ravel()
    if np.bincount(cell).max() < 2:
        raise NoInterval("bootstrap.unit=seed needs runs of the same size and budget with different seeds.")
    return cell.astype(np.int64)


def _within_cells(rng: np.random.Generator, cell: NDArray[np.int64], resamples: int) -> NDArray[np.int64]:
    counts = np.ones((resamples, cell.size), dtype=np.int64)
    for c in np.flatnonzero(np.bincount(cell) > 1):
        at = np.flatnonzero(cell == c)
        counts[:, at] = rng.multinomial(at.size, np.full(at.size, 1.0 / at.size), size=resamples)
    return counts
