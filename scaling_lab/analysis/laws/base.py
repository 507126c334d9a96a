"""The interface of a loss law: formula, log loss, Jacobian, curvature, starting points and parameters.

A law is a frozen dataclass whose fields are its options. It is fitted in *internal* parameters, which are centered and
well scaled, so the result does not depend on the unit of N or D. It is reported in *natural* parameters, those of the
paper. The fitting engine (`scaling_lab.analysis.fitting.fit`) evaluates a law at a batch of parameter vectors at once.

To add a law, write one file here with a `LossLaw` subclass that sets `name`, and `conf/law/<name>.yaml`. Laws that are
sums of power terms derive from `sums.LogSumLaw` and only state their terms. The shared tests find the law by themselves.
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

# `example_columns` draws log-uniformly from these ranges, which published sweeps cover.
TYPICAL_RANGES: Mapping[str, tuple[float, float]] = {
    "n_params": (2e7, 2e10),
    "n_tokens": (3e8, 1e12),
    "compute_flops": (1e17, 1e23),
    "n_steps": (5e2, 5e5),
    "unique_tokens": (1e8, 1e11),
    "width": (256, 4096),
    "depth": (3, 80),
}

# Upper bound of exponents: beyond 20 a term is a step at the smallest N or D, and its exp() would overflow.
MAX_EXPONENT = 20.0


@dataclass(frozen=True)
class LawInputs:
    """The columns of the observations that a law needs, in internal coordinates: built once per fit by `LossLaw.prepare`."""

    columns: Mapping[str, Array]
    """The law's columns, each (n,), float64, finite and positive."""
    log_columns: Array
    """(q, n): natural logs of `columns` in the law's order, each minus its center."""
    log_centers: Array
    """(q,): the centers that were subtracted (means of the logs)."""
    log_loss_center: float
    """Mean of ln L: losses are divided by its exponential before the fit."""
    regressors: Array
    """(k, n): what the law derives from `log_columns` (see the law); may be empty."""

    @property
    def n_observations(self) -> int:
        return self.log_columns.shape[1]

    def take(self, rows: NDArray[np.intp]) -> LawInputs:
        """The observations `rows`, in the same internal coordinates (with unchanged centers)."""
        return replace(
            self,
            columns={name: values[rows] for name, values in self.columns.items()},
            log_columns=self.log_columns[:, rows],
            regressors=self.regressors[:, rows],
        )


@dataclass(frozen=True)
class ComputeOptimum:
    """Closed-form frontier under C = 6 N D: N_opt = params_coefficient * C**params_exponent; D_opt likewise.

    Each field is a float or an array over a batch of fits.
    """

    params_exponent: Any
    params_coefficient: Any
    tokens_exponent: Any
    tokens_coefficient: Any


