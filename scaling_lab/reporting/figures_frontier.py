"""Figures of the answer: IsoFLOP valleys, N_opt and D_opt against compute, the parametric contour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_lab.analysis.approaches.isoflop.valleys import Valley, split_valleys
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import (
    Array,
    BudgetOptimum,
    BudgetStatus,
    Estimate,
    Frontier,
)
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.text import SHORT_APPROACH_NAMES, format_count, format_flops
from scaling_lab.reporting.style import (
    APPROACH_COLORS,
    APPROACH_MARKERS,
    INK,
    MUTED,
    halo,
    log_axis,
    margin_labels,
    sequential_colors,
    size_bar,
    text_color,
)

# Hoffmann et al. 2022 (arXiv 2203.15556): about 20 training tokens a parameter.
CHINCHILLA_TOKENS_PER_PARAM = 20.0
# Slopes of the papers, drawn through our own center: Kaplan et al. 2020 (arXiv 2001.08361) N ~ C^.73; Hoffmann et al.
# 2022, table 2, approach 1, N ~ C^.50.
REFERENCE_PARAMS_EXPONENTS = (("Kaplan's slope", 0.73), ("Chinchilla's slope", 0.50))
# How far beyond the largest compute the frontier is drawn, dashed, as extrapolation.
EXTRAPOLATION_DRAWN = 4.0
# Up to so many budgets are named one by one; more are shown by a color bar.
NAMED_BUDGETS = 8
# Losses over more than this factor are drawn on a logarithmic axis, or the low valleys would be flat.
LOG_LOSS_RATIO = 1.8
# How far the contour goes beyond the sampled sizes and tokens, a factor.
CONTOUR_MARGIN = 1.6


def isoflop_valleys(
    ax: Axes, observations: Observations, estimate: Estimate, tolerance: float = 0.10
) -> dict[str, int]:
    """Loss against N, one curve a budget, each with its fitted minimum (or, dashed, why there is none).

    Of runs that were recounted (their plan's budgets are of another convention) the points are those that the approach
    fitted, their losses moved to one cost a budget. `tolerance`: the approach's `budget_tolerance`.

    Returns how many budgets are drawn, how many have a minimum, and how many have too few sizes to draw.
    """
    shown = [b for b in estimate.budgets if b.status is not BudgetStatus.TOO_FEW]
    few = len(estimate.budgets) - len(shown)
    moved = _moved(observations, tolerance)
    seen = [_points_of(b, observations, moved) for b in shown]
    shown, seen = [b for b, (n, _) in zip(shown, seen) if n.size], [v for v in seen if v[0].size]
    if not shown:
        ax.text(0.5, 0.5, "no budget has enough sizes", transform=ax.transAxes, ha="center", color=MUTED)
        return {"budgets": 0, "ok": 0, "too_few": few}
    color, norm, colors = sequential_colors([b.budget_flops for b in shown])
    sizes, losses = (np.concatenate([v[i] for v in seen]) for i in (0, 1))
    log_axis(ax, "x", float(sizes.min()), float(sizes.max()), format_count)
    fits = [b.fit_loss for b in shown if b.fit_loss is not None]
    low = min(float(losses.min()), *(float(f.min()) for f in fits)) if fits else float(losses.min())
    high = float(losses.max())
    if low > 0 and high > LOG_LOSS_RATIO * low:  # a curve through nonsense may dip below zero
        log_axis(ax, "y", low * (low / high) ** 0.06, high, lambda v: f"{v:g}")
    else:
        span = max(high - low, 1e-3 * high)  # equal losses still need an axis
        ax.set_ylim(low - 0.125 * span, high + 0.05 * span)
    named = len(shown) <= NAMED_BUDGETS
    names: list[tuple[float, str, Any]] = []
    for budget, (n, loss) in zip(shown, seen):
        names.append(_valley(ax, n, loss, budget, color(budget.budget_flops)))
    minima = [b for b in shown if b.status is BudgetStatus.OK]
    if minima:
        x = np.array([b.params_opt for b in minima], dtype=np.float64)
        y = np.array([b.loss_opt for b in minima], dtype=np.float64)
        ax.plot(x, y, color=MUTED, lw=0.9, ls=(0, (1, 2)), zorder=2)
    if named:
        margin_labels(ax, names)
    else:
        size_bar(ax, norm, colors, format_flops, "training FLOPs")
    ax.set_xlabel("parameters N")
    ax.set_ylabel("final loss (nats per token)")
    if named:
        _name_minima(ax, [(b, color(b.budget_flops)) for b in minima], sizes, losses)
    return {"budgets": len(shown), "ok": len(minima), "too_few": few}


def _moved(observations: Observations, tolerance: float) -> list[Valley] | None:
    """What the approach fitted, where that is not the runs' losses as they are; None where it is."""
    return None if observations.budgets_match_convention else split_valleys(observations, tolerance)[0]


def _points_of(
    budget: BudgetOptimum, observations: Observations, moved: Sequence[Valley] | None
) -> tuple[Array, Array]:
    """(runs,) N and loss of a budget's points; empty where no run lies on it."""
    if moved is None:
        points = observations.with_budgets()
        at = np.isclose(points.budget_flops, budget.budget_flops, rtol=1e-6)
        return points.n_params[at], points.loss_nats[at]
    for valley in moved:
        if np.isclose(valley.budget_flops, budget.budget_flops, rtol=1e-6):
            return np.exp(valley.log_n), valley.loss
    return np.empty(0), np.empty(0)


# Where the name of a minimum may stand, in points from its star, the best place first.
_NAME_PLACES = (
    (0, -13),
    (0, -22),
    (0, 14),
    (0, 24),
    (-38, -9),
    (38, -9),
    (-38, 9),
    (38, 9),
    (0, -32),
    (0, 36),
)
_NAME_SIZE = 7.5


def _name_minima(ax: Axes, minima: Sequence[tuple[BudgetOptimum, Any]], n: Array, loss: Array) -> None:
    """Write N_opt at every star, at the first place where it covers no point, star or other name."""
    if isinstance(ax.figure, Figure):
        ax.figure.draw_without_rendering()  # the layout decides what lies beneath a text
    unit = ax.figure.dpi / 72.0
    stars = [(float(b.params_opt or 0), float(b.loss_opt or 0)) for b, _ in minima]
    taken = ax.transData.transform([*zip(n, loss), *stars]) / unit
    low_y = ax.transAxes.transform((0.0, 0.0))[1] / unit
    for (budget, shade), star in zip(minima, stars):
        text = f"N = {format_count(float(budget.params_opt or 0))}"
        # Half the text's width and height, and the radius of a point.
        half = np.array([0.29 * _NAME_SIZE * len(text), 0.5 * _NAME_SIZE]) + 2.5
        center = ax.transData.transform(star) / unit
        covered = [
            int(np.all(np.abs(taken - (center + place)) < half, axis=1).sum())
            + 100 * int(center[1] + place[1] - half[1] < low_y)
            for place in _NAME_PLACES
        ]
        place = _NAME_PLACES[int(np.argmin(covered))]
        ax.annotate(
            text, star, place, textcoords="offset points", ha="center", va="center", size=_NAME_SIZE,
            color=text_color(shade), path_effects=halo(), zorder=6,
        )  # fmt: skip
        corners = np.array([(i, j) for i in (-0.7, 0.0, 0.7) for j in (-0.5, 0.5)]) * half
        taken = np.vstack([taken, center + place + corners])


def _valley(ax: Axes, n: Array, loss: Array, budget: BudgetOptimum, shade: Any) -> tuple[float, str, Any]:
    """One budget's points, fit and minimum; returns the height, text and color of its name."""
    ax.plot(n, loss, "o", color=shade, ms=4.2, mec="white", mew=0.5, zorder=3)
    ok = budget.status is BudgetStatus.OK
    end = float(loss[np.argmax(n)])
    if budget.fit_loss is not None and budget.fit_log_params is not None:
        x, y = np.exp(budget.fit_log_params)[::2], budget.fit_loss[::2]
        ax.plot(x, y, color=shade, lw=1.3, ls="-" if ok else (0, (4, 3)), alpha=0.9, zorder=2)
        end = float(y[-1])
    name = format_flops(budget.budget_flops)
    if not ok:
        return end, f"{name} ({budget.status.value})", shade
    if budget.params_opt is not None and budget.loss_opt is not None:
        ax.plot(
            [budget.params_opt], [budget.loss_opt], "*", ms=11, color=shade, mec="white", mew=0.8, zorder=5
        )
    return end, name, shade


def frontier_scaling(
    ax_n: Axes,
    ax_d: Axes,
    observations: Observations,
    estimates: Sequence[Estimate],
    bands: Mapping[str, Band] | None = None,
) -> dict[str, Any]:
    """N_opt and D_opt against training FLOPs: all approaches with their bands, 20 tokens a parameter, the papers' slopes.

    Solid within the range an approach has seen, dashed beyond. Returns what the caption needs: the FLOPs per parameter
    and token used for the 20-to-1 line, and the approaches drawn.
    """
    known = [(e, e.frontier) for e in estimates if e.frontier is not None]
    flops = observations.compute_flops
    lo = min([float(flops.min()), *(f.compute_range_flops[0] for _, f in known)])
    hi = max([float(flops.max()), *(f.compute_range_flops[1] for _, f in known)])
    # Costs differ from 6 N D for small models (attention, head): the line uses what these runs cost.
    per_param_token = float(np.median(flops / (observations.n_params * observations.n_tokens)))
    grid = np.geomspace(lo / 1.15, hi * EXTRAPOLATION_DRAWN, 60)
    ratio = CHINCHILLA_TOKENS_PER_PARAM
    n_20, d_20 = np.sqrt(grid / (ratio * per_param_token)), np.sqrt(grid * ratio / per_param_token)
    for ax, which, line_20 in ((ax_n, "params", n_20), (ax_d, "tokens", d_20)):
        entries = _scaling_panel(ax, which, grid, known, bands or {})
        ax.plot(grid, line_20, color=INK, lw=1.0, ls=(0, (6, 2, 1, 2)), zorder=1)
        entries.append((float(line_20[-1]), "20 tokens a parameter", INK))
        log_axis(ax, "x", float(grid[0]), float(grid[-1]), format_flops, margin=0.0)
        _limit_y(ax, which, grid, known, line_20)
        margin_labels(ax, entries)
    ax_n.set_ylabel("optimal parameters N")
    ax_d.set_ylabel("optimal tokens D")
    ax_d.set_xlabel("training FLOPs C")
    ax_n.tick_params(labelbottom=False)
    return {"flops_per_param_token": per_param_token, "approaches": [e.approach for e, _ in known]}


def _scaling_panel(
    ax: Axes, which: str, grid: Array, known: Sequence[tuple[Estimate, Frontier]], bands: Mapping[str, Band]
) -> list[tuple[float, str, Any]]:
    """Lines, points and bands of one quantity; returns the names to write at the right edge."""
    entries: list[tuple[float, str, Any]] = []
    center_c = float(np.sqrt(grid[0] * grid[-1] / EXTRAPOLATION_DRAWN))
    if known:
        center = float(np.exp(np.mean([np.log(getattr(f, which)(center_c)) for _, f in known])))
        for name, slope in REFERENCE_PARAMS_EXPONENTS:
            exponent = slope if which == "params" else 1.0 - slope
            reference = center * (grid / center_c) ** exponent
            ax.plot(grid, reference, color=MUTED, lw=0.7, zorder=1)
            entries.append((float(reference[-1]), f"{name} {exponent:.2f}", MUTED))
    for estimate, frontier in known:
        shade, law = APPROACH_COLORS[estimate.approach], getattr(frontier, which)
        low, high = frontier.compute_range_flops
        band = bands.get(estimate.approach)
        envelope = None if band is None else frontier_band(band, which, grid)
        if envelope is not None:
            ax.fill_between(grid, *envelope, color=shade, alpha=0.13, lw=0, zorder=1.5)
        seen = np.geomspace(low, high, 30)
        ax.plot(grid, law(grid), color=shade, lw=1.1, ls=(0, (4, 2.5)), zorder=3)
        ax.plot(seen, law(seen), color=shade, lw=1.8, zorder=3.5)
        points = frontier.params_opt if which == "params" else frontier.tokens_opt
        if estimate.approach != "parametric" and points.size <= 60:
            marker = APPROACH_MARKERS[estimate.approach]
            ax.plot(
                frontier.compute_flops, points, marker, color=shade, ms=4.6, mec="white", mew=0.6, zorder=4
            )
        name = SHORT_APPROACH_NAMES[estimate.approach]
        entries.append((float(law(grid[-1])), f"{name} {law.exponent:.2f}", shade))
    return entries


def frontier_band(band: Band, which: str, grid: Array) -> tuple[Array, Array] | None:
    """Lower and upper end (points,) of N_opt or D_opt ("params" or "tokens") over a grid of FLOPs, at the band's level;
    None where the band has fewer than 20 samples."""
    slope = band.samples.get(f"{which}_exponent")
    level = band.samples.get(f"{which}_log_coefficient")
    if level is None and f"{which}_coefficient" in band.samples:
        level = np.log(band.samples[f"{which}_coefficient"])
    if slope is None or level is None:
        return None
    good = np.isfinite(slope) & np.isfinite(level)
    if int(good.sum()) < 20:
        return None
    lines = level[good][:, None] + slope[good][:, None] * np.log(grid)
    tail = (1.0 - band.level) / 2.0
    lo, hi = np.quantile(lines, [tail, 1.0 - tail], axis=0)
    return np.exp(lo), np.exp(hi)


def _limit_y(
    ax: Axes, which: str, grid: Array, known: Sequence[tuple[Estimate, Frontier]], line_20: Array
) -> None:
    """Limits from the estimates and the 20-to-1 line: a band that is wide must not flatten the rest."""
    values = [line_20[[0, -1]], *(getattr(f, which)(grid[[0, -1]]) for _, f in known)]
    values += [f.params_opt if which == "params" else f.tokens_opt for _, f in known]
    everything = np.concatenate([np.atleast_1d(v) for v in values])
    everything = everything[np.isfinite(everything) & (everything > 0)]
    log_axis(ax, "y", float(everything.min()), float(everything.max()), format_count, margin=0.06, most=6)


def parametric_contour(ax: Axes, observations: Observations, estimate: Estimate) -> bool:
    """Contours of the fitted L(N, D) over tokens and parameters, the runs, lines of equal compute, and the frontier.

    Returns False (and draws nothing) where the fitted law is not a function of N and D alone, or is flat.
    """
    if not estimate.fits or estimate.law is None:
        return False
    fit = estimate.fits[0]
    law = get_law(fit.law)
    if not set(law.columns) <= {"n_params", "n_tokens"}:
        return False
    n, d = observations.n_params, observations.n_tokens
    grid_n = np.geomspace(n.min() / CONTOUR_MARGIN, n.max() * CONTOUR_MARGIN, 80)
    grid_d = np.geomspace(d.min() / CONTOUR_MARGIN, d.max() * CONTOUR_MARGIN, 80)
    columns = {"n_params": grid_n[:, None], "n_tokens": grid_d[None, :]}
    loss = np.broadcast_to(law.loss_nats(fit.parameters, columns), (80, 80))
    levels = _levels(loss, observations.loss_nats)
    if not levels.size:
        return False
    _, norm, colors = sequential_colors(levels)
    lines = ax.contour(grid_d, grid_n, loss, levels=levels, cmap=colors.reversed(), norm=norm, linewidths=0.9)
    _iso_flop_lines(ax, observations, estimate, grid_n)
    ax.plot(
        d, n, "o", color=INK, ms=2.8 if n.size <= 400 else 1.4, mec="white", mew=0.3, alpha=0.85, zorder=4
    )
    if estimate.frontier is not None:
        shade = APPROACH_COLORS["parametric"]
        c = np.geomspace(observations.compute_flops.min() / 10, observations.compute_flops.max() * 10, 200)
        x, y = estimate.frontier.tokens(c), estimate.frontier.params(c)
        ax.plot(x, y, color=shade, lw=2.2, zorder=5, path_effects=halo(3.6))
        inside = (x < grid_d[-1] / 2) & (y < grid_n[-1] / 2)
        if inside.any():
            at = np.flatnonzero(inside)[-1]
            ax.annotate(
                "efficient frontier",
                (x[at], y[at]),
                (-8, 2),
                textcoords="offset points",
                color=shade,
                size=8,
                ha="right",
                va="bottom",
                path_effects=halo(3),
                zorder=6,
            )
    log_axis(ax, "x", float(grid_d[0]), float(grid_d[-1]), format_count, margin=0.0)
    log_axis(ax, "y", float(grid_n[0]), float(grid_n[-1]), format_count, margin=0.0)
    names = ax.clabel(lines, fmt=lambda v: f"{v:g}", fontsize=7, inline=True, inline_spacing=2)
    for name in names:
        name.set_color(text_color(name.get_color()))
    ax.set_xlabel("training tokens D")
    ax.set_ylabel("parameters N")
    return True


def _levels(loss: Array, seen: Array) -> Array:
    """A dozen losses, denser near the bottom: equal steps in the logarithm of the loss above the lowest drawn.

    Empty where there is nothing to choose among: the law is flat, or far above every loss that was seen.
    """
    low, high = float(loss.min()), float(min(loss.max(), 1.6 * seen.max()))
    if not (low > 0 and high - low > 1e-6 * high):
        return np.empty(0)
    above = np.geomspace(0.04 * (high - low), high - low, 10)
    # As many decimals as keep the steps apart: labels such as 1.46, not 1.4603.
    decimals = max(2, int(np.ceil(-np.log10(above[0]))))
    return np.unique(np.round(low + above, decimals))


def _iso_flop_lines(ax: Axes, observations: Observations, estimate: Estimate, grid_n: Array) -> None:
    """Where training costs one budget's FLOPs: D = C / (FLOPs per token at N), from the runs' own costs."""
    budgets = np.unique(np.round(observations.with_budgets().budget_flops, 6))
    if budgets.size > 12:  # scattered runs have no budgets worth a line
        return
    sizes, first = np.unique(observations.n_params, return_index=True)
    per_token = (observations.compute_flops / observations.n_tokens)[first]
    # Beyond the sampled sizes the cost goes on in proportion to N.
    x = np.clip(grid_n, sizes[0], sizes[-1])
    cost = np.exp(np.interp(np.log(x), np.log(sizes), np.log(per_token))) * grid_n / x
    lowest_d = float(observations.n_tokens.min()) / CONTOUR_MARGIN
    for budget in budgets:
        d = budget / cost
        ax.plot(d, grid_n, color=MUTED, lw=0.7, ls=(0, (1, 2)), zorder=2)
        # Named near where the line leaves the picture, top left: the contours' own names are elsewhere.
        near = int(
            np.argmin(np.maximum(np.log(lowest_d * 1.25 / d), np.log(grid_n * 1.25 / grid_n[-1])) ** 2)
        )
        ax.annotate(
            format_flops(float(budget)),
            (d[near], grid_n[near]),
            color=MUTED,
            size=7,
            ha="center",
            va="center",
            path_effects=halo(),
            zorder=3,
            annotation_clip=True,
        )


__all__ = ["frontier_band", "frontier_scaling", "isoflop_valleys", "parametric_contour"]
