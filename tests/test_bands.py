"""Tests of intervals at a bound: Feldman and Cousins's published values, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from scaling_lab.analysis.inference.bands import Band, accepted_means, bounded_tails


# Feldman & Cousins 1998 (arXiv physics/9711021), table X, 90% C.L.
@pytest.mark.parametrize(
    ("x", "lo", "hi"),
    [
        (-3.0, 0.0, 0.26),
        (-1.0, 0.0, 0.81),
        (0.0, 0.0, 1.64),
        (1.0, 0.0, 2.64),
        (2.0, 0.58, 3.64),
        (3.0, 1.37, 4.64),
    ],
)
def test_the_published_confidence_belt(x: float, lo: float, hi: float) -> None:
    assert accepted_means(x, 0.9) == pytest.approx((lo, hi), abs=0.011)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.5, 4.0])
def test_the_belt_covers_at_its_level(mu: float) -> None:
    x = norm.ppf((np.arange(2000) + 0.5) / 2000) + mu
    held = [lo <= mu + 1e-9 and mu <= hi for lo, hi in (accepted_means(v, 0.9) for v in x)]
    assert np.mean(held) == pytest.approx(0.9, abs=0.005)


def test_intervals_are_central_far_from_the_bound_and_one_sided_at_it() -> None:
    assert bounded_tails(1e-5, 0.9) == pytest.approx((0.05, 0.95), abs=0.002)
    lower, upper = bounded_tails(0.3, 0.9)  # x = .52: the belt holds 0 to x + 1.64
    assert lower <= 0.3  # a quantile within the share at 0: the interval begins there
    assert upper == pytest.approx(0.95, abs=0.001)


def band(values: np.ndarray) -> Band:
    return Band("parametric", 0.9, "residual", "residual bootstrap", values.size, 0, 0, {"E": values})


def test_a_band_uses_the_belt_where_samples_pile_up_at_zero() -> None:
    free = 1.4 + norm.ppf((np.arange(4000) + 0.5) / 4000)
    piled = band(np.maximum(free, 0.0)).interval("E")
    assert piled is not None
    assert (piled.lo, piled.hi) == pytest.approx(accepted_means(1.4, 0.9), abs=0.02)
    assert piled.lo > 0  # equal tails would begin at 0
    at_zero = band(np.maximum(free - 1.0, 0.0)).interval("E")
    assert at_zero is not None
    assert at_zero.lo == 0.0
    inside = band(free + 10).interval("E")
    assert inside is not None
    assert (inside.lo, inside.hi) == pytest.approx((11.4 - 1.645, 11.4 + 1.645), abs=0.01)
