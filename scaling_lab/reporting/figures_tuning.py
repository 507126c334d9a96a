"""Owns the figure of the tuning debt: the loss against the learning rate at each tuned size, with its parabola."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from scaling_lab.analysis.studies.tuning import TunedCell, Tuning
from scaling_lab.analysis.studies.tuning_fit import debt_at
from scaling_lab.reporting.style import INK, MUTED, format_count, format_flops, sequential_colours


def learning_rate_bowls(ax: Axes, tuning: Tuning) -> None:
    """Loss above each cell's best against LR over the sweep's own: dots are runs, curves the fitted parabolas."""
    sizes = np.array([c.n_params for c in tuning.cells])
    colour, _, _ = sequential_colours(sizes)
    markers = dict(zip(sorted({c.budget_flops for c in tuning.cells}), "osD^vP"))
    lows, highs = [], []
    for cell in tuning.cells:
        x = cell.log_settings[:, 0]
        floor = _floor(cell)
        shade = colour(cell.n_params)
        ax.plot(
            np.exp(x), cell.loss_nats - floor, ls="", marker=markers.get(cell.budget_flops, "x"), ms=4.5, color=shade,
            mec="white", mew=0.5, label=f"N = {format_count(cell.n_params)}, {format_flops(cell.budget_flops)} FLOPs",
        )  # fmt: skip
        lows.append(float(x.min()))
        highs.append(float(x.max()))
        if cell.bowl is not None:
            best = float(cell.bowl.optimum[0, 0])
            grid = np.linspace(min(best, 0.0) - 0.85, max(best, 0.0) + 0.85, 80)
            offset = np.zeros((grid.size, cell.bowl.optimum.shape[1]))
            offset[:, 0] = grid - best
            ax.plot(np.exp(grid), debt_at(offset, cell.bowl.hessian[0]), color=shade, lw=1.2)
    ax.axvline(1.0, color=INK, lw=0.8)
    ax.axvspan(0.5, 2.0, color=MUTED, alpha=0.08, lw=0)
    ax.set_xscale("log")
    powers = np.arange(np.floor(min(lows) / np.log(2)), np.ceil(max(highs) / np.log(2)) + 1)
    ax.xaxis.set_major_locator(FixedLocator([2.0**p for p in powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_ylim(*_reach(tuning))
    ax.set_xlabel("learning rate / the sweep's own")
    ax.set_ylabel("loss above the best (nats)")
    ax.legend(fontsize="small", ncols=2)


def _floor(cell: TunedCell) -> float:
    """The loss at the bottom of the cell's parabola, or the least loss where it has none."""
    return float(cell.loss_nats.min()) if cell.bowl is None else cell.bowl.floor_nats


def _reach(tuning: Tuning) -> tuple[float, float]:
    """Room for what is within a factor of 4: a diverging run would press everything else to the floor."""
    seen = [
        loss - _floor(cell)
        for cell in tuning.cells
        for x, loss in zip(cell.log_settings[:, 0], cell.loss_nats)
        if abs(x) < np.log(4.1)
    ]
    top = max([0.05, *seen])
    return min([0.0, *seen]) - 0.05 * top, 1.1 * top
