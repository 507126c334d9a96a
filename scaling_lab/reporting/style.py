"""How figures look: colors, sizes and readable logarithmic axes. No data, no files.

Figures are drawn on a transparent background in dark ink; the page turns them light in dark mode, so nothing here may rely
on a white background.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects, style
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

# Every figure has this width, so that text has one size throughout the page. Inches.
FIGURE_WIDTH = 6.4

INK = "#1d2127"
MUTED = "#6b727c"
FAINT = "#c9ced6"

# Okabe & Ito's palette, distinguishable under the common forms of color blindness: one color for each approach.
APPROACH_COLORS = {"envelope": "#0072b2", "isoflop": "#d55e00", "parametric": "#008f6b"}
APPROACH_MARKERS = {"envelope": "o", "isoflop": "s", "parametric": "D"}
# Further colors of the same palette, for series that belong to no approach.
ACCENTS = ("#0072b2", "#d55e00", "#008f6b", "#cc79a7", "#56b4e9", "#a07000")
MARKERS = "osD^vP*X"
LINE_STYLES = ("-", "--", ":", "-.")

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.7,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    # Text as outlines, so that a figure looks the same anywhere, and ids from a fixed salt, so that it is the same file.
    "svg.fonttype": "path",
    "svg.hashsalt": "scaling_lab",
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """The look of every figure of the project; use around making *and* saving it."""
    # After a reset: from the defaults, not from what a matplotlibrc or a notebook has set.
    with style.context(_RC, after_reset=True):
        yield


def sequential_map() -> Colormap:
    """Viridis without its palest end, which vanishes on paper: small to large is dark violet to green."""
    return LinearSegmentedColormap.from_list("sizes", mpl.colormaps["viridis"](np.linspace(0.0, 0.74, 64)))


def sequential_colors(
    values: Sequence[float] | np.ndarray,
) -> tuple[Callable[[float], Any], LogNorm, Colormap]:
    """A color for a positive value by its place in the (logarithmic) range of `values`, with its norm and map."""
    lo, hi = float(np.min(values)), float(np.max(values))
    if not hi > lo:
        lo, hi = lo / 1.5, hi * 1.5
    norm, colors = LogNorm(lo, hi), sequential_map()
    return (lambda value: colors(norm(value))), norm, colors


def text_color(color: Any) -> Any:
    """The color, darkened until text in it is readable on white (contrast 4.5 to 1, as WCAG 2.1 has it)."""
    rgb = np.array(to_rgb(color))
    for _ in range(30):
        linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        if 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05) >= 4.5:
            break
        rgb = rgb * 0.94
    return tuple(float(v) for v in rgb)


def halo(width: float = 2.2) -> list[Any]:
    """A white outline that keeps a label readable across lines (black in dark mode, where all colors are inverted)."""
    return [patheffects.withStroke(linewidth=width, foreground="white")]


# -- axes


def log_ticks(lo: float, hi: float, most: int = 7) -> list[float]:
    """At most `most` round values in [lo, hi] for a logarithmic axis, as fine as that allows: steps within each decade,
    decades, every k-th decade; equal steps where the range is narrow."""
    if not (0 < lo < hi):
        return [lo]
    first, last = math.floor(math.log10(lo)), math.ceil(math.log10(hi))

    def inside(steps: Sequence[float], stride: int = 1) -> list[float]:
        # Powers by text: 10.0**-3 * 3 is not 0.003.
        values = [float(f"{s}e{d}") for d in range(first, last + 1, stride) for s in steps]
        return [v for v in values if lo * (1 - 1e-9) <= v <= hi * (1 + 1e-9)]

    for steps in (
        [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9],
        [1, 1.5, 2, 3, 4, 5, 6, 8],
        [1, 2, 5],
        [1, 3],
        [1],
    ):
        ticks = inside(steps)
        if len(ticks) <= most:
            if len(ticks) >= 2:
                return ticks
            break
    for stride in range(2, 40):
        ticks = inside([1], stride)
        if 2 <= len(ticks) <= most:
            return ticks
    return _linear_ticks(lo, hi, most)


def _linear_ticks(lo: float, hi: float, most: int) -> list[float]:
    """The fallback for a range too narrow for 1-2-5: equal steps of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10(hi - lo)) + 1
    best = [lo, hi]
    for exponent in range(power, power - 4, -1):
        for step in (5, 2, 1):
            size = float(f"{step}e{exponent}")
            ticks = [
                float(f"{k * size:.12g}") for k in range(math.ceil(lo / size), math.floor(hi / size) + 1)
            ]
            if len(ticks) > most:
                return best
            if len(ticks) >= 2:
                best = ticks
    return best


