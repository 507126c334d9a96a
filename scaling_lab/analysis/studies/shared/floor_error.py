"""The standard error of a fitted E where the true E is known, from the errors of the same fit in simulated sweeps.

As the truth is known, nothing need be assumed about where E is. Sweeps are simulated under the null that E is the true
one: the law with E held there and its other parameters fitted again, by least squares, plus Gaussian noise in ln L at the
observed points. Each is fitted exactly as the observations were. Resamples about the fit itself, from which the printed
intervals come, are centered on the fitted E instead; their spread grows as that E falls, and their noise has the scale of
residuals of a nearly L1 fit, whose squares exceed least squares' by 7 to 10% (results/LOG.md): z came out a tenth too small.

Two things make z = (fitted - true) / standard error have mean square 1 over sweeps of the same truth:

- Both errors of E, the observed and the simulated, are divided by the noise scale of their own sweep, sqrt(SSE / (n - p)) of
  the least-squares fit with E free. As Student's ratio it does not depend on the unknown noise, only on where the points are.
- The errors of E below the truth and above it differ in size: the standard error is the root mean square of the simulated
  errors on the fitted E's own side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_lab.analysis.approaches.law_frontier import law_columns
from scaling_lab.analysis.approaches.parametric import Parametric
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, FitResult
from scaling_lab.analysis.fitting.fit import fit, fit_many
from scaling_lab.analysis.laws.base import LawInputs, LossLaw
from scaling_lab.analysis.laws.sums import LogSumLaw

# Fewer simulated errors than this do not give their spread (as for `Band.standard_error`).
_FEWEST = 20
# With fewer degrees of freedom than this Student's ratio has no finite variance.
_FEWEST_FREE = 3
# Keeps the simulated noise apart from the resamples of the same seed.
_STREAM = 6161


@dataclass(frozen=True)
class FloorErrors:
    """Errors of E in sweeps simulated at the true E, over the noise scale that each sweep's own least-squares fit shows."""

    ratios: Array
    """(sweeps,) (E - true E) / noise scale, nats per unit of ln L."""
    noise_log: float
    """The noise scale of the observations: sqrt(SSE / (n - p)) in ln L, of the least-squares fit with E free."""

    def standard_error(self, error_nats: float) -> float | None:
        """Root mean square error of E, nats, on the side of `error_nats` = fitted - true; None where there are too few.

        Where fewer than 20 lie on that side (a true E near 0, which no fit goes below), of both sides together.
        """
        side = self.ratios[(self.ratios < 0) == (error_nats < 0)]
        used = side if side.size >= _FEWEST else self.ratios
        if used.size < _FEWEST:
            return None
        return self.noise_log * float(np.sqrt(np.mean(used**2)))


def floor_errors(
    observations: Observations,
    approach: Parametric,
    fitted: FitResult,
    floor_nats: float,
    sweeps: int,
    seed: int,
    weights: Array | None = None,
) -> FloorErrors | None:
    """Simulates `sweeps` sweeps at the true E and fits each as the observations were.

    Args:
        observations: one point a run, since points of one run are not independent.
        fitted: what `approach` fitted to them; its law has an E.
        weights: (points,) of the fit; the noise of a point is taken to fall as 1 / sqrt(weight).

    Returns:
        None where this cannot be simulated: several points a run, fewer than three more points than parameters, or no
        residuals.
    """
    law, n, p = approach.law, observations.n_points, len(fitted.parameters)
    if np.bincount(observations.run_index).max() > 1 or n - p < _FEWEST_FREE:
        return None
    free = law.with_free_floor() if isinstance(law, LogSumLaw) else law
    columns = law_columns(observations, law)
    w = np.ones(n) if weights is None else weights
    squares: dict[str, Any] = {"weights": weights, "objective": "mse_log"}
    loss = observations.loss_nats
    full = fit(free, columns, loss_nats=loss, starts=fitted.parameters, **squares)
    null = fit(_with_floor(law, floor_nats), columns, loss_nats=loss, **squares)
    noise = float(np.sqrt((w * full.residuals_log**2).sum() / (n - p)))
    if not noise > 0:
        return None
    draws = np.random.default_rng([seed, _STREAM]).standard_normal((sweeps, n)) / np.sqrt(w)
    # residuals_log is ln of fit over loss, so this is the null's own loss with fresh noise.
    losses = loss * np.exp(null.residuals_log + noise * draws)
    # Both fits start at the truth of the simulation and need no search.
    again = fit_many(
        free,
        columns,
        loss_nats=losses,
        weights=weights,
        starts=null.parameters,
        huber_delta=approach.settings.huber_delta,
        objective=approach.settings.objective,  # type: ignore[arg-type]
    )
    least = fit_many(free, columns, loss_nats=losses, starts=null.parameters, **squares)
    # The objective is half the sum of squares. A fitted E is not below 0, and so neither is a simulated one.
    error = np.maximum(again.parameters["E"], 0.0) - floor_nats
    with np.errstate(all="ignore"):
        ratios = error / np.sqrt(2 * least.objective / (n - p))
    return FloorErrors(ratios[again.reached & least.reached & np.isfinite(ratios)], noise)


def _with_floor(law: LossLaw, floor_nats: float) -> LossLaw:
    """The same law with E held: bounds that leave it one value."""
    held = copy.copy(law)
    at = law.parameters.index("E")

    def bounds(inputs: LawInputs) -> tuple[Array, Array]:
        lower, upper = law.bounds(inputs)
        lower[at] = upper[at] = law.from_natural({**law.example, "E": floor_nats}, inputs)[at]
        return lower, upper

    object.__setattr__(held, "bounds", bounds)  # a law is frozen; this is a private copy of it
    return held
