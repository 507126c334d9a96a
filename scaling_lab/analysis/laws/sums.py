"""Laws that are sums of power terms: L = E + sum_k A_k * prod_j x_j^(-exponent).

The internal parameters are E itself, bounded below by 0 (so that "no irreducible loss" is a point the fit can reach), the
logarithms of the amplitudes at the center of the data, and the exponents. For given exponents, E and the amplitudes solve
a linear least-squares problem; variable projection over a grid of exponents gives the starting points.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Self

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.base import MAX_EXPONENT, ComputeOptimum, LawInputs, LossLaw
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN

# Exponents of published laws lie between .03 and 1.2; the geometric grid is wider at the top.
_EXPONENT_RANGE = (0.05, 2.5)
# Grid points per exponent, by the number of distinct exponents: at most 256 starts.
_GRID_POINTS = {1: 40, 2: 10, 3: 6, 4: 4}

# Each term of a start has at least this share of the loss.
_SMALLEST_SHARE = 0.01

# Lower bound of E for resamples, in units of the mean loss: far below any plausible value.
_LOWEST_FREE_FLOOR = -2.0

# Bounds of ln(amplitude / mean loss): a term of a millionth of the loss counts as absent.
_LOG_AMPLITUDE_BOUNDS = (float(np.log(1e-6)), 50.0)


@dataclass(frozen=True)
class Slope:
    """A factor exp(-exponent * z) with z = sum of `powers` * ln(columns) + `offset`."""

    exponent: str
    powers: tuple[float, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Term:
    """A power term. With `is_scale` the natural parameter is the scale X in (X / x)^exponent instead of the amplitude."""

    amplitude: str
    slope: Slope
    is_scale: bool = False


class LogSumLaw(LossLaw):
    """Base class of laws that are sums of power terms; a subclass states its `terms` and whether it has an E."""

    lowest_floor: ClassVar[float] = 0.0
    """Lower bound of E, in units of the mean loss."""

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The power terms, in the paper's order."""

    @property
    def has_irreducible(self) -> bool:
        """Whether the law has an irreducible loss E."""
        return True

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the distinct exponents, in order of first appearance."""
        return tuple(dict.fromkeys(t.slope.exponent for t in self.terms))

    @property
    def parameters(self) -> tuple[str, ...]:
        first = ("E",) if self.has_irreducible else ()
        return first + tuple(t.amplitude for t in self.terms) + self.exponents

    @property
    def log_scaled(self) -> tuple[str, ...]:
        return tuple(t.amplitude for t in self.terms)

    def loss_nats(self, parameters: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
        loss: Any = parameters["E"] if self.has_irreducible else 0.0
        for term in self.terms:
            exponent = parameters[term.slope.exponent]
            z = (
                sum(p * np.log(columns[c]) for p, c in zip(term.slope.powers, self.columns) if p)
                + term.slope.offset
            )
            log_amplitude = np.log(parameters[term.amplitude]) * (exponent if term.is_scale else 1.0)
            loss = loss + np.exp(log_amplitude - exponent * z)
        return loss

    def with_free_floor(self) -> Self:
        """The same law with E allowed below 0, for resamples: a bound at 0 would make them pile up there (see `Parametric`)."""
        free = copy.copy(self)
        object.__setattr__(free, "lowest_floor", _LOWEST_FREE_FLOOR)
        return free

    # -- internal parameters: E / mean loss, ln amplitudes at the center of the data, exponents -----------------------
    def _layout(self) -> list[tuple[int, int]]:
        """(index of the amplitude, index of the exponent) in the internal vector, for each term."""
        names = self.parameters
        return [(names.index(t.amplitude), names.index(t.slope.exponent)) for t in self.terms]

    def _with_regressors(self, inputs: LawInputs) -> LawInputs:
        powers = np.array([t.slope.powers for t in self.terms], dtype=np.float64)
        return replace(inputs, regressors=powers @ inputs.log_columns)

    def _slope_centers(self, inputs: LawInputs) -> Array:
        powers = np.array([t.slope.powers for t in self.terms], dtype=np.float64)
        return powers @ inputs.log_centers + np.array([t.slope.offset for t in self.terms])

    def evaluate(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        n = inputs.n_observations
        jacobian = np.empty((theta.shape[0], theta.shape[1], n))
        layout = self._layout()
        total = np.zeros((theta.shape[0], n))
        for k, (amplitude, exponent) in enumerate(layout):
            term = np.multiply(theta[:, exponent, None], -inputs.regressors[k], out=jacobian[:, amplitude])
            term += theta[:, amplitude, None]
            np.exp(term, out=term)
            total += term
        if self.has_irreducible:
            total += theta[:, :1]
        inverse = 1.0 / total
        if self.has_irreducible:
            jacobian[:, 0] = inverse
        written: set[int] = set()
        for k, (amplitude, exponent) in enumerate(layout):
            share = jacobian[:, amplitude]
            share *= inverse
            if exponent in written:
                jacobian[:, exponent] -= share * inputs.regressors[k]
            else:
                np.multiply(share, -inputs.regressors[k], out=jacobian[:, exponent])
            written.add(exponent)
        return np.log(total, out=total), jacobian

    def curvature(self, theta: Array, inputs: LawInputs, v: Array, jacobian: Array) -> Array:
        p = theta.shape[1]
        out = np.zeros((theta.shape[0], p, p))
        for k, (amplitude, exponent) in enumerate(self._layout()):
            z = inputs.regressors[k]
            moments = (v * jacobian[:, amplitude]) @ np.stack([np.ones_like(z), -z, z * z], axis=1)
            out[:, amplitude, amplitude] += moments[:, 0]
            out[:, amplitude, exponent] += moments[:, 1]
            out[:, exponent, amplitude] += moments[:, 1]
            out[:, exponent, exponent] += moments[:, 2]
        return out

    def bounds(self, inputs: LawInputs) -> tuple[Array, Array]:
        lower, upper = np.zeros(len(self.parameters)), np.full(len(self.parameters), MAX_EXPONENT)
        for amplitude, _ in self._layout():
            lower[amplitude], upper[amplitude] = _LOG_AMPLITUDE_BOUNDS
        if self.has_irreducible:
            lower[0], upper[0] = self.lowest_floor, 1e3
        return lower, upper

    def bound_sentence(self, name: str, at_upper: bool) -> str:
        if name == "E" and not at_upper:
            return "E is 0: these data show no irreducible loss"
        if name in self.exponents:
            side = (
                f"{MAX_EXPONENT:g}: its term matters only at the smallest value"
                if at_upper
                else "0: its term is constant"
            )
            return f"{name} is {side}"
        if not at_upper:
            return f"{name} is at its lower bound: in these data the loss does not depend on its term"
        return super().bound_sentence(name, at_upper)

    def to_natural(self, theta: Array, inputs: LawInputs) -> dict[str, Array]:
        theta = np.asarray(theta, dtype=np.float64)
        out: dict[str, Array] = {}
        if self.has_irreducible:
            out["E"] = theta[..., 0] * np.exp(inputs.log_loss_center)
        for term, (amplitude, exponent), center in zip(
            self.terms, self._layout(), self._slope_centers(inputs)
        ):
            log_amplitude = theta[..., amplitude] + theta[..., exponent] * center + inputs.log_loss_center
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                if term.is_scale:
                    log_amplitude = log_amplitude / theta[..., exponent]
                out[term.amplitude] = np.exp(log_amplitude)
        for name in self.exponents:
            out[name] = theta[..., self.parameters.index(name)] + 0.0
        return out

    def from_natural(self, parameters: Mapping[str, Any], inputs: LawInputs) -> Array:
        values = [np.asarray(parameters[name], dtype=np.float64) for name in self.parameters]
        theta = np.stack(np.broadcast_arrays(*values), axis=-1).astype(np.float64)
        if self.has_irreducible:
            theta[..., 0] *= np.exp(-inputs.log_loss_center)
        for term, (amplitude, exponent), center in zip(
            self.terms, self._layout(), self._slope_centers(inputs)
        ):
            with np.errstate(divide="ignore"):
                log_amplitude = np.log(theta[..., amplitude])
            if term.is_scale:
                log_amplitude = log_amplitude * theta[..., exponent]
            theta[..., amplitude] = log_amplitude - theta[..., exponent] * center - inputs.log_loss_center
        return theta

    def starts(self, inputs: LawInputs, log_loss: Array) -> Array:
        grid = np.geomspace(*_EXPONENT_RANGE, _GRID_POINTS[len(self.exponents)])
        exponents = np.array(list(product(grid, repeat=len(self.exponents))))
        return self.project(exponents, inputs, log_loss)

    def project(self, exponents: Array, inputs: LawInputs, log_loss: Array) -> Array:
        """Variable projection: for exponents (S, m), the E and amplitudes that minimize the relative squared error.

        Returns internal parameters (S, p). Negative amplitudes are replaced by a small positive share of the loss, since
        the result is only a starting point.
        """
        k = len(self.terms)
        first = int(self.has_irreducible)
        names = self.parameters
        columns = [self.exponents.index(t.slope.exponent) for t in self.terms]
        theta = np.empty((len(exponents), len(names)))
        relative = np.exp(-log_loss)
        step = max(1, 2_000_000 // (inputs.n_observations * (k + first)))
        for i in range(0, len(exponents), step):
            part = exponents[i : i + step]
            basis = np.exp(-part[:, columns, None] * inputs.regressors) * relative
            if first:
                basis = np.concatenate(
                    [np.broadcast_to(relative, (len(part), 1, relative.size)), basis], axis=1
                )
            scale = np.sqrt(np.mean(basis**2, axis=2, keepdims=True))
            basis = basis / scale
            gram = basis @ basis.transpose(0, 2, 1) + 1e-10 * inputs.n_observations * np.eye(k + first)
            shares = np.linalg.solve(gram, basis.sum(axis=2)[:, :, None])[:, :, 0]
            linear = np.maximum(shares, _SMALLEST_SHARE) / scale[:, :, 0]
            theta[i : i + step, : k + first] = linear
            theta[i : i + step, first : k + first] = np.log(linear[:, first:])
        theta[:, k + first :] = exponents
        return np.clip(theta, *self.bounds(inputs))


def chinchilla_like_optimum(A: Any, B: Any, alpha: Any, beta: Any) -> ComputeOptimum:
    """argmin of A / N^alpha + B / D^beta at C = 6 N D (Hoffmann et al. 2022, arXiv 2203.15556, eq. 4), batched.

    N_opt = G (C/6)^a, D_opt = (C/6)^b / G with a = beta/(alpha+beta), b = alpha/(alpha+beta),
    G = (alpha A / (beta B))^(1/(alpha+beta)).
    """
    with np.errstate(all="ignore"):
        total = np.add(alpha, beta)
        a, b = np.divide(beta, total), np.divide(alpha, total)
        log_six = np.log(FLOPS_PER_PARAM_TOKEN)
        log_g = (np.log(np.multiply(alpha, A)) - np.log(np.multiply(beta, B))) / total
        return ComputeOptimum(a, np.exp(log_g - a * log_six), b, np.exp(-log_g - b * log_six))
