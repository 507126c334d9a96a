"""Owns the figure of the reducible loss: what is left above a floor that is known, on log axes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from scaling_lab.analysis.studies.known_floor import KnownFloor
from scaling_lab.reporting.style import APPROACH_COLOURS, INK, MUTED, format_flops, format_loss, log_axis


def reducible_loss(ax: Axes, known: KnownFloor) -> None:
    """Loss less the true floor at each compute, the straight line where it is one, and the fitted floor's own version."""
    compute, reducible = known.compute_flops, known.reducible_nats
    ax.scatter(compute, reducible, s=16, color=INK, linewidths=0, zorder=3, label="loss less the true floor")
    lowest, highest = float(reducible.min()), float(reducible.max())
    if known.fitted_nats is not None:
        fitted = reducible + known.floor_nats - known.fitted_nats
        shown = fitted > 0
        highest = max(highest, float(fitted.max()))
        ax.plot(
            compute[shown], fitted[shown], color=APPROACH_COLOURS["parametric"], lw=1.0, alpha=0.8,
            label="loss less the fitted E",
        )  # fmt: skip
    line = known.line
    if line is not None:
        lo, hi = line.compute_range_flops
        inside = np.geomspace(lo, hi, 50)
        ax.plot(inside, line(inside), color=MUTED, lw=2.0, zorder=2, label=f"C^-{line.exponent:.3f}")
        beyond = np.geomspace(float(compute.min()), float(compute.max()), 100)
        ax.plot(beyond, line(beyond), color=MUTED, lw=0.8, ls=":", zorder=1)
        ends = line(np.array([compute.min(), compute.max()]))
        lowest, highest = min(lowest, float(ends[1])), max(highest, float(ends[0]))
    log_axis(ax, "x", float(compute.min()), float(compute.max()), format_flops)
    log_axis(ax, "y", lowest, highest, format_loss)
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel("reducible loss (nats)")
    ax.legend(loc="upper right")
