"""Owns what a loss law is: its formula, log-loss, Jacobian, curvature, starts and natural parameters.

A law is a frozen dataclass whose fields are its options. It is fitted in *internal* coordinates that are centred and
well scaled (so that the answer cannot depend on the unit of N or D) and reported in *natural* parameters, those of the
paper. The engine (`scaling_lab.analysis.fitting.fit`) evaluates a law for a whole batch of parameter vectors at once.

To add a law: one file here with a `LossLaw` subclass that sets `name`, and `conf/law/<name>.yaml`. Laws that are sums of
power terms derive from `sums.LogSumLaw` and only state their terms. The shared tests pick the law up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array
from scaling_lab.core.errors import UserError

# Ranges from which `example_columns` draws, log-uniformly: the region that published sweeps cover.
TYPICAL_RANGES: Mapping[str, tuple[float, float]] = {
    "n_params": (2e7, 2e10),
    "n_tokens": (3e8, 1e12),
    "compute_flops": (1e17, 1e23),
    "n_steps": (5e2, 5e5),
    "unique_tokens": (1e8, 1e11),
    "width": (256, 4096),
    "depth": (3, 80),
}

# A bounded exponent: beyond 20 a term is a step at the smallest N or D, and exp() of it would overflow.
MAX_EXPONENT = 20.0


@dataclass(frozen=True)
class Design:
    """The observations as a law sees them: built once per fit by `LossLaw.prepare`, shared by every problem of a batch."""

    columns: Mapping[str, Array]
    """The law's own columns, each (n,), float64, finite and positive."""
    log_columns: Array
    """(q, n): natural logs of `columns` in the law's order, each less its mean."""
    log_centers: Array
    """(q,): the means taken away."""
    log_loss_center: float
    """Mean of ln L (nats): losses are divided by its exponential before the fit."""
    regressors: Array
    """(k, n): what the law computed from `log_columns` once (see the law); may be empty."""

    @property
    def n_observations(self) -> int:
        return self.log_columns.shape[1]

    def take(self, rows: NDArray[np.intp]) -> Design:
        """The observations `rows`, in the same internal coordinates (the centres stay)."""
        return replace(
            self,
            columns={name: values[rows] for name, values in self.columns.items()},
            log_columns=self.log_columns[:, rows],
            regressors=self.regressors[:, rows],
        )


@dataclass(frozen=True)
class ComputeOptimum:
    """Closed-form frontier under C = 6 N D: N_opt = params_coefficient * C**params_exponent, likewise D_opt.

    Each field is a float or an array over a batch of fits.
    """

    params_exponent: Any
    params_coefficient: Any
    tokens_exponent: Any
    tokens_coefficient: Any


