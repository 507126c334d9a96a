"""Owns intervals of a quantity that cannot be below 0, from resamples that pile up there.

Equal tails cannot both be missed at a bound, so that a 90% interval of E holds a truth of 0 in 95% of studies or more.
Feldman and Cousins 1998 (arXiv physics/9711021, section IV.B) order a Gaussian's outcomes by their likelihood against the best
*allowed* mean instead: far from the bound their interval is the central one, at the bound it is one-sided, and it covers
at its level throughout. Here the Gaussian scale is the resamples' own, through their quantiles, as in a percentile interval.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.special import ndtr, ndtri

from scaling_lab.analysis.estimate import Array

# Beyond so many standard errors from the bound the interval is the central one.
_FAR = 5.0


@lru_cache(maxsize=8)
def _acceptance(level: float) -> tuple[Array, Array, Array]:
    """(means,) the mean mu >= 0 of a unit Gaussian, and the ends of the outcomes that its belt accepts."""
    mu = np.linspace(1e-6, _FAR + 6.0, 6000)
    lo, hi = np.zeros_like(mu), np.full_like(mu, 20.0)
    for _ in range(60):  # s: how far above mu the belt reaches; its lower end has the same likelihood ratio
        s = 0.5 * (lo + hi)
        enough = ndtr(s) - ndtr(_lower(mu, s) - mu) >= level
        lo, hi = np.where(enough, lo, s), np.where(enough, s, hi)
    return mu, _lower(mu, hi), mu + hi


def _lower(mu: Array, s: Array) -> Array:
    return np.where(s <= mu, mu - s, (mu**2 - s**2) / (2 * mu))


def means_held(x: float, level: float) -> tuple[float, float]:
    """The means (in standard errors, >= 0) that an outcome `x` of a unit Gaussian leaves open."""
    if x > _FAR:
        z = float(ndtri(0.5 + 0.5 * level))
        return x - z, x + z
    mu, lower, upper = _acceptance(level)
    held = mu[(lower <= x) & (x <= upper)]
    lo = float(held[0])
    return (0.0 if lo <= mu[0] else lo), float(held[-1])


def bounded_tails(share_at_zero: float, level: float) -> tuple[float, float]:
    """The lower and upper quantile levels of resamples of which this share lies at 0; a lower level within that share is 0 itself."""
    x = float(np.clip(-ndtri(share_at_zero), -3.0, _FAR + 3.0))
    lo, hi = means_held(x, level)
    # Where 0 itself is held, the quantile at its own share would lie between 0 and the first sample above it.
    return 0.0 if lo == 0.0 else float(ndtr(lo - x)), float(ndtr(hi - x))
