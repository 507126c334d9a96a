"""Owns the figure of optima per skill: the best number of parameters of every loss column, side by side."""

from __future__ import annotations

from matplotlib.axes import Axes

from scaling_lab.analysis.studies.skills import Skills
from scaling_lab.reporting.style import APPROACH_COLOURS, APPROACH_MARKERS, FAINT, format_count, log_axis


def height(skills: Skills) -> float:
    """Inches that `optima` needs."""
    return 1.1 + 0.42 * len(skills.columns)


def optima(ax: Axes, skills: Skills) -> None:
    """A row a loss column, a marker an approach, bars where there are intervals; N on a logarithmic axis."""
    labels = [s.column for s in skills.columns]
    approaches = [
        a
        for a in APPROACH_COLOURS
        if any(p is not None and p.approach == a for s in skills.columns for p in s.at_mean_compute)
    ]
    values: list[float] = []
    for i, skill in enumerate(skills.columns):
        y = len(labels) - 1 - i
        if i % 2 == 0:
            ax.axhspan(y - 0.5, y + 0.5, color=FAINT, alpha=0.22, lw=0, zorder=0)
        for p in skill.at_mean_compute:
            if p is None:
                continue
            at = y - 0.24 * (approaches.index(p.approach) - (len(approaches) - 1) / 2)
            colour, n = APPROACH_COLOURS[p.approach], p.params_opt
            values.append(n.estimate)
            if n.interval is not None and n.interval.lo > 0:
                ax.plot([n.interval.lo, n.interval.hi], [at, at], color=colour, lw=1.6, alpha=0.75, zorder=2)
                values += [n.interval.lo, n.interval.hi]
            ax.plot(
                [n.estimate], [at], APPROACH_MARKERS[p.approach], color=colour, ms=5, mec="white", mew=0.6
            )
    middle = sorted(values)[len(values) // 2]
    # An interval without end (a valley that some resamples do not show) must not shrink all others to a dot.
    inside = [v for v in values if middle / 1e3 < v < middle * 1e3]
    log_axis(ax, "x", min(inside), max(inside), format_count)
    for a in approaches:
        ax.plot(
            [],
            [],
            APPROACH_MARKERS[a],
            color=APPROACH_COLOURS[a],
            ms=5,
            label=a.replace("isoflop", "IsoFLOP"),
        )
    ax.set_yticks(range(len(labels) - 1, -1, -1), labels)
    ax.tick_params(axis="y", length=0, pad=8)
    ax.set_ylim(-0.6, len(labels) - 0.4)
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("best parameters N")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, borderaxespad=0.1)
