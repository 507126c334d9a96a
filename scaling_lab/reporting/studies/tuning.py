"""Figure of the study `tuning`: ticks in powers of 2, and the sweep's own rate marked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from scaling_lab.analysis.finding import Finding
from scaling_lab.reporting.finding_figures import draw_panel, series_colors
from scaling_lab.reporting.style import INK, MUTED


def draw(finding: Finding, axes: Sequence[Axes]) -> None:
    """Loss above each cell's best against LR over the sweep's own: marks are runs, curves the fitted parabolas."""
    assert finding.chart is not None
    (ax,), (panel,) = axes, finding.chart.panels
    draw_panel(ax, panel, series_colors(finding.chart))
    ax.axvline(1.0, color=INK, lw=0.8)
    ax.axvspan(0.5, 2.0, color=MUTED, alpha=0.08, lw=0)
    rates = np.array([x for s in panel.series if s.kind == "points" for x in s.x if x], dtype=np.float64)
    powers = np.arange(np.floor(np.log2(rates.min())), np.ceil(np.log2(rates.max())) + 1)
    ax.xaxis.set_major_locator(FixedLocator([2.0**p for p in powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.legend(fontsize="small", ncols=2)
