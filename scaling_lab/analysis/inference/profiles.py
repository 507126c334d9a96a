"""Profile-likelihood intervals of the parametric approach, reported together with those of the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.approaches.law_frontier import has_closed_form, law_columns
from scaling_lab.analysis.approaches.parametric import Parametric
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate, FitStatus
from scaling_lab.analysis.fitting.profile import profile_intervals
from scaling_lab.analysis.fitting.scale import ScaleName

# With more points tracing the profiles takes seconds, and such tables rarely have one point per run.
_MAX_POINTS = 5_000


@dataclass(frozen=True)
class ProfileEnds:
    """The interval of one quantity; an end is None if the data do not bound it on that side (`message` says so)."""

    lo: float | None
    hi: float | None
    message: str | None = None


@dataclass(frozen=True)
class Profile:
    """Profile intervals of the parametric approach, with an estimated noise scale (fitting/scale.py)."""

    level: float
    scale: ScaleName
    intervals: Mapping[str, ProfileEnds]
    """By quantity: the parameters of the law and, if the frontier has a closed form, both exponents. If empty, see `message`."""
    message: str | None = None


def profile(
    approach: Parametric,
    observations: Observations,
    estimate: Estimate,
    level: float,
    weights: Array | None = None,
    scale: ScaleName = "robust",
) -> Profile:
    """The profile intervals of a parametric estimate, or a message that says why there are none."""

    def no_intervals(why: str) -> Profile:
        return Profile(level, scale, {}, f"No profile intervals: {why}")

    fit = estimate.fits[0] if estimate.fits else None
    if fit is None or fit.status is FitStatus.NOT_IDENTIFIED:
        return no_intervals(estimate.message)
    if fit.status is FitStatus.MAX_STEPS:
        return no_intervals("the fit has not converged.")
    if np.bincount(observations.run_index).max() > 1:
        return no_intervals(
            "they assume independent points, but several are of one run; the bootstrap resamples whole runs."
        )
    if observations.n_points > _MAX_POINTS:
        return no_intervals(
            f"{observations.n_points} points would take too long; with so many the bootstrap gives the same intervals."
        )
    if not all(np.isfinite(v) for v in fit.parameters.values()):
        return no_intervals("a fitted parameter is not finite.")
    law, settings = approach.law, approach.settings
    closed = has_closed_form(law, observations)
    names = [*law.parameters, *(("params_exponent",) if closed else ())]
    traced = profile_intervals(
        law,
        law_columns(observations, law),
        names,
        level,
        loss_nats=observations.loss_nats,
        weights=weights,
        huber_delta=settings.huber_delta,
        objective=settings.objective,  # type: ignore[arg-type]
        scale=scale,
        starts=fit.parameters,
    )
    ends = {
        p.quantity: ProfileEnds(p.lo, p.hi, None if p.lo is not None and p.hi is not None else p.message)
        for p in traced
    }
    if closed:  # a + b = 1 exactly where C = 6 N D
        a = ends["params_exponent"]
        ends["tokens_exponent"] = ProfileEnds(
            None if a.hi is None else 1 - a.hi, None if a.lo is None else 1 - a.lo, a.message
        )
    return Profile(level, scale, ends)
