"""Result types of the analysis: what fits and approaches return. Values only, no algorithms.

An `Approach` turns `Observations` into an `Estimate`. All three approaches return the same type, so bootstrap, prediction,
comparison and report are written once. Each result has a status and a sentence that says why it may not be reliable.
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
    """Status of a fit (the `status` of an estimate in analysis.json)."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    AT_BOUND = "at_bound"
    STARTS_DISAGREE = "starts_disagree"
    NOT_IDENTIFIED = "not_identified"
    NOT_APPLICABLE = "not_applicable"


class BudgetStatus(StrEnum):
    """Status of the valley of one budget; its minimum is used only if OK."""

    OK = "ok"
    EDGE = "edge"
    CONCAVE = "concave"
    OUTSIDE = "outside"
    TOO_FEW = "too_few"


@dataclass(frozen=True)
class Interval:
    """An interval of a quantity; its level is that of the result it belongs to."""

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
    """ln of the coefficient, if the coefficient itself may overflow (a steep line through two close budgets)."""

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

    It describes the points of the frontier: use it to interpolate them, or to extrapolate moderately.
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

    `objective` is the unscaled sum over points of Huber(r) with r = ln L_fit - ln L: r^2/2 for |r| <= delta, else
    delta (|r| - delta/2).
    """

    law: str
    parameters: Mapping[str, float]
    """Natural parameters by name (E, A, B in the units of the paper, losses in nats)."""
    objective: float
    n_observations: int
    residuals_log: Array
    """ln L_fit - ln L, one per observation, in the given order."""
    status: FitStatus
    message: str
    """One sentence that explains the status."""
    starts_tried: int
    starts_agreeing: int
    """Starts whose final objective is within 1e-6 (relative) of the best one."""


@dataclass(frozen=True)
class BudgetOptimum:
    """The fitted minimum of one IsoFLOP budget, or why there is none."""

    budget_flops: float
    n_runs: int
    status: BudgetStatus
    message: str | None
    params_opt: float | None = None
    tokens_opt: float | None = None
    loss_opt: float | None = None
    curvature: float | None = None
    """Second derivative of the loss with respect to ln N at the minimum, nats."""
    fit_log_params: Array | None = None
    """ln N on a dense grid over the fitted sizes, for figures."""
    fit_loss: Array | None = None
    """The fitted curve on `fit_log_params`, nats."""


@dataclass(frozen=True)
class Frontier:
    """Compute-optimal N, D and loss as functions of training FLOPs, under the convention of the observations."""

    params: PowerLaw
    tokens: PowerLaw
    compute_range_flops: tuple[float, float]
    """The observed range; outside it the frontier is an extrapolation."""
    compute_flops: Array
    """FLOPs of the frontier's points, ascending: crossings of the envelope, budgets, or a grid."""
    params_opt: Array
    tokens_opt: Array
    loss_opt: Array
    """At `compute_flops`, nats per token (NaN if the approach gives no loss)."""
    loss: LossCurve | None = None
    """Loss as a function of C; None if fewer than two points have a loss."""


@dataclass(frozen=True)
class Estimate:
    """The result of one approach. `frontier` is None if the status is not_applicable (the message says why)."""

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
    """Approach-specific arrays for figures, by name."""

    def __repr__(self) -> str:
        exponent = "" if self.frontier is None else f", N ~ C^{self.frontier.params.exponent:.4g}"
        return f"Estimate({self.approach}: {self.status.value}{exponent})"
