"""Drawing the figure of a finding from its values: each series by its kind, unless the study has a drawing of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.finding import Axis, Chart, Finding, Panel, Series
from scaling_lab.analysis.text import number_format
from scaling_lab.reporting.studies import own_drawing
from scaling_lab.reporting.style import (
    ACCENTS,
    APPROACH_COLORS,
    APPROACH_MARKERS,
    FAINT,
    INK,
    LINE_STYLES,
    MARKERS,
    MUTED,
    log_axis,
    sequential_colors,
    size_bar,
)

_ROLES = {**APPROACH_COLORS, "ink": INK, "muted": MUTED}
_ColorOf = Callable[[Series], Any]


def draw_finding(figure: Figure, finding: Finding) -> None:
    """Draw the chart of a finding into an empty figure."""
    assert finding.chart is not None
    chart = finding.chart
    rows = math.ceil(len(chart.panels) / chart.columns)
    axes = figure.subplots(rows, chart.columns, squeeze=False).ravel()
    for ax in axes[len(chart.panels) :]:
        ax.remove()
    draw = own_drawing(finding.name) or draw_by_kind
    draw(finding, list(axes[: len(chart.panels)]))


def draw_by_kind(finding: Finding, axes: Sequence[Axes]) -> None:
    """Every panel of the finding's chart into its axes."""
    assert finding.chart is not None
    color_of = series_colors(finding.chart)
    for panel, ax in zip(finding.chart.panels, axes, strict=True):
        draw_panel(ax, panel, color_of, most_ticks(finding.chart))
        if any(s.label for s in panel.series):
            _legend(ax, panel)
    if finding.chart.scale_label:
        scales = _scales(finding.chart)
        _, norm, colors = sequential_colors(scales)
        size_bar(axes[-1], norm, colors, number_format(finding.chart.scale_form), finding.chart.scale_label)


def _legend(ax: Axes, panel: Panel) -> None:
    """Names of the series; above rows of categories, which leave no room among them."""
    if panel.y.categories:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, borderaxespad=0.1)
    else:
        ax.legend(loc="best")


def series_colors(chart: Chart) -> _ColorOf:
    """The color of a series: its role's, that of its place on the chart's scale, or the next accent."""
    scales = _scales(chart)
    by_scale = sequential_colors(scales)[0] if scales else None
    accents: Iterator[int] = count()
    given: dict[int, str] = {}

    def color_of(series: Series) -> Any:
        if series.color in _ROLES:
            return _ROLES[series.color]
        if series.color.isdigit():
            return ACCENTS[int(series.color) % len(ACCENTS)]
        if series.scale is not None and by_scale is not None:
            return by_scale(series.scale)
        if id(series) not in given:
            given[id(series)] = ACCENTS[next(accents) % len(ACCENTS)]
        return given[id(series)]

    return color_of


def _scales(chart: Chart) -> list[float]:
    return [s.scale for panel in chart.panels for s in panel.series if s.scale is not None]


def most_ticks(chart: Chart) -> int:
    """How many ticks of a logarithmic x-axis have room in one of its panels."""
    return max(3, 8 - 2 * chart.columns) if chart.columns > 1 else 7


def draw_panel(ax: Axes, panel: Panel, color_of: _ColorOf, most_x_ticks: int = 7) -> None:
    """The series, the axes with their ticks, and the title of one panel; no legend."""
    _set_axis(ax, "x", panel.x, panel.series, most_x_ticks)
    _set_axis(ax, "y", panel.y, panel.series)
    for series in panel.series:
        _draw_series(ax, series, color_of(series))
    if panel.title:
        ax.set_title(panel.title)


def _draw_series(ax: Axes, series: Series, color: Any) -> None:
    x, y, low, high = (_array(v) for v in (series.x, series.y, series.low, series.high))
    label = series.label or None
    marker = APPROACH_MARKERS.get(series.color, MARKERS[series.marker % len(MARKERS)])
    line = LINE_STYLES[series.marker % len(LINE_STYLES)]
    if series.kind == "band":
        ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0, label=label, zorder=1)
    elif series.kind == "line":
        ax.plot(x, y, line, color=color, lw=1.2, label=label, zorder=2)
    elif series.kind == "marked_line":
        ax.plot(x, y, line, color=color, lw=1.0, marker=marker, ms=3, label=label, zorder=2)
    else:
        if np.isfinite(low).any() or np.isfinite(high).any():
            center = x if series.error_axis == "x" else y
            bars = np.nan_to_num(np.stack([center - low, high - center]), nan=0.0)
            error: dict[str, Any] = {"xerr": bars} if series.error_axis == "x" else {"yerr": bars}
            ax.errorbar(x, y, fmt="none", ecolor=color, elinewidth=1.4, alpha=0.75, zorder=2, **error)
        ax.plot(x, y, ls="", marker=marker, color=color, ms=5, mec="white", mew=0.6, label=label, zorder=3)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _set_axis(ax: Axes, which: str, axis: Axis, series: Sequence[Series], most: int = 7) -> None:
    """Scale, limits, ticks and label of one axis, from what is drawn on it."""
    (ax.set_xlabel if which == "x" else ax.set_ylabel)(axis.label)
    if axis.categories:
        _name_categories(ax, which, axis)
        return
    set_limits = ax.set_xlim if which == "x" else ax.set_ylim
    if not axis.log:
        set_limits(axis.low, axis.high)
        return
    drawn = np.concatenate([np.empty(0), *(_extent(s, which) for s in series)])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    if not drawn.size:
        drawn = np.ones(1)
    low = float(drawn.min()) if axis.low is None else axis.low
    high = float(drawn.max()) if axis.high is None else axis.high
    log_axis(ax, which, low, high, number_format(axis.form), most=most)


def _extent(series: Series, which: str) -> Array:
    """Every value of a series along an axis, bars included."""
    values = [_array(series.x if which == "x" else series.y)]
    if series.error_axis == which:
        values += [_array(series.low), _array(series.high)]
    return np.concatenate(values)


def _name_categories(ax: Axes, which: str, axis: Axis) -> None:
    """Names instead of numbers, from the top down on a y-axis, every second row shaded."""
    n = len(axis.categories)
    if which == "x":
        ax.set_xticks(range(n), axis.categories)
        ax.set_xlim(-0.6, n - 0.4)
        return
    ax.set_yticks(range(n), axis.categories)
    ax.set_ylim(n - 0.4, -0.6)
    for i in range(0, n, 2):
        ax.axhspan(i - 0.5, i + 0.5, color=FAINT, alpha=0.22, lw=0, zorder=0)
    ax.tick_params(axis="y", length=0, pad=8)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
