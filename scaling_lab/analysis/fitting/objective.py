"""The objective of a fit: value, gradient, exact Hessian and IRLS matrix, for a batch of problems at once.

With r = ln L_fit - ln L and weights w the objective is

    huber_log   sum w Huber(r),   Huber(r) = r^2/2 for |r| <= delta, else delta (|r| - delta/2)
    mse_log     sum w r^2/2
    mse         sum w (L_fit - L)^2/2

There are two curvature matrices. H is the exact second derivative, in which only residuals inside delta contribute a
quadratic term. M belongs to the quadratic function that touches the Huber function at r and lies above it everywhere (it
majorizes it): the matrix of iteratively reweighted least squares (IRLS). It is positive semi-definite, so its step descends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.base import LawInputs, LossLaw

ObjectiveName = Literal["huber_log", "mse_log", "mse"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)

# Number of (point, problem) pairs evaluated at once: temporaries of this size stay in cache.
_CHUNK_POINTS = 8_000


class Penalty(Protocol):
    """A smooth term added to the objective: called with theta (b, p) and rows (b,), it returns value, gradient and Hessian."""

    def __call__(self, theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array, Array]: ...


@dataclass(frozen=True)
class ObjectiveValue:
    """The objective at a batch of parameter vectors: value (b,), gradient (b, p), Hessian and majorizer (b, p, p)."""

    value: Array
    gradient: Array
    hessian: Array
    majorizer: Array


@dataclass(frozen=True)
class Objective:
    """The function to minimize. Losses and weights have one row per problem, or one row that all problems share."""

    law: LossLaw
    inputs: LawInputs
    log_loss: Array
    """(1, n) or (B, n): ln L minus `inputs.log_loss_center`."""
    weights: NDArray[np.generic]
    """(1, n) or (B, n), nonnegative, any numeric type (small integers save memory)."""
    kind: ObjectiveName
    huber_delta: float
    penalty: Penalty | None = None

    @property
    def total_weight(self) -> Array:
        """(1,) or (B,)."""
        return np.asarray(np.sum(self.weights, axis=1, dtype=np.float64))

    def row(self, values: NDArray[np.generic], rows: NDArray[np.intp]) -> Array:
        """Rows of a (1, n) or (B, n) array as float64, broadcastable to (b, n)."""
        return np.asarray(values if len(values) == 1 else values[rows], dtype=np.float64)

    def chunks(self, count: int) -> list[slice]:
        size = max(1, _CHUNK_POINTS // self.inputs.n_observations)
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]

    def evaluate(self, theta: Array, rows: NDArray[np.intp]) -> ObjectiveValue:
        """The objective of problem rows[i] at theta[i]; infinite where the law is undefined."""
        b, p = theta.shape
        out = ObjectiveValue(np.empty(b), np.empty((b, p)), np.empty((b, p, p)), np.empty((b, p, p)))
        with np.errstate(all="ignore"):
            for part in self.chunks(b):
                self._evaluate_chunk(theta[part], rows[part], part, out)
            if self.penalty is not None:
                value, gradient, hessian = self.penalty(theta, rows)
                out.value[:] += value
                out.gradient[:] += gradient
                out.hessian[:] += hessian
                out.majorizer[:] += hessian
        bad = ~(np.isfinite(out.value) & np.isfinite(out.hessian).all(axis=(1, 2)))
        out.value[bad] = np.inf
        return out

    def _evaluate_chunk(self, theta: Array, rows: NDArray[np.intp], part: slice, out: ObjectiveValue) -> None:
        log_fit, jacobian = self.law.evaluate(theta, self.inputs)
        value, v, exact, upper = self._pointwise(log_fit, rows)
        b, p, n = jacobian.shape
        out.value[part] = value
        out.gradient[part] = (jacobian @ v[:, :, None])[:, :, 0]
        scaled = np.empty((b, 2, p, n))
        np.multiply(jacobian, exact[:, None, :], out=scaled[:, 0])
        np.multiply(jacobian, upper[:, None, :], out=scaled[:, 1])
        products = (scaled.reshape(b, 2 * p, n) @ jacobian.transpose(0, 2, 1)).reshape(b, 2, p, p)
        out.hessian[part] = products[:, 0] + self.law.curvature(theta, self.inputs, v, jacobian)
        out.majorizer[part] = products[:, 1]

    def _pointwise(self, log_fit: Array, rows: NDArray[np.intp]) -> tuple[Array, Array, Array, Array]:
        """Value (b,) and, per point (b, n), d objective / d ln L and the weights of J J^T in H and in M."""
        w = self.row(self.weights, rows)
        log_loss = self.row(self.log_loss, rows)
        if self.kind == "mse":
            fit = np.exp(log_fit)
            r = fit - np.exp(log_loss)
            v = w * r * fit
            upper = w * fit * fit
            return 0.5 * np.einsum("bn,bn->b", np.broadcast_to(w, r.shape), r * r), v, upper, upper
        r = log_fit - log_loss
        if self.kind == "mse_log":
            v = w * r
            return 0.5 * np.einsum("bn,bn->b", v, r), v, w - v, np.broadcast_to(w, r.shape)
        size = np.abs(r)
        clipped = np.minimum(size, self.huber_delta)
        value = np.einsum("bn,bn->b", clipped * (size - 0.5 * clipped), np.broadcast_to(w, r.shape))
        v = np.copysign(clipped, r) * w
        inside = size <= self.huber_delta
        upper = w * clipped / np.maximum(size, np.finfo(np.float64).tiny)
        upper[size == 0] = 0.0
        upper += w * (size == 0)
        return value, v, inside * w - v, upper

    def first_order(self, theta: Array, rows: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        """Gradient (b, p), its size before cancellation (b, p), and the Gram matrix J^T W J (b, p, p).

        |gradient| / size has no units: it does not depend on the units of N, D, weights, or on mean versus sum.
        """
        b, p = theta.shape
        gradient, size, gram = np.empty((b, p)), np.empty((b, p)), np.empty((b, p, p))
        with np.errstate(all="ignore"):
            for part in self.chunks(b):
                log_fit, jacobian = self.law.evaluate(theta[part], self.inputs)
                _, v, _, _ = self._pointwise(log_fit, rows[part])
                gradient[part] = (jacobian @ v[:, :, None])[:, :, 0]
                size[part] = (np.abs(jacobian) @ np.abs(v)[:, :, None])[:, :, 0]
                w = self.row(self.weights, rows[part])
                gram[part] = (jacobian * w[:, None, :]) @ jacobian.transpose(0, 2, 1)
            if self.penalty is not None:
                extra = self.penalty(theta, rows)[1]
                gradient += extra
                size += np.abs(extra)
        return gradient, size, gram
