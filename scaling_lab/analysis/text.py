"""Numbers and names as text, for sentences, tables and axes: 17k parameters, 1.6e12 FLOPs, 0.51 (0.48 to 0.54)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NOTHING = "–"
"""What stands in a table where there is no value."""

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eta": "η"}
APPROACH_NAMES = {
    "envelope": "Approach 1, envelope",
    "isoflop": "Approach 2, IsoFLOP",
    "parametric": "Approach 3, parametric",
}
SHORT_APPROACH_NAMES = {"envelope": "envelope", "isoflop": "IsoFLOP", "parametric": "parametric"}

Number = int | float
Format = Callable[[Number], str]


def format_flops(value: float) -> str:
    """1e11, 4e11, 1.6e12, 5.76e23."""
    return _scientific(value, 3)


def format_count(value: float) -> str:
    """Parameters and tokens: 640, 17k, 1.2M, 70B, 1.4T; three significant figures."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return significant(value, 3)
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 rounds to 1.00M, not to 1000k.
        if abs(value) >= size * 0.9995:
            number = significant(value / size, 3)
            # Beyond the last suffix, numbers of more than four digits read better as a power.
            return f"{number}{suffix}" if len(number) <= 4 or "." in number else f"{_scientific(value, 3)}"
    return significant(value, 3)


def significant(value: float, digits: int) -> str:
    """So many significant figures, without an exponent between a ten-thousandth and a million: 250, not 2.5e+02."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not known")
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    if 1 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return _scientific(value, digits)


def format_loss(value: float) -> str:
    """A loss in nats with three decimals."""
    return f"{value:.3f}"


def _scientific(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return significant(value, digits)
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


_NAMED_FORMATS: dict[str, Format] = {"count": format_count, "flops": format_flops}


def number_format(form: str) -> Format:
    """The function that a format's name stands for.

    Args:
        form: "count" (17k), "flops" (1.6e12), "sig3" (three significant figures; any digit), or a Python format
            specification such as ".4f", "+.3f" or ".2%".
    """
    if form in _NAMED_FORMATS:
        return _NAMED_FORMATS[form]
    if form.startswith("sig") and form[3:].isdigit():
        digits = int(form[3:])
        return lambda value: significant(value, digits)
    return lambda value: format(value, form)


def format_range(estimate: float | None, interval: Sequence[float | None] | None, form: str) -> str:
    """0.51 (0.48 to 0.54); without an interval the estimate alone; an end that is None is "unbounded"."""
    text = number_format(form)
    value = NOTHING if estimate is None else text(estimate)
    if interval is None:
        return value
    low, high = ("unbounded" if end is None else text(end) for end in interval)
    return f"{value} ({low} to {high})"
