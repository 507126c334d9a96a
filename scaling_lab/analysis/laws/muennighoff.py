"""The data-constrained law of Muennighoff et al.: Chinchilla's law with decaying value of repeated tokens and excess
parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.base import TYPICAL_RANGES, ComputeOptimum, LawInputs, LossLaw
from scaling_lab.analysis.laws.chinchilla import Chinchilla
from scaling_lab.analysis.laws.sums import chinchilla_like_optimum

_E, _A, _B, _ALPHA, _BETA, _RD, _RN = range(7)


@dataclass(frozen=True)
class Muennighoff(LossLaw):
    """L(N, D, U) = E + A / N'^alpha + B / D'^beta for D training tokens, U of them unique.

    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*)) with U_D = min(U, D) and R_D = D / U_D - 1 repetitions after the first epoch;
    N' likewise from U_N = min(N, N_opt at the compute whose D_opt is U_D) and R_N = N / U_N - 1.
    """

    name = "muennighoff"
    title = "Data-constrained L(N, D, U)"
    source = "Muennighoff et al. 2023, arXiv 2305.16264, section 3"
    formula = "L(N, D, U) = E + A / N'^alpha + B / D'^beta, X' = U_X + U_X R_X* (1 - exp(-R_X / R_X*))"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("E", "A", "B", "alpha", "beta", "R_D_star", "R_N_star")

    @property
    def log_scaled(self) -> tuple[str, ...]:
        return ("A", "B", "R_D_star", "R_N_star")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params", "n_tokens", "unique_tokens")

    @property
    def example(self) -> Mapping[str, float]:
        # The published fit on C4 (from the released code).
        return {
            "E": float(np.exp(0.6254804)),
            "A": float(np.exp(6.255414)),
            "B": float(np.exp(7.3049974)),
            "alpha": 0.3526596,
            "beta": 0.3526596,
            "R_D_star": 15.387756,
            "R_N_star": 5.309743,
        }

    def example_columns(self, n: int = 150, seed: int = 0) -> dict[str, Array]:
        """1 to 60 epochs, and models up to 60 times the optimum for their unique tokens, so that both decays matter."""
        rng = np.random.default_rng(seed)
        lo, hi = TYPICAL_RANGES["unique_tokens"]
        unique = np.exp(rng.uniform(np.log(lo), np.log(hi), size=n))
        n_tokens = unique * np.exp(rng.uniform(-1.0, np.log(60.0), size=n))
        n_params = unique / 20 * np.exp(rng.uniform(-1.0, np.log(60.0), size=n))
        return {"n_params": n_params, "n_tokens": n_tokens, "unique_tokens": unique}

    def loss_nats(self, parameters: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
        E, A, B, alpha, beta, r_d, r_n = (parameters[k] for k in self.parameters)
        n, d = columns["n_params"], columns["n_tokens"]
        # Without the column every token is unique: frontiers and contours are those of unlimited data.
        u_d = np.minimum(columns.get("unique_tokens", d), d)
        g = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        u_n = np.minimum(n, g * (g * u_d) ** (beta / alpha))
        effective_d = u_d * (1 + r_d * (1 - np.exp(-(d / u_d - 1) / r_d)))
        effective_n = u_n * (1 + r_n * (1 - np.exp(-(n / u_n - 1) / r_n)))
        return E + A / effective_n**alpha + B / effective_d**beta

    def frontier(self, parameters: Mapping[str, Any]) -> ComputeOptimum:
        """The frontier for unlimited unique tokens; with repetition the optimum depends on U and has no closed form."""
        return chinchilla_like_optimum(*(parameters[k] for k in ("A", "B", "alpha", "beta")))

    # Internal: E, ln A and ln B as in Chinchilla's law (relative to the mean loss, at the center of the data), exponents, ln R*.
    def evaluate(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        alpha, beta = theta[:, _ALPHA, None], theta[:, _BETA, None]
        log_n, d_log_n = self._log_effective_n(theta, inputs)
        log_d, d_log_d = self._log_effective_d(theta, inputs)
        x, y = log_n - inputs.log_centers[0], log_d - inputs.log_centers[1]
        size = np.exp(theta[:, _A, None] - alpha * x)
        data = np.exp(theta[:, _B, None] - beta * y)
        total = theta[:, _E, None] + size + data
        jacobian = -alpha[:, None] * (size / total)[:, None] * d_log_n
        jacobian[:, _RD] -= beta * (data / total) * d_log_d
        jacobian[:, _E] += 1 / total
        jacobian[:, _A] += size / total
        jacobian[:, _ALPHA] -= x * size / total
        jacobian[:, _B] += data / total
        jacobian[:, _BETA] -= y * data / total
        return np.log(total), jacobian

    def _log_effective_d(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        """ln D' (B, n) and its derivative with respect to ln R_D*."""
        u_d = np.minimum(inputs.columns["unique_tokens"], inputs.columns["n_tokens"])
        repetitions = inputs.columns["n_tokens"] / u_d - 1
        worth, slope, _ = _saturate(repetitions, theta[:, _RD, None])
        return np.log(u_d) + np.log1p(worth), slope / (1 + worth)

    def _log_effective_n(self, theta: Array, inputs: LawInputs) -> tuple[Array, Array]:
        """ln N' (B, n) and its derivatives with respect to all internal parameters (B, 7, n)."""
        log_n = np.log(inputs.columns["n_params"])
        log_unique = np.log(np.minimum(inputs.columns["unique_tokens"], inputs.columns["n_tokens"]))
        alpha, beta = theta[:, _ALPHA, None], theta[:, _BETA, None]
        center_n, center_d = inputs.log_centers[0], inputs.log_centers[1]
        share = 1 / (alpha + beta)
        log_ratio = theta[:, _A, None] + alpha * center_n - theta[:, _B, None] - beta * center_d
        log_g = share * (np.log(alpha / beta) + log_ratio)
        power = beta / alpha
        log_optimum = log_g + power * (log_g + log_unique)
        capped = log_optimum < log_n
        log_u = np.where(capped, log_optimum, log_n)
        excess = np.expm1(log_n - log_u)
        worth, by_log_r, by_excess = _saturate(excess, theta[:, _RN, None])
        by_log_u = 1 - by_excess * (excess + 1) / (1 + worth)
        derivative = np.zeros((len(theta), 7, log_n.size))
        from_g = (1 + power) * by_log_u * capped
        derivative[:, _A] = from_g * share
        derivative[:, _B] = -from_g * share
        tail = by_log_u * capped * (log_g + log_unique)
        derivative[:, _ALPHA] = from_g * share * (1 / alpha + center_n - log_g) - tail * power / alpha
        derivative[:, _BETA] = from_g * share * (-1 / beta - center_d - log_g) + tail / alpha
        derivative[:, _RN] = by_log_r / (1 + worth)
        return log_u + np.log1p(worth), derivative

    def bounds(self, inputs: LawInputs) -> tuple[Array, Array]:
        lower = np.array([0.0, np.log(1e-6), np.log(1e-6), 0.02, 0.02, np.log(1e-2), np.log(1e-2)])
        upper = np.array([1e3, 50.0, 50.0, 5.0, 5.0, np.log(1e4), np.log(1e4)])
        return lower, upper

    def bound_sentence(self, name: str, at_upper: bool) -> str:
        if name == "E" and not at_upper:
            return "E is 0: these data show no irreducible loss"
        if name.startswith("R_"):
            what = "repeated tokens" if name == "R_D_star" else "excess parameters"
            return (
                f"{name}: in these data {what} are worth {'as much as new ones' if at_upper else 'nothing'}"
            )
        return super().bound_sentence(name, at_upper)

    def starts(self, inputs: LawInputs, log_loss: Array) -> Array:
        # Starts of Chinchilla's law on the effective tokens for a few values of R*.
        plain = Chinchilla()
        found = []
        for r_d, r_n in product(np.log([5.0, 40.0]), np.log([3.0, 20.0])):
            theta = np.zeros((1, 7))
            theta[0, _RD] = r_d
            worth = np.exp(self._log_effective_d(theta, inputs)[0][0])
            columns = {"n_params": inputs.columns["n_params"], "n_tokens": worth}
            loss = np.exp(log_loss + inputs.log_loss_center)
            inner = plain.prepare(columns, loss)
            grid = np.array(list(product((0.15, 0.3, 0.45, 0.8), repeat=2)))
            natural = plain.to_natural(plain.project(grid, inner, log_loss), inner)
            full = {**natural, "R_D_star": np.exp(r_d), "R_N_star": np.exp(r_n)}
            found.append(self.from_natural(full, inputs))
        return np.clip(np.concatenate(found), *self.bounds(inputs))

    def to_natural(self, theta: Array, inputs: LawInputs) -> dict[str, Array]:
        theta = np.asarray(theta, dtype=np.float64)
        center = inputs.log_loss_center
        with np.errstate(over="ignore"):
            return {
                "E": theta[..., _E] * np.exp(center),
                "A": np.exp(theta[..., _A] + theta[..., _ALPHA] * inputs.log_centers[0] + center),
                "B": np.exp(theta[..., _B] + theta[..., _BETA] * inputs.log_centers[1] + center),
                "alpha": theta[..., _ALPHA] + 0.0,
                "beta": theta[..., _BETA] + 0.0,
                "R_D_star": np.exp(theta[..., _RD]),
                "R_N_star": np.exp(theta[..., _RN]),
            }

    def from_natural(self, parameters: Mapping[str, Any], inputs: LawInputs) -> Array:
        E, A, B, alpha, beta, r_d, r_n = (
            np.asarray(parameters[k], dtype=np.float64) for k in self.parameters
        )
        center = inputs.log_loss_center
        values = (
            E * np.exp(-center),
            np.log(A) - alpha * inputs.log_centers[0] - center,
            np.log(B) - beta * inputs.log_centers[1] - center,
            alpha,
            beta,
            np.log(r_d),
            np.log(r_n),
        )
        return np.stack(np.broadcast_arrays(*values), axis=-1)


def _saturate(excess: Array, log_r: Array) -> tuple[Array, Array, Array]:
    """R (1 - exp(-excess / R)) with R = exp(log_r), and its derivatives with respect to log_r and excess."""
    r = np.exp(log_r)
    q = excess / r
    kept = np.exp(-q)
    worth = -r * np.expm1(-q)
    return worth, worth - excess * kept, kept
