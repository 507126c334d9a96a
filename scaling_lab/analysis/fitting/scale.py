"""How far the objective may rise before a parameter value is rejected, from an estimate of the noise scale.

Two estimates of the scale:

    robust      2 (f - f_min) E[psi'] / E[psi^2] compared with F(1, n - p): the likelihood-ratio-type test for M-estimators
                (Schrader & Hettmansperger 1980, Biometrika 67). It assumes identically distributed, symmetric residuals.
    likelihood  assumes that residuals have the density exp(-Huber(r) / tau) / Z(tau) and profiles tau out: nearly a
                Laplace distribution at delta = 1e-3. Intervals are too narrow if the noise is Gaussian and much larger
                than delta.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import scipy

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.fitting.objective import Objective

ScaleName = Literal["robust", "likelihood"]
SCALES: tuple[str, ...] = get_args(ScaleName)


def objective_rise(
    problem: Objective, optimum: Array, lowest: float, level: float, scale: ScaleName
) -> float:
    """Rise of the objective at the ends of the interval."""
    w = problem.row(problem.weights, np.zeros(1, dtype=np.intp))[0]
    used = w > 0
    n, p = int(np.count_nonzero(used)), len(problem.law.parameters)
    if n <= p or lowest <= 1e-20 * float(w.sum()):
        return 0.0
    quantile = float(scipy.special.fdtri(1, n - p, level))
    log_fit, _ = problem.law.evaluate(optimum, problem.inputs)
    log_loss = problem.log_loss[0]
    mean_weight = float(w[used].mean())
    if problem.kind != "huber_log":
        if scale == "likelihood":
            return lowest * float(np.expm1(quantile / n))
        return quantile * lowest / (n - p)
    r, delta = (log_fit[0] - log_loss)[used], problem.huber_delta
    if scale == "likelihood":
        return _likelihood_rise(lowest / mean_weight, n, delta, quantile * n / (n - p)) * mean_weight
    psi_squared = float(np.sum(w[used] * np.minimum(np.abs(r), delta) ** 2)) / mean_weight / (n - p)
    return 0.5 * quantile * psi_squared / _share_inside(r, delta, p) * mean_weight


def _share_inside(r: Array, delta: float, p: int) -> float:
    """E[psi'], the probability of |r| <= delta; estimated from the density at 0 if few residuals are that small.

    As in quantile regression, the density is the inverse slope of the quantile function about the median, with the
    bandwidth of Hall & Sheather (1988, J. R. Stat. Soc. B 50). Residuals are inflated to account for p fitted parameters.
    """
    n = len(r)
    inflated = r * np.sqrt(n / (n - p))
    bandwidth = min(0.45, n ** (-1 / 3) * 1.645 ** (2 / 3) * (1.5 / (2 * np.pi)) ** (1 / 3))
    low, high = np.quantile(inflated, [0.5 - bandwidth, 0.5 + bandwidth])
    if high - low <= 2 * delta:
        return max(float(np.mean(np.abs(inflated) <= delta)), 1.0 / n)
    return min(1.0, 2 * delta * 2 * bandwidth / float(high - low))


def _likelihood_rise(lowest: float, n: int, delta: float, quantile: float) -> float:
    """Rise of the objective at which twice the log-likelihood, maximized over tau, has dropped by `quantile`."""

    def log_likelihood(value: float) -> float:
        def negative(log_tau: float) -> float:
            tau = np.exp(log_tau)
            inside = np.sqrt(2 * np.pi * tau) * scipy.special.erf(delta / np.sqrt(2 * tau))
            outside = 2 * tau / delta * np.exp(-(delta**2) / (2 * tau))
            return float(n * np.log(inside + outside) + value / tau)

        guess = np.log(max(value / n, 1e-300))
        return -float(
            scipy.optimize.minimize_scalar(negative, bounds=(guess - 8, guess + 8), method="bounded").fun
        )

    top = log_likelihood(lowest)
    far = lowest * float(np.expm1(quantile / n)) + 1e-300

    def gap(rise: float) -> float:
        return 2 * (top - log_likelihood(lowest + rise)) - quantile

    while gap(far) < 0:
        far *= 2
    return float(scipy.optimize.brentq(gap, 0.0, far, rtol=1e-10))