class LossLaw(ABC):
    """One scaling law. Subclasses are frozen dataclasses; their fields are the law's options."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    formula: ClassVar[str] = ""

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the natural parameters, in the order of the internal vector."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Observation columns that the law reads (without the loss)."""

    @property
    def label(self) -> str:
        """The name, with the options that differ from their defaults: `gemstones(with_params=True)`."""
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    @property
    def log_scaled(self) -> tuple[str, ...]:
        """Parameters that are positive scales over many decades: profiled, and best drawn, by their logarithm."""
        return ()

    @property
    @abstractmethod
    def example(self) -> Mapping[str, float]:
        """Published (or plausible) natural parameters: the truth of the recovery test."""

    # -- the formula, as in the paper ------------------------------------------------------------------------------
    @abstractmethod
    def loss_nats(self, parameters: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
        """Predicted loss, nats per token. Parameters and columns broadcast against each other."""

    def frontier(self, parameters: Mapping[str, Any]) -> ComputeOptimum | None:
        """Closed-form compute-optimal frontier under C = 6 N D; None where the law has none."""
        return None

    # -- internal coordinates --------------------------------------------------------------------------------------
    def prepare(self, data: Any, loss_nats: Array) -> Design:
        """Checks and centres the columns. Raises `UserError` where one is missing, of another length or not positive."""
        columns = {name: read_column(data, name, f"law={self.name}") for name in self.columns}
        for name, values in columns.items():
            if values.shape != loss_nats.shape[-1:]:
                raise UserError(
                    f"law={self.name}: column {name!r} has {values.size} values, the loss has {loss_nats.shape[-1]}."
                )
        logs = np.stack([np.log(v) for v in columns.values()])
        # A column with one value has that value as its centre exactly, so that its regressor is 0 and not rounding.
        centers = np.where(np.ptp(logs, axis=1) == 0, logs[:, 0], logs.mean(axis=1))
        design = Design(
            columns=columns,
            log_columns=logs - centers[:, None],
            log_centers=centers,
            log_loss_center=float(np.mean(np.log(loss_nats))),
            regressors=np.empty((0, logs.shape[1])),
        )
        return self._with_regressors(design)

    def _with_regressors(self, design: Design) -> Design:
        return design

    @abstractmethod
    def evaluate(self, theta: Array, design: Design) -> tuple[Array, Array]:
        """ln L - log_loss_center (B, n) and its Jacobian (B, p, n) at internal parameters theta (B, p)."""

    def curvature(self, theta: Array, design: Design, v: Array, jacobian: Array) -> Array:
        """(B, p, p): sum over points of v_i * (Hessian of L_i) / L_i, for v (B, n) and the Jacobian at theta.

        In terms of f = ln L this is sum v (Hessian of f + J J^T). By default from differences of the analytic
        Jacobian, which is enough: curvature only sets the speed of the engine, never the answer.
        """
        p = theta.shape[1]
        out = np.einsum("bin,bn,bjn->bij", jacobian, v, jacobian, optimize=True)
        for j in range(p):
            h = 1e-5 * (1.0 + np.abs(theta[:, j]))
            up, down = theta.copy(), theta.copy()
            up[:, j] += h
            down[:, j] -= h
            difference = self.evaluate(up, design)[1] - self.evaluate(down, design)[1]
            column = np.einsum("bin,bn->bi", difference, v) / (2.0 * h[:, None])
            out[:, :, j] += 0.5 * column
            out[:, j, :] += 0.5 * column
        return out

    @abstractmethod
    def bounds(self, design: Design) -> tuple[Array, Array]:
        """Lower and upper bounds (p,) of the internal parameters."""

    def bound_sentence(self, name: str, at_upper: bool) -> str:
        """Why a fit that ends with parameter `name` at a bound did so."""
        return f"{name} ended at its {'upper' if at_upper else 'lower'} bound"

    @abstractmethod
    def starts(self, design: Design, log_loss: Array) -> Array:
        """(S, p) internal starting points for ln L - log_loss_center (n,)."""

    @abstractmethod
    def to_natural(self, theta: Array, design: Design) -> dict[str, Array]:
        """Internal (..., p) to natural parameters, each (...,)."""

    @abstractmethod
    def from_natural(self, parameters: Mapping[str, Any], design: Design) -> Array:
        """Natural parameters to internal (..., p)."""

    # -- examples --------------------------------------------------------------------------------------------------
    def example_columns(self, n: int = 60, seed: int = 0) -> dict[str, Array]:
        """Synthetic columns (n,) drawn log-uniformly from `TYPICAL_RANGES`, for tests and simulations."""
        rng = np.random.default_rng(seed)
        ranges = {c: TYPICAL_RANGES[c] for c in self.columns}
        return {c: np.exp(rng.uniform(np.log(lo), np.log(hi), size=n)) for c, (lo, hi) in ranges.items()}


def read_column(data: Any, name: str, who: str) -> Array:
    """Column `name` of a mapping, a DataFrame or an object with such an attribute (or `extra` column), as float64 (n,).

    Raises:
        UserError: the column is missing, or not finite and positive throughout.
    """
    values: Any = None
    for source in (data, getattr(data, "extra", None)):
        if values is None and source is not None:
            try:
                values = source[name] if hasattr(source, "__getitem__") else getattr(source, name)
            except (KeyError, AttributeError, IndexError, TypeError):
                values = None
    if values is None:
        raise UserError(f"{who} needs the column {name!r}, which these observations do not have.")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"{who}: column {name!r} must be one-dimensional, got shape {array.shape}.")
    bad = int(np.count_nonzero(~(np.isfinite(array) & (array > 0))))
    if bad:
        raise UserError(f"{who}: column {name!r} has {bad} values that are not finite and positive.")
    return array
