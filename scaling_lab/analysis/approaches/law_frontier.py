"""The compute-optimal frontier of a fitted law, in closed form or by numerical minimization at fixed compute.

If C = 6 N D to 1% and the law has a closed-form frontier, that is used. Otherwise D = C / (observed FLOPs per token at a
size), and the loss is minimized over N numerically: small models with attention and an output head do not satisfy C = 6 N D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.frontiers import FrontierPoints, quantities
from scaling_lab.analysis.laws import LossLaw
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError

# Number of budgets of the numerical frontier, log-spaced over the observed range of C.
_BUDGETS = 12
# Sizes tried per budget, and how far beyond the observed sizes (in ln N), since the optimum may lie outside the sample.
_SIZES = 160
_BEYOND_LOG_N = 5.0


def law_columns(observations: Observations, law: LossLaw) -> dict[str, Array]:
    """The columns of the observations that a law reads, the extra columns included.

    Raises:
        UserError: a column is missing; the message names it and the extra columns that exist.
    """
    own = {
        "n_params": observations.n_params,
        "n_tokens": observations.n_tokens,
        "compute_flops": observations.compute_flops,
    }
    found = {**observations.extra, **own}
    missing = [c for c in law.columns if c not in found]
    if missing:
        have = ", ".join(sorted(observations.extra)) or "none"
        raise UserError(
            f"law={law.name} needs the column {missing[0]!r}, which these observations do not have; extra columns: {have}."
        )
    return {c: found[c] for c in law.columns}


def has_frontier(law: LossLaw) -> bool:
    """Whether the law depends on both N and D."""
    return "n_params" in law.columns and "n_tokens" in law.columns


def has_closed_form(law: LossLaw, observations: Observations) -> bool:
    """Whether the frontier has a closed form for these observations."""
    return observations.is_six_nd and law.frontier(law.example) is not None


def frontier_quantities(
    law: LossLaw, parameters: Mapping[str, Array], observations: Observations
) -> dict[str, Array]:
    """(samples,) each: exponents, log coefficients and loss curve of the frontier, for a batch of parameters (samples,)."""
    with np.errstate(all="ignore"):
        if has_closed_form(law, observations):
            return _closed_form_quantities(law, parameters, observations)
        return quantities(numerical_frontier(law, parameters, observations))


@dataclass(frozen=True)
class FlopsPerToken:
    """ln of training FLOPs per token as a smooth function of ln N, fitted to observed runs: 6 N times a correction."""

    correction: Array
    """Polynomial coefficients of ln(C / 6 N D) in (ln N - center), constant beyond the observed sizes."""
    center: float
    log_n_range: tuple[float, float]
    largest_error: float
    """Largest |ln| deviation of an observed size from the polynomial."""

    def __call__(self, log_n: Any) -> Any:
        inside = np.clip(log_n, *self.log_n_range) - self.center
        return (
            np.log(FLOPS_PER_PARAM_TOKEN) + log_n + np.polynomial.polynomial.polyval(inside, self.correction)
        )


def flops_per_token(observations: Observations) -> FlopsPerToken:
    """Fit observed FLOPs per token as a function of size: a polynomial of degree 3 or less for ln(C / 6 N D) in ln N."""
    log_n = np.log(observations.n_params)
    excess = (
        np.log(observations.compute_flops / observations.n_tokens) - np.log(FLOPS_PER_PARAM_TOKEN) - log_n
    )
    x, at = np.unique(np.round(log_n, 9), return_inverse=True)
    y = np.bincount(at, excess) / np.bincount(at)
    center = float(x.mean())
    degree = min(3, max(0, x.size - 2))
    coefficients = np.polynomial.polynomial.polyfit(x - center, y, degree)
    error = float(np.abs(np.polynomial.polynomial.polyval(x - center, coefficients) - y).max())
    return FlopsPerToken(coefficients, center, (float(x[0]), float(x[-1])), error)


def numerical_frontier(
    law: LossLaw, parameters: Mapping[str, Array], observations: Observations
) -> FrontierPoints:
    """(samples, budgets) optima of a law at fixed C, for a batch of parameters (samples,)."""
    per_token = flops_per_token(observations)
    log_n_obs = np.log(observations.n_params)
    log_c = np.linspace(
        np.log(observations.compute_flops.min()), np.log(observations.compute_flops.max()), _BUDGETS
    )
    others = _columns_by_size(law, observations)
    p = {k: np.asarray(v, dtype=np.float64)[:, None, None] for k, v in parameters.items()}

    def losses(log_n: Array) -> Array:
        log_d = log_c[:, None] - per_token(log_n)
        columns = {"n_params": np.exp(log_n), "n_tokens": np.exp(log_d)}
        columns |= {name: np.exp(np.interp(log_n, *xy)) for name, xy in others.items()}
        if "compute_flops" in law.columns:
            columns["compute_flops"] = np.broadcast_to(np.exp(log_c)[:, None], log_n.shape)
        return np.asarray(law.loss_nats(p, columns))

    wide = np.linspace(log_n_obs.min() - _BEYOND_LOG_N, log_n_obs.max() + _BEYOND_LOG_N, _SIZES)
    coarse = losses(np.broadcast_to(wide, (1, log_c.size, wide.size)))
    at = np.argmin(coarse, axis=-1)
    inside = (at > 0) & (at < wide.size - 1)
    step = wide[1] - wide[0]
    log_n = wide[at]
    for _ in range(3):  # each pass divides the spacing by eight
        fine = log_n[..., None] + np.linspace(-step, step, 17)
        values = losses(fine)
        best = np.clip(np.argmin(values, axis=-1), 1, 15)
        log_n = np.take_along_axis(fine, best[..., None], axis=-1)[..., 0]
        step /= 8
    loss = losses(log_n[..., None])[..., 0]
    log_d = log_c - per_token(log_n)
    ok = inside & np.isfinite(loss)
    return FrontierPoints(
        np.broadcast_to(log_c, ok.shape),
        np.where(ok, log_n, 0.0),
        np.where(ok, log_d, 0.0),
        np.where(ok, loss, np.nan),
        ok.astype(np.float64),
    )


def _columns_by_size(law: LossLaw, observations: Observations) -> dict[str, tuple[Array, Array]]:
    """Other columns of a law (width, depth, unique tokens) as (ln N, mean ln value) of each size."""
    x, at = np.unique(np.round(np.log(observations.n_params), 9), return_inverse=True)
    out: dict[str, tuple[Array, Array]] = {}
    for name, values in law_columns(observations, law).items():
        if name not in ("n_params", "n_tokens", "compute_flops"):
            out[name] = (x.astype(np.float64), np.bincount(at, np.log(values)) / np.bincount(at))
    return out


def _closed_form_quantities(
    law: LossLaw, parameters: Mapping[str, Array], observations: Observations
) -> dict[str, Array]:
    optimum = law.frontier(parameters)
    assert optimum is not None
    log_k = np.log(np.asarray(optimum.params_coefficient, dtype=np.float64))
    log_kd = np.log(np.asarray(optimum.tokens_coefficient, dtype=np.float64))
    a, b = (np.asarray(v, dtype=np.float64) for v in (optimum.params_exponent, optimum.tokens_exponent))
    # Along the frontier both terms decrease as the same power of C, so E and two losses determine the curve.
    log_c = np.log([observations.compute_flops.min(), observations.compute_flops.max()])
    if log_c[1] - log_c[0] < 1e-6:
        log_c = log_c + np.array([-1.0, 1.0])
    columns = {
        "n_params": np.exp(log_k[:, None] + a[:, None] * log_c),
        "n_tokens": np.exp(log_kd[:, None] + b[:, None] * log_c),
    }
    loss = np.asarray(law.loss_nats({k: np.asarray(v)[:, None] for k, v in parameters.items()}, columns))
    floor = np.asarray(parameters["E"], dtype=np.float64) if "E" in parameters else np.zeros_like(a)
    above = np.log(loss - floor[:, None])
    gamma = (above[:, 0] - above[:, 1]) / (log_c[1] - log_c[0])
    return {
        "params_exponent": a,
        "params_log_coefficient": log_k,
        "tokens_exponent": b,
        "tokens_log_coefficient": log_kd,
        "loss_floor_nats": floor,
        "loss_log_coefficient": above[:, 0] + gamma * log_c[0],
        "loss_exponent": gamma,
    }
