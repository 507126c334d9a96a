"""Approach 3 (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3): fit a law L(N, D) to all points.

The frontier minimizes the fitted law at fixed compute (`law_frontier.py`). The fitting engine is
`scaling_lab.analysis.fitting.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling_lab.analysis.approaches.law_frontier import (
    flops_per_token,
    frontier_quantities,
    has_closed_form,
    has_frontier,
    law_columns,
)
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate, FitResult, FitStatus, Frontier, LossCurve, PowerLaw
from scaling_lab.analysis.fitting.fit import DEFAULT_HUBER_DELTA, fit, fit_many
from scaling_lab.analysis.frontiers import at_compute
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval
from scaling_lab.analysis.laws import LossLaw, get_law
from scaling_lab.analysis.laws.sums import LogSumLaw
from scaling_lab.core.errors import UserError

# Maximum of points x resamples, which bounds time and memory.
_MAX_RESAMPLED_POINTS = 4e8
# Runs of one budget may differ from it by 10% either way. If all runs lie within this range of ln C, an exponent would follow
# from the form of the law alone.
_MIN_LOG_COMPUTE_RANGE = 2 * np.log(1.1)
# With fewer points per parameter the grid is small: resampling runs would leave out whole flanks of valleys.
_MIN_POINTS_PER_PARAMETER = 10


@dataclass(frozen=True)
class ParametricSettings:
    """Options `approach.parametric.*`."""

    law: str = "chinchilla"
    law_options: Mapping[str, Any] = field(default_factory=dict)
    huber_delta: float = DEFAULT_HUBER_DELTA
    objective: str = "huber_log"

    def __post_init__(self) -> None:
        get_law(self.law, **self.law_options)  # raises for an unknown law or option before a table is read
        if not self.huber_delta > 0:
            raise UserError(f"approach.parametric.huber_delta={self.huber_delta} must be positive.")


@dataclass(frozen=True)
class Parametric:
    """Approach 3 with its settings."""

    settings: ParametricSettings = field(default_factory=ParametricSettings)
    name: str = "parametric"

    @property
    def law(self) -> LossLaw:
        return get_law(self.settings.law, **self.settings.law_options)

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        """Points -> fitted law -> frontier.

        Raises:
            UserError: the law needs a column that is missing.
        """
        law = self.law
        columns = law_columns(observations, law)
        result = fit(
            law,
            columns,
            loss_nats=observations.loss_nats,
            weights=weights,
            huber_delta=self.settings.huber_delta,
            objective=self.settings.objective,  # type: ignore[arg-type]
        )
        notes: list[str] = []
        status, message = result.status, result.message
        frontier = None
        if not has_frontier(law):
            status = FitStatus.NOT_APPLICABLE if status is FitStatus.CONVERGED else status
            message = f"{law.title or law.name} has no compute-optimal frontier: it does not depend on both N and D. {message}"
        elif (
            status is not FitStatus.NOT_IDENTIFIED
            and np.ptp(np.log(observations.compute_flops)) < _MIN_LOG_COMPUTE_RANGE
        ):
            status = FitStatus.NOT_IDENTIFIED
            message = (
                "All points have the same compute, so they show the best size there but not how it grows with compute; that"
                f" needs runs at another budget. (The fit itself: {message})"
            )
        elif status is not FitStatus.NOT_IDENTIFIED:
            frontier = self._frontier(observations, law, result, notes)
            if frontier is None:
                status, message = (
                    FitStatus.NOT_IDENTIFIED,
                    f"The fitted law has no interior optimum. {message}",
                )
        return Estimate(
            self.name, status, message, frontier, law=law.name, fits=(result,), diagnostics=tuple(notes)
        )

    def default_unit(self, observations: Observations) -> str:
        """`run`, since several rows of one run are not independent; `residual` (noise about the fit) on a small grid with one
        point per run, where resampling few runs overstates the error (scripts/calibrate.py measures both)."""
        one_point_per_run = np.bincount(observations.run_index).max() == 1
        small = observations.n_points < _MIN_POINTS_PER_PARAMETER * len(self.law.parameters)
        return "residual" if one_point_per_run and small else "run"

    def resample(
        self,
        observations: Observations,
        draws: Draws,
        weights: Array | None = None,
        estimate: Estimate | None = None,
    ) -> dict[str, Array]:
        """(resamples,) each: quantities of the frontier and parameters of the law; see `bootstrap.Approach`.

        E may be below 0 in a resample (it is reported as 0). If the true E is 0, resamples bounded at E = 0 pile up there,
        which cuts off one tail of all other parameters (90% intervals of alpha then cover 75%: scripts/calibrate.py).
        """
        law = self.law
        free = law.with_free_floor() if isinstance(law, LogSumLaw) else law
        if draws.resamples * float(observations.n_points) > _MAX_RESAMPLED_POINTS:
            raise NoInterval(
                f"{observations.n_points} points x {draws.resamples} resamples are too many. Choices: points=final, or a"
                " smaller bootstrap.resamples."
            )
        columns = law_columns(observations, law)
        options: dict[str, Any] = {
            "huber_delta": self.settings.huber_delta,
            "objective": self.settings.objective,
        }
        if draws.unit == "residual":
            if estimate is not None and estimate.fits:
                fitted = estimate.fits[0]
            else:
                fitted = fit(law, columns, loss_nats=observations.loss_nats, weights=weights, **options)
            if isinstance(free, LogSumLaw) and fitted.parameters.get("E") == 0.0:
                fitted = self._free_fit(free, columns, observations, weights, fitted)
            losses = residual_losses(observations, fitted, draws, weights)
            # The losses are this fit plus noise, so their minima are near it and need no search.
            batch = fit_many(
                free, columns, loss_nats=losses, weights=weights, starts=fitted.parameters, **options
            )
        else:
            counts = draws.point_counts(observations)
            w = counts.astype(np.uint16) if weights is None else counts * weights
            batch = fit_many(free, columns, loss_nats=observations.loss_nats, weights=w, **options)
        samples = frontier_quantities(law, batch.parameters, observations)
        failed = ~batch.reached
        out = {**{k: np.asarray(v, dtype=np.float64) for k, v in batch.parameters.items()}, **samples}
        if "E" in batch.parameters:
            out["E"] = np.maximum(out["E"], 0.0)
        return {name: np.where(failed, np.nan, values) for name, values in out.items()}

    def _free_fit(
        self,
        free: LossLaw,
        columns: Mapping[str, Array],
        observations: Observations,
        weights: Array | None,
        bounded: FitResult,
    ) -> FitResult:
        """The fit with E unbounded, from which resamples are simulated if the estimate is at the bound E = 0; the `bounded`
        fit if that does not converge.

        Resamples simulated from the bounded fit would be centered too close to a truth with E = 0: 90% intervals of A
        then covered 99% of such truths (scripts/calibrate.py).
        """
        result = fit(
            free,
            columns,
            loss_nats=observations.loss_nats,
            weights=weights,
            starts=bounded.parameters,
            huber_delta=self.settings.huber_delta,
            objective=self.settings.objective,  # type: ignore[arg-type]
        )
        return result if result.status is FitStatus.CONVERGED else bounded

    def _frontier(
        self, observations: Observations, law: LossLaw, result: FitResult, notes: list[str]
    ) -> Frontier | None:
        one = {k: np.array([v]) for k, v in result.parameters.items()}
        q = {name: float(v[0]) for name, v in frontier_quantities(law, one, observations).items()}
        if not all(
            np.isfinite(q[k]) for k in ("params_exponent", "tokens_exponent", "params_log_coefficient")
        ):
            return None
        c = observations.compute_flops
        compute = (float(c.min()), float(c.max()))
        if has_closed_form(law, observations):
            notes.append("The frontier is in closed form: flops = 6 params tokens to 1%.")
        else:
            per_token = flops_per_token(observations)
            notes.append(
                "The frontier is computed numerically from the observed FLOPs per token (flops is not 6 params tokens to 1%, or"
                " the law has no closed form); its exponents are those of power laws fitted to it over the observed range."
            )
            if per_token.largest_error > 0.05:
                notes.append(
                    f"FLOPs per token are not a smooth function of N: some sizes deviate by up to {per_token.largest_error:.0%}."
                )
        grid = np.geomspace(*compute, 33)
        samples = {k: np.array(v) for k, v in q.items()}
        points = [at_compute(samples, x) for x in grid]
        return Frontier(
            params=PowerLaw.of_log(q["params_exponent"], q["params_log_coefficient"]),
            tokens=PowerLaw.of_log(q["tokens_exponent"], q["tokens_log_coefficient"]),
            compute_range_flops=compute,
            compute_flops=grid,
            params_opt=np.array([float(p["params_opt"]) for p in points]),
            tokens_opt=np.array([float(p["tokens_opt"]) for p in points]),
            loss_opt=np.array([float(p["loss_opt"]) for p in points]),
            loss=LossCurve(
                q["loss_floor_nats"], float(np.exp(q["loss_log_coefficient"])), q["loss_exponent"]
            ),
        )


def residual_losses(
    observations: Observations, result: FitResult, draws: Draws, weights: Array | None
) -> Array:
    """(resamples, points): the fitted losses with Gaussian noise (in ln L) of the residuals' scale, which is redrawn too.

    Resampling the residuals themselves would be too narrow: a nearly L1 fit passes exactly through as many points as it
    has parameters, so many of few residuals are 0 (measured: 90% intervals cover 80%).
    """
    n, p = observations.n_points, len(result.parameters)
    if n <= p:
        raise NoInterval(f"{n} points leave no residuals for a law of {p} parameters.")
    rng = draws.rng()
    w = np.ones(n) if weights is None else weights
    scale = np.sqrt((w * result.residuals_log**2).sum() / rng.chisquare(n - p, size=draws.resamples))
    noise = scale[:, None] * rng.standard_normal((draws.resamples, n)) / np.sqrt(w)
    return observations.loss_nats * np.exp(result.residuals_log + noise)
