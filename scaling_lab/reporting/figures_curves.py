"""Figures of runs as they were trained: loss against compute with the envelope, and loss and LR over a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.text import format_count, format_flops
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.reporting.style import (
    APPROACH_COLORS,
    INK,
    halo,
    log_axis,
    sequential_colors,
    size_bar,
)

# More curves than this are ink without information, and a heavy file: the figure draws every k-th by size.
MAX_CURVES = 120
# Points drawn of one curve, spaced evenly in the axis' own scale.
MAX_POINTS = 140
# The beginning of training is irrelevant to the frontier: the axis starts this far below the cheapest run's end.
DECADES_BEFORE_FIRST_END = 1.0


def loss_vs_flops(ax: Axes, observations: Observations, estimates: Iterable[Estimate]) -> dict[str, int]:
    """Every run's loss against its training FLOPs, colored by N, with the lower envelope and its crossings.

    Returns how many runs have a curve and how many of them are drawn, for the caption.
    """
    curves = observations.curves
    end = np.full(observations.n_runs, 0.0)
    np.maximum.at(end, curves.run_index, curves.compute_flops)
    rows = np.bincount(curves.run_index, minlength=observations.n_runs)
    final = observations.points(observations.is_final)
    color, norm, colors = sequential_colors(observations.n_params)
    runs = np.flatnonzero(rows >= 2)
    drawn = _every_kth_by_size(runs, curves.run_index, curves.n_params)
    start_c = float(final.compute_flops.min()) / 10**DECADES_BEFORE_FIRST_END
    lines, shades = [], []
    order = np.lexsort((curves.compute_flops, curves.run_index))
    first = np.searchsorted(curves.run_index[order], np.arange(observations.n_runs + 1))
    top = float(final.loss_nats.max())
    for run in drawn:
        at = order[first[run] : first[run + 1]]
        at = at[curves.compute_flops[at] >= start_c]
        if at.size < 2:
            continue
        x, y = thin(curves.compute_flops[at], curves.loss_nats[at])
        lines.append(np.column_stack([x, y]))
        shades.append(color(float(curves.n_params[at[0]])))
        top = max(top, float(np.quantile(y, 0.9)))
    ax.add_collection(LineCollection(lines, colors=shades, linewidths=0.9, alpha=0.75))
    dots = final.compute_flops, final.loss_nats
    size = 16 if final.n_points <= 400 else 5
    ax.scatter(
        *dots, s=size, c=[color(n) for n in final.n_params], linewidths=0.5, edgecolors="white", zorder=4.5
    )
    _envelope(ax, estimates)
    low = float(min(final.loss_nats.min(), min((line[:, 1].min() for line in lines), default=np.inf)))
    log_axis(ax, "x", start_c if lines else float(dots[0].min()), float(end.max()), format_flops)
    log_axis(ax, "y", low, top, lambda v: f"{v:g}", margin=0.06)
    ax.set_xlabel("training FLOPs")
    ax.set_ylabel("loss (nats per token)")
    size_bar(ax, norm, colors, format_count, "parameters N")
    return {"curves": int(runs.size), "drawn": len(lines), "runs": observations.n_runs}


def _envelope(ax: Axes, estimates: Iterable[Estimate]) -> None:
    """The lower envelope as a line, and the points of it that are regressed."""
    for estimate in estimates:
        if estimate.approach != "envelope" or "compute_flops" not in estimate.details:
            continue
        c, loss = estimate.details["compute_flops"], estimate.details["loss_nats"]
        label = "lower envelope"
        ax.plot(
            *thin(np.asarray(c), np.asarray(loss)),
            color=INK,
            lw=1.5,
            zorder=4,
            path_effects=halo(3.0),
            label=label,
        )
        frontier = estimate.frontier
        if frontier is not None and 0 < frontier.compute_flops.size <= 60:
            ax.plot(
                frontier.compute_flops,
                frontier.loss_opt,
                "o",
                color=APPROACH_COLORS["envelope"],
                mec="white",
                mew=0.7,
                ms=6,
                zorder=5,
                label="where the best size changes",
            )
        ax.legend(loc="upper right")


def training_curves(ax_loss: Axes, ax_lr: Axes, records: Sequence[RunRecord]) -> dict[str, int]:
    """Training loss (smoothed by eye's width), validation loss, and the LR schedule, over the share of each run done.

    Returns how many runs have a curve and how many are drawn.
    """
    runs = sorted((r for r in records if len(r.curve) >= 2), key=lambda r: r.spec.n_params())
    if not runs:
        return {"curves": 0, "drawn": 0}
    sizes = np.array([r.spec.n_params() for r in runs])
    color, norm, colors = sequential_colors(sizes)
    picked = runs[:: max(1, -(-len(runs) // MAX_CURVES))]
    lowest, starts = np.inf, []
    schedules: set[tuple[Any, ...]] = set()
    for record in picked:
        shade = color(record.spec.n_params())
        share, loss = _smoothed(record)
        if loss.size:
            ax_loss.plot(share, loss, color=shade, lw=0.8, alpha=0.8)
            lowest = min(lowest, float(loss[-1]), float(loss.min()))
            starts.append(float(np.interp(0.04, share, loss)))
        seen = [
            (p.step / record.spec.steps, p.val_loss_nats) for p in record.curve if p.val_loss_nats is not None
        ]
        if seen:
            x, y = (np.array(v) for v in zip(*seen))
            ax_loss.plot(x, y, "o", color=shade, ms=2.6, mec="white", mew=0.3)
            lowest = min(lowest, float(y.min()))
        if record.status is RunStatus.DIVERGED and loss.size:
            ax_loss.plot(share[-1:], loss[-1:], "x", color="#b00020", ms=7, mew=1.6, zorder=6)
        at, rate = (np.array(v) for v in zip(*((p.step / record.spec.steps, p.lr) for p in record.curve)))
        lr = thin(at, rate, 80, log_x=False)
        key = (tuple(np.round(lr[0], 2)), tuple(np.round(lr[1], 9)))
        if key not in schedules:
            schedules.add(key)
            ax_lr.plot(*lr, color=shade, lw=0.9)
    if starts:
        log_axis(ax_loss, "y", lowest, max(starts), lambda v: f"{v:g}", margin=0.05)
    rates = [p.lr for r in picked for p in r.curve if p.lr > 0]
    if rates:
        log_axis(
            ax_lr, "y", max(min(rates), max(rates) / 300), max(rates), lambda v: f"{v:g}", margin=0.08, most=5
        )
    for ax in (ax_loss, ax_lr):
        ax.set_xlim(0, 1.01)
    ax_loss.set_ylabel("loss (nats per token)")
    ax_lr.set_ylabel("learning rate")
    ax_lr.set_xlabel("share of the run done")
    ax_loss.tick_params(labelbottom=False)
    size_bar(ax_loss, norm, colors, format_count, "parameters N")
    return {"curves": len(runs), "drawn": len(picked)}


def thin(x: Array, y: Array, most: int = MAX_POINTS, *, log_x: bool = True) -> tuple[Array, Array]:
    """At most about `most` of the points of a line, evenly spaced along x, its first and last among them."""
    if x.size <= most:
        return x, y
    scale = np.log(x) if log_x else x
    wanted = np.linspace(scale[0], scale[-1], most)
    at = np.unique(np.clip(np.searchsorted(scale, wanted - 1e-12), 0, x.size - 1))
    return x[at], y[at]


def _smoothed(record: RunRecord, bins: int = 60) -> tuple[Array, Array]:
    """Training loss as means over equal shares of the run, so that the curve shows and not the batches."""
    points = [p for p in record.curve if p.train_loss_nats is not None and np.isfinite(p.train_loss_nats)]
    if not points:
        return np.empty(0), np.empty(0)
    share = np.array([p.step / record.spec.steps for p in points])
    loss = np.array([p.train_loss_nats for p in points], dtype=np.float64)
    at = np.minimum((share * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    kept = count > 0
    x, y = np.bincount(at, share, bins)[kept] / count[kept], np.bincount(at, loss, bins)[kept] / count[kept]
    # The last bin's mean lies before the end of the run: the curve continues to its last point's share.
    return x, y


def _every_kth_by_size(runs: Any, run_index: Any, n_params: Array) -> list[int]:
    if runs.size <= MAX_CURVES:
        return [int(r) for r in runs]
    size = np.zeros(int(run_index.max()) + 1)
    size[run_index] = n_params
    ordered = runs[np.argsort(size[runs], kind="stable")]
    return [int(r) for r in ordered[np.unique(np.linspace(0, ordered.size - 1, MAX_CURVES).astype(int))]]


__all__ = ["loss_vs_flops", "thin", "training_curves"]
