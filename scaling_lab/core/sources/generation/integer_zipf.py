"""Zipf distributions in integer arithmetic: probabilities times 2^32, the same on every machine."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

# Probabilities are integers over this: a token is decided by 32 random bits.
ONE = 1 << 32
# Number of leading terms summed directly; the rest of the sum uses the Euler-Maclaurin formula.
DIRECT_RANKS = 50
# B_2k / (2k)! of the Euler-Maclaurin formula, k = 1 .. 6 (Bernoulli numbers 1/6, -1/30, 1/42, -1/30, 5/66, -691/2730).
EULER_MACLAURIN = (
    (1, 12), (-1, 720), (1, 30_240), (-1, 1_209_600), (1, 47_900_160), (-691, 1_307_674_368_000),
)  # fmt: skip
# A float power may be off by a few ulps, which on this scale is below 1e-5.
FLOAT_ERROR = 1e-5


def zipf_weights(n: int, exponent: float, total: int = ONE) -> NDArray[np.int64]:
    """Integers proportional to 1 / rank^exponent for ranks 1 .. n, at least 1 each, that sum to `total`, (n,).

    The last bit of a float power differs between machines: if it could change an integer, decimal arithmetic is used.
    """
    with localcontext() as context:
        context.prec = 40
        power = Decimal(str(exponent))
        scale = Decimal(total - n) / zipf_sum(n, power)
        values = float(scale) * np.arange(1, n + 1, dtype=np.float64) ** -exponent
        out = np.floor(values).astype(np.int64)
        for i in np.flatnonzero(np.abs(values - np.round(values)) < FLOAT_ERROR * max(1.0, total / ONE)):
            out[i] = int(scale * Decimal(int(i) + 1) ** -power)
    out += 1
    out[0] += total - out.sum()
    return out


def zipf_sum(n: int, power: Decimal) -> Decimal:
    """Sum of rank^-power over ranks 1 .. n, to about 25 digits, with the caller's decimal precision."""
    first = min(n, DIRECT_RANKS)
    head = sum((Decimal(rank) ** -power for rank in range(1, first)), Decimal(0))
    if n == first:
        return head + Decimal(n) ** -power
    a, b = Decimal(first), Decimal(n)
    integral = (b / a).ln() if power == 1 else (b ** (1 - power) - a ** (1 - power)) / (1 - power)
    tail = integral + (a**-power + b**-power) / 2
    # The (2k - 1)-th derivative of x^-power is -power (power + 1) ... (power + 2k - 2) x^(-power - 2k + 1).
    rising, order = power, 1
    for numerator, denominator in EULER_MACLAURIN:
        derivative_at_a = -rising * a ** (-power - order)
        derivative_at_b = -rising * b ** (-power - order)
        tail += Decimal(numerator) / Decimal(denominator) * (derivative_at_b - derivative_at_a)
        rising *= (power + order) * (power + order + 1)
        order += 2
    return head + tail
