"""Resampled estimates and their percentile intervals, corrected where a quantity cannot be below 0.

Equal tails over-cover at a bound: a 90% interval of E contains a true E of 0 in at least 95% of studies. Feldman and
Cousins 1998 (arXiv physics/9711021, section IV.B) order the outcomes of a Gaussian by their likelihood relative to the best
*allowed* mean. Their interval is central far from the bound, one-sided at the bound, and covers at its level everywhere.
Here the scale of the Gaussian comes from the quantiles of the resamples, as in any percentile interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy

from scaling_lab.analysis.estimate import Array, Interval

# With fewer samples there is neither an interval nor a standard error.
_MIN_SAMPLES = 20
# Beyond this many standard errors from the bound the interval is the central one.
_FAR = 5.0


@dataclass(frozen=True)
class Band:
    """The resampled estimates of one approach; all its intervals and standard errors come from them."""

    approach: str
    level: float
    unit: str
    """run, row, seed, budget or residual."""
    method: str
    requested: int
    failed: int
    seed: int
    samples: Mapping[str, Array]
    """By quantity (params_exponent, params_coefficient, tokens_exponent, ..., E, A, B, alpha, beta): one value per
    successful resample."""
    message: str | None = None
    """Why there are no intervals, or why not to trust them."""

    def __repr__(self) -> str:
        return f"Band({self.approach}: {self.level:.0%}, {self.requested} resamples by {self.unit}, {self.failed} failed)"

    def interval(self, quantity: str) -> Interval | None:
        """Percentile interval of a quantity at `level`; None with fewer than 20 samples.

        The tails are equal unless samples pile up at a bound of 0 (see the module).
        """
        values = self.samples.get(quantity)
        if values is None or np.count_nonzero(np.isfinite(values)) < _MIN_SAMPLES:
            return None
        tails = ((1.0 - self.level) / 2.0, (1.0 + self.level) / 2.0)
        at_zero = float(np.mean(values[np.isfinite(values)] == 0.0))
        if 0.0 < at_zero < 1.0:
            tails = bounded_tails(at_zero, self.level)
        known = values[~np.isnan(values)]
        # Infinite samples (a coefficient that overflowed) count, so an end may be infinite. That end is then a sample
        # itself: interpolating between a finite and an infinite value would give NaN.
        method: Literal["linear", "inverted_cdf"] = "linear" if np.isfinite(known).all() else "inverted_cdf"
        lo, hi = np.quantile(known, tails, method=method)
        return Interval(float(lo), float(hi))

    def standard_error(self, quantity: str) -> float | None:
        """Standard deviation of the samples of a quantity; None with fewer than 20."""
        values = self.samples.get(quantity)
        if values is None or np.count_nonzero(np.isfinite(values)) < _MIN_SAMPLES:
            return None
        with np.errstate(invalid="ignore", over="ignore"):
            return float(np.nanstd(values, ddof=1))


def bounded_tails(share_at_zero: float, level: float) -> tuple[float, float]:
    """Lower and upper quantile levels of an interval for a quantity >= 0, given the share of its resamples at 0.

    A lower level within that share is 0.
    """
    x = float(np.clip(-scipy.special.ndtri(share_at_zero), -3.0, _FAR + 3.0))
    lo, hi = accepted_means(x, level)
    # If 0 is accepted, the quantile at its own share would lie between 0 and the first sample above it.
    return 0.0 if lo == 0.0 else float(scipy.special.ndtr(lo - x)), float(scipy.special.ndtr(hi - x))


def accepted_means(x: float, level: float) -> tuple[float, float]:
    """The smallest and largest mean (in standard errors, >= 0) that an outcome `x` of a unit Gaussian does not reject."""
    if x > _FAR:
        z = float(scipy.special.ndtri(0.5 + 0.5 * level))
        return x - z, x + z
    mu, lower, upper = _acceptance_belt(level)
    accepted = mu[(lower <= x) & (x <= upper)]
    lo = float(accepted[0])
    return (0.0 if lo <= mu[0] else lo), float(accepted[-1])


@lru_cache(maxsize=8)
def _acceptance_belt(level: float) -> tuple[Array, Array, Array]:
    """(means,) the mean mu >= 0 of a unit Gaussian, and the lower and upper end of the outcomes accepted at that mean."""
    mu = np.linspace(1e-6, _FAR + 6.0, 6000)
    lo, hi = np.zeros_like(mu), np.full_like(mu, 20.0)
    for _ in range(60):  # bisect the distance s from mu to the upper end
        s = 0.5 * (lo + hi)
        enough = scipy.special.ndtr(s) - scipy.special.ndtr(_lower_end(mu, s) - mu) >= level
        lo, hi = np.where(enough, lo, s), np.where(enough, s, hi)
    return mu, _lower_end(mu, hi), mu + hi


def _lower_end(mu: Array, s: Array) -> Array:
    """The outcome below mu with the same likelihood ratio as mu + s."""
    return np.where(s <= mu, mu - s, (mu**2 - s**2) / (2 * mu))
