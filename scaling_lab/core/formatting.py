"""Human-readable numbers: counts with a unit, durations."""

from __future__ import annotations


def human_count(value: float) -> str:
    """12_345 as 12.3K: parameters and tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # Above the largest unit, scientific notation is easier to read; infinity has no unit.
        if size <= abs(value) < 1e16:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def human_time(seconds: float) -> str:
    """Seconds as `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    s = round(max(0.0, seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"
