"""Owns the figure of learning-rate transfer: loss against LR for every size, and the best LR against the width, a column of
panels a parametrisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

from scaling_lab.analysis.studies.lr_transfer import TransferCell, drift
from scaling_lab.reporting.style import INK, log_axis, sequential_colours, significant

DEPTH_MARKERS = "osD^vP*X"
DEPTH_LINES = ("-", "--", ":", "-.")
# Runs this far above a size's best are not drawn: a diverging one would press all others to the floor.
SHOWN_NATS = 0.6


def transfer_height() -> float:
    """Inches that `lr_transfer` needs."""
    return 5.4


def lr_transfer(figure: Figure, cells: Sequence[TransferCell]) -> None:
    """Draw into an empty figure. Colours are widths, marks and line styles depths; a bar through a best LR is
    twice its standard error to either side."""
    kinds = list(dict.fromkeys(c.parametrization for c in cells))
    widths, depths = sorted({c.width for c in cells}), sorted({c.depth for c in cells})
    colour, _, _ = sequential_colours(widths)
    axes = figure.subplots(2, len(kinds), squeeze=False, sharey="row")
    rates = np.concatenate([c.peak_lr for c in cells])
    ends = [
        c.best_lr * np.exp(sign * 2 * (c.best_lr_log_error or 0.0))
        for c in cells
        if c.best_lr is not None
        for sign in (-1, 1)
    ]
    for column, kind in enumerate(kinds):
        top, bottom = axes[0, column], axes[1, column]
        for cell in (c for c in cells if c.parametrization == kind):
            mark = DEPTH_MARKERS[depths.index(cell.depth) % len(DEPTH_MARKERS)]
            line = DEPTH_LINES[depths.index(cell.depth) % len(DEPTH_LINES)]
            shade = colour(cell.width)
            near = cell.loss_nats < cell.floor_nats + SHOWN_NATS
            top.plot(cell.peak_lr[near], cell.loss_nats[near], line, color=shade, lw=1.0, marker=mark, ms=2.5)
            if cell.best_lr is None:
                continue
            span = _span(cell.best_lr, cell.best_lr_log_error)
            top.errorbar(
                cell.best_lr,
                cell.floor_nats,
                xerr=span,
                fmt=mark,
                ms=6,
                color=shade,
                mec=INK,
                mew=0.8,
                zorder=4,
            )
            # Depths side by side, so that their bars do not hide each other.
            beside = 1.04 ** (depths.index(cell.depth) - (len(depths) - 1) / 2)
            bottom.errorbar(
                cell.width * beside, cell.best_lr, yerr=span, fmt=mark, ms=5, color=shade, mec=INK, mew=0.6
            )
        for depth in depths:
            points = [
                (c.width, c.best_lr)
                for c in cells
                if c.parametrization == kind and c.depth == depth and c.best_lr is not None
            ]
            style = DEPTH_LINES[depths.index(depth) % len(DEPTH_LINES)]
            bottom.plot(*zip(*points) if points else ([], []), style, color=INK, lw=0.8, zorder=1)
        top.set_title(kind)
        log_axis(top, "x", float(rates.min()), float(rates.max()), _rate, most=4)
        log_axis(bottom, "x", widths[0] / 1.1, widths[-1] * 1.1, lambda w: f"{w:g}", most=4)
        bottom.xaxis.set_major_locator(FixedLocator(widths))
        bottom.xaxis.set_major_formatter(FixedFormatter([str(w) for w in widths]))
        top.set_xlabel("learning rate (base)")
        bottom.set_xlabel("width")
    axes[0, 0].set_ylabel("validation loss (nats)")
    axes[1, 0].set_ylabel("best learning rate")
    if ends:
        log_axis(axes[1, 0], "y", min(ends), max(ends), _rate, most=5)
    handles = [
        axes[0, 0].plot([], [], color=colour(w), lw=2, label=f"width {w}")[0] for w in widths
    ] + [
        axes[0, 0].plot(
            [], [], DEPTH_LINES[i % len(DEPTH_LINES)], color=INK, lw=0.8, ms=4,
            marker=DEPTH_MARKERS[i % len(DEPTH_MARKERS)], label=f"depth {d}",
        )[0]
        for i, d in enumerate(depths)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))


def transfer_words(cells: Sequence[TransferCell]) -> tuple[str, str]:
    """(caption, the same facts for a reader who cannot see the figure)."""
    moves = []
    for kind in dict.fromkeys(cell.parametrization for cell in cells):
        own = [cell for cell in cells if cell.parametrization == kind]
        factors = [(by, drift(own, by)) for by in ("width", "depth")]
        said = [f"{f:.2g} from the least to the largest {by}" for by, f in factors if f is not None]
        moves += [f"under {kind} by {' and '.join(said)}"] if said else []
    told = (
        f"The best rate moves by a factor, {'; '.join(moves)}." if moves else "No size has a best rate yet."
    )
    missing = sum(cell.best_lr is None for cell in cells)
    ends = f" {missing} have their least loss at the end of the rates tried, and no mark." if missing else ""
    return (
        "Above: the final loss of every size at each learning rate; the large mark is the best one, the bottom of the "
        "parabola through the least loss and its neighbours, with two standard errors from the spread of seeds. Below: "
        "the best one against the width. Rates are those of the base shape: a parametrisation transfers where the best "
        f"one stays. {told}{ends}",
        f"Loss against learning rate, and the best against the width, of {len(cells)} sizes and parametrisations. {told}",
    )


def _span(rate: float, log_error: float | None) -> list[list[float]] | None:
    """Two standard errors below and above, as matplotlib wants them."""
    if log_error is None:
        return None
    return [[rate * (1 - np.exp(-2 * log_error))], [rate * (np.exp(2 * log_error) - 1)]]


def _rate(value: float) -> str:
    return significant(value, 2)
