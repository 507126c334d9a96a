"""Human-readable numbers: counts with a unit, bytes, durations."""

from __future__ import annotations


def human_count(value: float) -> str:
    """12_345 as 12.3K: parameters and tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # Above the largest unit, scientific notation is easier to read; infinity has no unit.
        if size <= abs(value) < 1e16:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def human_bytes(value: float) -> str:
    """Bytes as `340 MB` or `1.2 GB`, of 1,000."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if value < 1e15 else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} bytes"


def human_amount(value: float) -> str:
    """A number of hours, or a price: `0.42`, `3.7`, `1,240`."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


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