class LossLaw(ABC):
    """A scaling law. Subclasses are frozen dataclasses whose fields are the law's options."""

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
        """Names of the observation columns that the law reads (without the loss)."""

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
        """Positive parameters that span decades: their logarithm is what is profiled and plotted."""
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
    def prepare(self, data: Any, loss_nats: Array) -> LawInputs:
        """Check and center the columns.

        Raises:
            UserError: a column is missing, has the wrong length, or is not positive.
        """
        columns = {name: read_column(data, name, f"law={self.name}") for name in self.columns}
        for name, values in columns.items():
            if values.shape != loss_nats.shape[-1:]:
                raise UserError(
                    f"law={self.name}: column {name!r} has {values.size} values, but the loss has {loss_nats.shape[-1]}."
                )
        logs = np.stack([np.log(v) for v in columns.values()])
        # The center of a constant column is exactly its value, so its regressor is 0, not a rounding error.
        centers = np.where(np.ptp(logs, axis=1) == 0, logs[:, 0], logs.mean(axis=1))
        inputs = LawInputs(
            columns=columns,
            log_columns=logs - centers[:, None],
            log_centers=centers,
            log_loss_center=float(np.mean(np.log(loss_nats))),
            regressors=np.empty((0, logs.shape[1])),
        )
        return self._with_regressors(inputs)

    def _with_regressors(self, inputs: LawInputs) -> LawInputs:
        return inputs

    @abstractmethod
    def evaluate(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        """ln L - log_loss_center (B, n) and its Jacobian (B, p, n) at internal parameters theta (B, p)."""

    def curvature(self, theta: Array, inputs: LawInputs, v: Array, jacobian: Array) -> Array:
        """(B, p, p): sum over points of v_i * (Hessian of L_i) / L_i, for v (B, n) and the Jacobian at theta.

        In terms of f = ln L this is sum v (Hessian of f + J J^T). The default takes finite differences of the analytic
        Jacobian, which is accurate enough: the curvature only affects the speed of convergence, never the result.
        """
        p = theta.shape[1]
        out = np.einsum("bin,bn,bjn->bij", jacobian, v, jacobian, optimize=True)
        for j in range(p):
            h = 1e-5 * (1.0 + np.abs(theta[:, j]))
            up, down = theta.copy(), theta.copy()
            up[:, j] += h
            down[:, j] -= h
            difference = self.evaluate(up, inputs)[1] - self.evaluate(down, inputs)[1]
            column = np.einsum("bin,bn->bi", difference, v) / (2.0 * h[:, None])
            out[:, :, j] += 0.5 * column
            out[:, j, :] += 0.5 * column
        return out

    @abstractmethod
    def bounds(self, inputs: LawInputs) -> tuple[Array, Array]:
        """Lower and upper bounds (p,) of the internal parameters."""

    def bound_sentence(self, name: str, at_upper: bool) -> str:
        """Explain a fit that ends with parameter `name` at a bound."""
        return f"{name} ended at its {'upper' if at_upper else 'lower'} bound"

    @abstractmethod
    def starts(self, inputs: LawInputs, log_loss: Array) -> Array:
        """(S, p) starting points (internal parameters) for the log losses ln L - log_loss_center (n,)."""

    @abstractmethod
    def to_natural(self, theta: Array, inputs: LawInputs) -> dict[str, Array]:
        """Natural parameters, each (...,), from internal ones (..., p)."""

    @abstractmethod
    def from_natural(self, parameters: Mapping[str, Any], inputs: LawInputs) -> Array:
        """Internal parameters (..., p) from natural ones."""

    # -- examples --------------------------------------------------------------------------------------------------
    def example_columns(self, n: int = 60, seed: int = 0) -> dict[str, Array]:
        """Synthetic columns (n,) drawn log-uniformly from `TYPICAL_RANGES`, for tests and simulations."""
        rng = np.random.default_rng(seed)
        ranges = {c: TYPICAL_RANGES[c] for c in self.columns}
        return {c: np.exp(rng.uniform(np.log(lo), np.log(hi), size=n)) for c, (lo, hi) in ranges.items()}


def read_column(data: Any, name: str, who: str) -> Array:
    """Column `name` of a mapping, a DataFrame, or an object with that attribute (or `extra` column), as float64 (n,).

    Raises:
        UserError: the column is missing, or has values that are not finite and positive.
    """
    values: Any = None
    for source in (data, getattr(data, "extra", None)):
        if values is None and source is not None:
            try:
                values = source[name] if hasattr(source, "__getitem__") else getattr(source, name)
            except (KeyError, AttributeError, IndexError, TypeError):
                values = None
    if values is None:
        raise UserError(f"{who} needs the column {name!r}, which is not in these observations.")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"{who}: column {name!r} must be one-dimensional, got shape {array.shape}.")
    bad = int(np.count_nonzero(~(np.isfinite(array) & (array > 0))))
    if bad:
        raise UserError(f"{who}: column {name!r} has {bad} values that are not finite and positive.")
    return array
