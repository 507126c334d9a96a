"""The joint laws of Kaplan et al.: L(N, D), eq. 1.5, and L(N, S), eq. 1.6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.base import MAX_EXPONENT, ComputeOptimum, LawInputs, LossLaw
from scaling_lab.analysis.laws.sums import LogSumLaw, Slope, Term, chinchilla_like_optimum


@dataclass(frozen=True)
class KaplanND(LossLaw):
    """L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D, with N without embeddings and no irreducible loss."""

    name = "kaplan_nd"
    title = "Kaplan L(N, D)"
    source = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5"
    formula = "L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("N_c", "D_c", "alpha_N", "alpha_D")

    @property
    def log_scaled(self) -> tuple[str, ...]:
        return ("N_c", "D_c")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params", "n_tokens")

    @property
    def example(self) -> Mapping[str, float]:
        return {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}  # table 2

    def loss_nats(self, parameters: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
        ratio = parameters["alpha_N"] / parameters["alpha_D"]
        size = (parameters["N_c"] / columns["n_params"]) ** ratio
        return (size + parameters["D_c"] / columns["n_tokens"]) ** parameters["alpha_D"]

    def frontier(self, parameters: Mapping[str, Any]) -> ComputeOptimum:
        # L increases with the bracket, which is A / N^ratio + B / D.
        ratio = np.divide(parameters["alpha_N"], parameters["alpha_D"])
        with np.errstate(all="ignore"):
            return chinchilla_like_optimum(np.power(parameters["N_c"], ratio), parameters["D_c"], ratio, 1.0)

    # Internal: p, q (ln of the two terms in the bracket at the center of the data), alpha_D and ratio = alpha_N / alpha_D,
    # with ln L = alpha_D ln(exp(p - ratio x) + exp(q - y)); p and q include the scale of the mean loss.
    def evaluate(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        x, y = inputs.log_columns
        p, q, power, ratio = (theta[:, i, None] for i in range(4))
        size, data = np.exp(p - ratio * x), np.exp(q - y)
        total = size + data
        log_total = np.log(total)
        share = size / total
        jacobian = np.stack([power * share, power * (1 - share), log_total, -power * share * x], axis=1)
        return power * log_total, jacobian

    def bounds(self, inputs: LawInputs) -> tuple[Array, Array]:
        return np.array([-150.0, -150.0, 1e-3, 0.0]), np.array([150.0, 150.0, MAX_EXPONENT, MAX_EXPONENT])

    def bound_sentence(self, name: str, at_upper: bool) -> str:
        if name == "alpha_N" and not at_upper:
            return "alpha_N is 0: in these data the loss does not depend on N"
        if name == "alpha_D" and not at_upper:
            return "alpha_D is 0: in these data the loss follows no power law"
        if not at_upper and name in ("N_c", "D_c"):
            return f"{name} is at its lower bound: in these data the loss does not depend on its term"
        return super().bound_sentence(name, at_upper)

    def starts(self, inputs: LawInputs, log_loss: Array) -> Array:
        # Given alpha_D and the ratio, L^(1/alpha_D) is linear in the two amplitudes.
        x, y = inputs.log_columns
        found = []
        for power, ratio in product(np.geomspace(0.03, 1.2, 10), np.geomspace(0.25, 4.0, 8)):
            with np.errstate(all="ignore"):  # at small powers, losses spanning decades overflow float64
                relative = np.exp(-log_loss / power)
                basis = np.stack([np.exp(-ratio * x) * relative, np.exp(-y) * relative], axis=1)
                scale = np.sqrt(np.mean(basis**2, axis=0))
                scaled = basis / scale
                share = np.ones(2)
                if np.isfinite(scaled).all():
                    share = np.linalg.lstsq(scaled, np.ones_like(x), rcond=None)[0]
                p, q = np.nan_to_num(np.log(np.maximum(share, 0.01) / scale))
            found.append([p, q, power, ratio])
        return np.clip(np.array(found), *self.bounds(inputs))

    def to_natural(self, theta: Array, inputs: LawInputs) -> dict[str, Array]:
        theta = np.asarray(theta, dtype=np.float64)
        p, q, power, ratio = (theta[..., i] for i in range(4))
        with np.errstate(all="ignore"):
            # exp(inner) is the mean loss inside the bracket.
            inner = inputs.log_loss_center / power
            n_c = np.exp((p + inner) / ratio + inputs.log_centers[0])
            return {
                "N_c": n_c,
                "D_c": np.exp(q + inner + inputs.log_centers[1]),
                "alpha_N": ratio * power,
                "alpha_D": power + 0.0,
            }

    def from_natural(self, parameters: Mapping[str, Any], inputs: LawInputs) -> Array:
        n_c, d_c, alpha_n, power = (np.asarray(parameters[k], dtype=np.float64) for k in self.parameters)
        ratio, inner = alpha_n / power, inputs.log_loss_center / power
        p = ratio * (np.log(n_c) - inputs.log_centers[0]) - inner
        q = np.log(d_c) - inputs.log_centers[1] - inner
        return np.stack(np.broadcast_arrays(p, q, power, ratio), axis=-1)


@dataclass(frozen=True)
class KaplanNS(LogSumLaw):
    """L(N, S_min) = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S, the learning curve of a model with N parameters.

    `n_steps` is S_min = S / (1 + B_crit / B), the steps at a batch size far above critical. Without a batch size there is
    no frontier in N and D.
    """

    name = "kaplan_ns"
    title = "Kaplan L(N, S)"
    source = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.6"
    formula = "L(N, S_min) = (N_c / N)^alpha_N + (S_c / S_min)^alpha_S"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params", "n_steps")

    @property
    def has_irreducible(self) -> bool:
        return False

    @property
    def terms(self) -> tuple[Term, ...]:
        return (
            Term("N_c", Slope("alpha_N", (1.0, 0.0)), is_scale=True),
            Term("S_c", Slope("alpha_S", (0.0, 1.0)), is_scale=True),
        )

    @property
    def example(self) -> Mapping[str, float]:
        return {"N_c": 6.5e13, "S_c": 2.1e3, "alpha_N": 0.077, "alpha_S": 0.76}  # table 3
