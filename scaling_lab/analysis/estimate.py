"""Owns the vocabulary of the analysis: what every fit and every approach returns. Values only, no algorithms.

An `Approach` turns `Observations` into an `Estimate`; all three approaches return the same type, so the bootstrap,
prediction, comparison and report are written once. A result carries a status and a sentence: a number that cannot be
trusted says so beside itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class FitStatus(StrEnum):
    """How a fit ended (the `status` of an estimate in analysis.json)."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    AT_BOUND = "at_bound"
    STARTS_DISAGREE = "starts_disagree"
    NOT_IDENTIFIED = "not_identified"
    NOT_APPLICABLE = "not_applicable"


class BudgetStatus(StrEnum):
    """What a budget's valley showed: its minimum is usable only if OK."""

    OK = "ok"
    EDGE = "edge"
    CONCAVE = "concave"
    OUTSIDE = "outside"
    TOO_FEW = "too_few"


@dataclass(frozen=True)
class Interval:
    """A central interval at its owner's level; `None` ends mean that it does not exist (the owner says why)."""

    lo: float
    hi: float

    @property
    def width(self) -> float:
        return self.hi - self.lo

    def contains(self, value: float) -> bool:
        return self.lo <= value <= self.hi

    def __iter__(self) -> Iterator[float]:
        """`lo, hi = interval`."""
        yield self.lo
        yield self.hi


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent."""

    exponent: float
    coefficient: float
    log_coefficient: float | None = None
    """ln of the coefficient, where that itself may have left float64 (a steep line through two near budgets)."""

    @classmethod
    def of_log(cls, exponent: float, log_coefficient: float) -> PowerLaw:
        with np.errstate(over="ignore"):
            return cls(exponent, float(np.exp(log_coefficient)), log_coefficient)

    @property
    def log_k(self) -> float:
        """ln of the coefficient; -inf for a coefficient of 0."""
        if self.log_coefficient is not None:
            return self.log_coefficient
        with np.errstate(divide="ignore"):
            return float(np.log(self.coefficient))

    def __call__(self, x: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(self.log_k + self.exponent * np.log(np.asarray(x, dtype=np.float64)))


@dataclass(frozen=True)
class LossCurve:
    """Loss along the frontier: floor_nats + coefficient * C ** -exponent, nats per token.

    A description of the frontier's own points, good for interpolating them and for a modest step beyond.
    """

    floor_nats: float
    coefficient: float
    exponent: float

    def __call__(self, compute_flops: Any) -> Any:
        return (
            self.floor_nats + self.coefficient * np.asarray(compute_flops, dtype=np.float64) ** -self.exponent
        )


@dataclass(frozen=True)
class FitResult:
    """One law fitted to observations.

    `objective` is sum over points of Huber(r), r = ln L_fit - ln L, with Huber(r) = r^2/2 for |r| <= delta, else
    delta (|r| - delta/2): unscaled, as in analysis.json.
    """

    law: str
    parameters: Mapping[str, float]
    """By the law's own names in natural units (E, A, B in nats-related units; exponents as they are)."""
    objective: float
    n_observations: int
    residuals_log: Array
    """ln L_fit - ln L, one per observation, in the order given."""
    status: FitStatus
    message: str
    """One sentence that explains the status."""
    starts_tried: int
    starts_agreeing: int
    """Starts whose final objective is within 1e-6 relative of the best."""


@dataclass(frozen=True)
class BudgetOptimum:
    """The valley of one IsoFLOP budget: its fitted minimum, or why there is none."""

    budget_flops: float
    n_runs: int
    status: BudgetStatus
    message: str | None
    params_opt: float | None = None
    tokens_opt: float | None = None
    loss_opt: float | None = None
    curvature: float | None = None
    """Second derivative of the loss by ln N at the minimum, nats."""
    fit_log_params: Array | None = None
    """ln N of a dense grid over the fitted window, for drawing."""
    fit_loss: Array | None = None
    """The fitted curve on `fit_log_params`, nats."""


@dataclass(frozen=True)
class Frontier:
    """Compute-optimal N, D and loss as functions of training FLOPs, under the observations' convention."""

    params: PowerLaw
    tokens: PowerLaw
    compute_range_flops: tuple[float, float]
    """The range that was observed: outside it the frontier is an extrapolation."""
    compute_flops: Array
    """Points (FLOPs) of the frontier, ascending: the envelope's points, the budgets, or a grid."""
    params_opt: Array
    tokens_opt: Array
    loss_opt: Array
    """At `compute_flops`, nats per token (NaN where the approach gives none)."""
    loss: LossCurve | None = None
    """Loss as a function of C; None where fewer than two points have one."""


@dataclass(frozen=True)
class Estimate:
    """What one approach says. `frontier` is None where the status is not_applicable (the message says why)."""

    approach: str
    """envelope, isoflop or parametric."""
    status: FitStatus
    message: str
    frontier: Frontier | None = None
    law: str | None = None
    fits: tuple[FitResult, ...] = ()
    budgets: tuple[BudgetOptimum, ...] = ()
    diagnostics: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Approach-specific arrays for figures, by documented names."""

    def __repr__(self) -> str:
        exponent = "" if self.frontier is None else f", N ~ C^{self.frontier.params.exponent:.4g}"
        return f"Estimate({self.approach}: {self.status.value}{exponent})"