def log_axis(
    ax: Axes,
    which: str,
    lo: float,
    hi: float,
    text: Callable[[float], str],
    *,
    margin: float = 0.04,
    most: int = 7,
) -> None:
    """Make axis `which` ("x" or "y") logarithmic over [lo, hi] (a share `margin` wider) with few, readable ticks."""
    if not hi > lo:
        lo, hi = lo / 1.3, hi * 1.3
    pad = (hi / lo) ** margin
    limits = (lo / pad, hi * pad)
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    ticks = log_ticks(*limits, most=most)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([text(t) for t in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    (ax.set_xlim if which == "x" else ax.set_ylim)(*limits)


def size_bar(ax: Axes, norm: LogNorm, colors: Colormap, text: Callable[[float], str], label: str) -> None:
    """A slim color bar with the same readable ticks as an axis, for a quantity that has no axis of its own."""
    # Two dozen steps look like a gradient and weigh a tenth of one.
    bar = ax.figure.colorbar(
        mpl.cm.ScalarMappable(norm, colors.resampled(24)), ax=ax, pad=0.015, fraction=0.03, aspect=32
    )
    ticks = log_ticks(float(norm.vmin or 0.0), float(norm.vmax or 0.0), most=6)
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_major_formatter(FixedFormatter([text(t) for t in ticks]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    # As a picture inside the SVG the gradient would be a bitmap: draw it as plain rectangles.
    if bar.solids is not None:
        bar.solids.set(edgecolor="face", linewidth=0.2, rasterized=False)


def spread(
    positions: Sequence[float], gap: float, lo: float = -math.inf, hi: float = math.inf
) -> list[float]:
    """Positions moved as little as needed so that neighbors are at least `gap` apart, within [lo, hi] where it fits."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(200):
        moved = False
        for j in range(1, len(placed)):
            lack = gap - (placed[j] - placed[j - 1])
            if lack > 1e-9:
                placed[j - 1] -= lack / 2
                placed[j] += lack / 2
                moved = True
        if placed and placed[0] < lo:
            placed = [placed[0] + (lo - placed[0]), *placed[1:]]
        if placed and placed[-1] > hi:
            placed = [*placed[:-1], hi]
        if not moved:
            break
    out = [0.0] * len(positions)
    for place, i in zip(placed, order):
        out[i] = place
    return out


def margin_labels(
    ax: Axes, entries: Sequence[tuple[float, str, Any]], *, size: float = 8.5, gap: float | None = None
) -> None:
    """Names next to the right edge of the axes, each at the height (data units) of its line there, pushed apart.

    Args:
        entries: (y in data units, text, color).
        gap: least distance of two names as a share of the axes' height; default by the figure's height.
    """
    if not entries:
        return
    # Data to axes coordinates by the scale alone: the layout is not fixed yet, so no transform may be asked.
    lo, hi = ax.get_ylim()
    log = ax.get_yscale() == "log"

    def height(y: float) -> float:
        if log:
            return math.log(max(y, 1e-300) / lo) / math.log(hi / lo)
        return (y - lo) / (hi - lo)

    if gap is None:
        figure = ax.get_figure(root=True)
        inches = (figure.get_figheight() if isinstance(figure, Figure) else 4.0) * ax.get_position().height
        gap = 1.25 * size / 72 / max(inches, 0.5)
    wanted = [min(1.02, max(-0.02, height(y))) for y, _, _ in entries]
    for at, y, (_, text, color) in zip(wanted, spread(wanted, gap, 0.0, 1.0), entries):
        if abs(at - y) > gap / 3:
            ax.plot([1.0, 1.012], [at, y], transform=ax.transAxes, color=color, lw=0.6, clip_on=False)
        ax.text(
            1.016,
            y,
            text,
            transform=ax.transAxes,
            color=text_color(color),
            size=size,
            va="center",
            ha="left",
            clip_on=False,
        )
