"""Figure of the study `lr_transfer`: the legend of widths and depths below all panels, and the widths as ticks."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

from scaling_lab.analysis.finding import Finding
from scaling_lab.reporting.finding_figures import draw_panel, most_ticks, series_colors
from scaling_lab.reporting.style import INK, LINE_STYLES, MARKERS


def draw(finding: Finding, axes: Sequence[Axes]) -> None:
    """A column for each parametrization: loss against LR, and the best LR against the width."""
    chart = finding.chart
    assert chart is not None
    color_of = series_colors(chart)
    for panel, ax in zip(chart.panels, axes, strict=True):
        draw_panel(ax, panel, color_of, most_ticks(chart))
    sized = {s.scale: s for panel in chart.panels for s in panel.series if s.scale is not None}
    widths = sorted(sized)
    below = axes[chart.columns :]
    for ax in below:
        ax.xaxis.set_major_locator(FixedLocator(widths))
        ax.xaxis.set_major_formatter(FixedFormatter([f"{w:g}" for w in widths]))
    for row in (axes[: chart.columns], below):
        for ax in row[1:]:  # the rows share their y-axes
            ax.set_ylabel("")
            ax.tick_params(labelleft=False)
    depths = {s.marker: s.label for panel in chart.panels for s in panel.series if s.label}
    handles = [axes[0].plot([], [], color=color_of(sized[w]), lw=2, label=f"width {w:g}")[0] for w in widths]
    for marker, name in sorted(depths.items()):
        line, dot = LINE_STYLES[marker % len(LINE_STYLES)], MARKERS[marker % len(MARKERS)]
        handles += axes[0].plot([], [], line, color=INK, lw=0.8, ms=4, marker=dot, label=name)
    figure = axes[0].figure
    assert isinstance(figure, Figure)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
