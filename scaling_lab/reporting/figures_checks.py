"""Figures that test the answer: residuals of the fitted law, sensitivity to choices, predicted against reached loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import FitResult
from scaling_lab.analysis.text import format_count, format_flops
from scaling_lab.reporting.style import (
    APPROACH_COLORS,
    APPROACH_MARKERS,
    FAINT,
    INK,
    MUTED,
    log_axis,
    sequential_colors,
    size_bar,
)


def residuals(ax_n: Axes, ax_d: Axes, observations: Observations, fit: FitResult) -> None:
    """How far each measured loss lies above (+) or below (-) the fitted law, in percent, against N and against D."""
    # residuals_log is ln L_fit - ln L: the sign is turned, because people ask how far the data are off.
    off = 100.0 * np.expm1(-fit.residuals_log)
    if off.size != observations.n_points:
        raise ValueError(f"{off.size} residuals for {observations.n_points} points")
    color, norm, colors = sequential_colors(observations.compute_flops)
    shades = [color(c) for c in observations.compute_flops]
    size = 20 if off.size <= 400 else 6
    reach = 1.12 * max(float(np.max(np.abs(off))), 0.05)
    for ax, x, name in (
        (ax_n, observations.n_params, "parameters N"),
        (ax_d, observations.n_tokens, "tokens D"),
    ):
        ax.axhline(0, color=INK, lw=0.8)
        ax.scatter(x, off, s=size, c=shades, edgecolors="white", linewidths=0.5, zorder=3)
        log_axis(ax, "x", float(x.min()), float(x.max()), format_count, most=6)
        ax.set_ylim(-reach, reach)
        ax.set_xlabel(name)
    ax_n.set_ylabel("measured minus fitted (% of loss)")
    ax_d.tick_params(labelleft=False)
    size_bar(ax_d, norm, colors, format_flops, "training FLOPs")


@dataclass(frozen=True)
class ForestRow:
    """One answer to the question under one choice: a line of the sensitivity figure."""

    label: str
    approach: str
    value: float
    interval: tuple[float, float] | None = None
    is_base: bool = False
    """The choice that the rest of the report uses."""


def forest_height(rows: Sequence[ForestRow]) -> float:
    """Inches that `sensitivity_forest` needs."""
    return 0.9 + 0.2 * len(dict.fromkeys(r.label for r in rows)) + 0.05 * len(rows)


def sensitivity_forest(
    ax: Axes, rows: Sequence[ForestRow], base: dict[str, tuple[float, float] | None]
) -> None:
    """The exponent of N under every choice: a row a choice, a marker an approach, bars where there are intervals.

    Args:
        base: interval of each approach under the report's own choices, shaded for comparison (None: not drawn).
    """
    labels = list(dict.fromkeys(r.label for r in rows))
    approaches = [a for a in APPROACH_COLORS if any(r.approach == a for r in rows)]
    height = {label: len(labels) - 1 - i for i, label in enumerate(labels)}
    for i in range(0, len(labels), 2):
        ax.axhspan(height[labels[i]] - 0.5, height[labels[i]] + 0.5, color=FAINT, alpha=0.22, lw=0, zorder=0)
    for approach in approaches:
        shaded = base.get(approach)
        if shaded is not None:
            ax.axvspan(*shaded, color=APPROACH_COLORS[approach], alpha=0.09, lw=0, zorder=0.5)
    limits = _limits([r.value for r in rows], [r.interval for r in rows])
    ax.set_xlim(*limits)
    for row in rows:
        rank = approaches.index(row.approach) - (len(approaches) - 1) / 2
        y, shade = height[row.label] - 0.24 * rank, APPROACH_COLORS[row.approach]
        if row.interval is not None:
            _bar(ax, row.interval, y, shade, limits)
        marker = APPROACH_MARKERS[row.approach]
        ax.plot([row.value], [y], marker, color=shade, ms=5, mec="white", mew=0.6, zorder=3)
    for approach in approaches:
        marker = APPROACH_MARKERS[approach]
        ax.plot(
            [],
            [],
            marker,
            color=APPROACH_COLORS[approach],
            ms=5,
            label=approach.replace("isoflop", "IsoFLOP"),
        )
    bold = {r.label for r in rows if r.is_base}
    ax.set_yticks([height[label] for label in labels], labels)
    for tick, label in zip(ax.get_yticklabels(), labels):
        if label in bold:
            tick.set_fontweight("bold")
    ax.tick_params(axis="y", length=0, pad=8)
    ax.set_ylim(-0.6, len(labels) - 0.4)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("exponent a of N_opt, N_opt grows as C to the a")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, borderaxespad=0.1)


def predicted_and_reached(
    ax: Axes, rows: Sequence[tuple[str, str, float, tuple[float, float] | None, float]]
) -> None:
    """Predictions for the budget that was left out, with the loss its runs reached: one row for each approach.

    Args:
        rows: (label, approach, predicted, its interval or None, reached), losses in nats per token.
    """
    limits = _limits([v for r in rows for v in (r[2], r[4])], [r[3] for r in rows])
    ax.set_xlim(*limits)
    for i, (_, approach, predicted, interval, reached) in enumerate(rows):
        y, shade = len(rows) - 1 - i, APPROACH_COLORS[approach]
        if interval is not None:
            _bar(ax, interval, y, shade, limits)
        ax.plot([predicted], [y], APPROACH_MARKERS[approach], color=shade, ms=5.5, mec="white", mew=0.6)
        ax.plot([reached], [y], "|", color=INK, ms=13, mew=1.6)
    ax.set_yticks(range(len(rows)), [r[0] for r in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.tick_params(axis="y", length=0, pad=8)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("loss (nats per token)")
    ax.plot([], [], "|", color=INK, ms=10, mew=1.6, label="reached")
    ax.plot([], [], "o", color=MUTED, ms=5, label="predicted without it")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1)


def _limits(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """Limits that include every value, and intervals up to the values' own spread beyond: a very wide one must not flatten
    the rest."""
    lo, hi = min(values), max(values)
    widths = sorted(b - a for a, b in (i for i in intervals if i is not None))
    room = max(0.25 * (hi - lo), widths[(len(widths) - 1) // 2] if widths else 0.0, 1e-3 * abs(hi), 1e-9)
    ends = [e for i in intervals if i is not None for e in i]
    lo, hi = min(lo, max(lo - room, min(ends, default=lo))), max(hi, min(hi + room, max(ends, default=hi)))
    margin = 0.06 * (hi - lo) or 0.06 * abs(hi)
    return lo - margin, hi + margin


def _bar(ax: Axes, interval: tuple[float, float], y: float, shade: str, limits: tuple[float, float]) -> None:
    """An interval as a line; an arrowhead at the edge where it goes on beyond the axes."""
    a, b = max(interval[0], limits[0]), min(interval[1], limits[1])
    ax.plot([a, b], [y, y], color=shade, lw=1.3, zorder=2, solid_capstyle="butt")
    if interval[0] < limits[0]:
        ax.plot([limits[0]], [y], "<", color=shade, ms=5, clip_on=False, zorder=2)
    if interval[1] > limits[1]:
        ax.plot([limits[1]], [y], ">", color=shade, ms=5, clip_on=False, zorder=2)
