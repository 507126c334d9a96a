"""A law linear in ln N and ln D, which a power law with a very small exponent approaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.base import LawInputs, LossLaw


@dataclass(frozen=True)
class LinearLog(LossLaw):
    """L(N, D) = c - k_N ln N - k_D ln D.

    A / x^alpha = A (1 - alpha ln x + ...): over a few decades x^-.01 is indistinguishable from a straight line in ln x, so
    a fitted power law should predict held-out points better than this law. It has no compute-optimal frontier: at
    C = 6 N D it is linear in ln N, so the optimum is the smallest or the largest model.
    """

    name = "linear_log"
    title = "Linear in ln N and ln D"
    source = "First-order expansion of a power law in its exponent; in Michaud et al. 2023, equal skill mass in each decade"
    formula = "L(N, D) = c - k_N ln N - k_D ln D"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("c", "k_N", "k_D")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params", "n_tokens")

    @property
    def example(self) -> Mapping[str, float]:
        return {"c": 8.0, "k_N": 0.12, "k_D": 0.09}

    def loss_nats(self, parameters: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
        return (
            parameters["c"]
            - parameters["k_N"] * np.log(columns["n_params"])
            - parameters["k_D"] * np.log(columns["n_tokens"])
        )

    # Internal: the same three parameters, for the loss divided by its geometric mean and centered ln N, ln D.
    def evaluate(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        x, y = inputs.log_columns
        loss = theta[:, :1] - theta[:, 1:2] * x - theta[:, 2:3] * y
        # The log of a non-positive loss is undefined: NaN makes the minimizer take a shorter step.
        loss = np.where(loss > 0, loss, np.nan)
        basis = np.stack([np.ones_like(x), -x, -y])
        return np.log(loss), basis / loss[:, None, :]

    def curvature(self, theta: Array, inputs: LawInputs, v: Array, jacobian: Array) -> Array:
        return np.zeros((len(theta), 3, 3))  # the loss itself is linear in the parameters

    def bounds(self, inputs: LawInputs) -> tuple[Array, Array]:
        return np.full(3, -np.inf), np.full(3, np.inf)

    def starts(self, inputs: LawInputs, log_loss: Array) -> Array:
        x, y = inputs.log_columns
        relative = np.exp(-log_loss)
        basis = np.stack([relative, -x * relative, -y * relative], axis=1)
        best = np.linalg.lstsq(basis, np.ones_like(x), rcond=None)[0]
        level = np.array([np.exp(log_loss.max()), 0.0, 0.0])
        # The problem is nearly linear: the least-squares plane, flatter planes, and a constant.
        return np.stack([best * share + level * (1 - share) for share in (1.0, 0.8, 0.5, 0.0)])

    def to_natural(self, theta: Array, inputs: LawInputs) -> dict[str, Array]:
        scaled = np.asarray(theta, dtype=np.float64) * np.exp(inputs.log_loss_center)
        k_n, k_d = scaled[..., 1], scaled[..., 2]
        return {
            "c": scaled[..., 0] + k_n * inputs.log_centers[0] + k_d * inputs.log_centers[1],
            "k_N": k_n,
            "k_D": k_d,
        }

    def from_natural(self, parameters: Mapping[str, Any], inputs: LawInputs) -> Array:
        c, k_n, k_d = (np.asarray(parameters[k], dtype=np.float64) for k in self.parameters)
        level = c - k_n * inputs.log_centers[0] - k_d * inputs.log_centers[1]
        return np.stack(np.broadcast_arrays(level, k_n, k_d), axis=-1) * np.exp(-inputs.log_loss_center)
