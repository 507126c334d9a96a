"""The figure of `recipe=default` beside the published rules: learning rate and batch over model size and horizon.

    python scripts/recipe_rules.py        writes results/published/recipe_rules.png in a few seconds; trains nothing

Every curve is computed by the recipe of that name (`scaling_lab/planning/recipes/`). Points are what was measured here:
results/published/recipe_default.txt, recipe_join.txt, and the batches of results/LOG.md.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from scaling_lab.core.counts import Convention, train_flops
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.planning.recipes import deepseek, default, kaplan, porian, step_law
from scaling_lab.planning.recipes.base import Hyperparameters, SweepHorizons
from scaling_lab.reporting.style import ACCENTS, FAINT, FIGURE_WIDTH, INK, MUTED, figure_style, text_color
from scaling_lab.reporting.svg import to_png

PUBLISHED = Path(__file__).resolve().parent.parent / "results" / "published"
TOKENS_PER_PARAM = 20
FIXED_PARAMS = 1e8
# The best batch in tokens, B_opt = 2048 * 0.0306 D^0.383 (Bergsma et al. 2025, arXiv 2505.13738; coefficient from secondary
# sources). No recipe uses it.
BERGSMA_BATCH, BERGSMA_BATCH_EXPONENT = 2048 * 0.0306, 0.383
# Exponents of the best LR in D that contradict Step Law's: Filatov et al. 2025 (arXiv 2510.03871, Scion), Bjorck et al. 2024
# (arXiv 2409.19913, batch fixed; about).
SLOPE_STYLES, SLOPES_FROM_LR = ("-.", ":"), (6e-4, 4.2e-4)
FALLING_LR = (("Filatov et al. (Scion)", -0.28), ("Bjorck et al. (batch fixed)", -0.3))
# (horizon in tokens, best batch of the two or three that were tried, one seed): results/LOG.md, 2026-11-22.
MEASURED_BATCHES = ((405e3, 256), (145e3, 128), (1.16e6, 512), (6.6e6, 1024))


@dataclass(frozen=True)
class Rule:
    """One curve: a recipe, and where it was fitted (None: not limited)."""

    label: str
    color: str
    decide: Callable[[Any, float], Hyperparameters]
    params: tuple[float, float] | None = None
    tokens: tuple[float, float] | None = None
    flops: tuple[float, float] | None = None
    width: float = 1.3
    has_batch: bool = True
    batch_needs_size: bool = False

    def fitted(self, shape: GPTShape, tokens: float) -> bool:
        """Whether the rule was fitted (ours: measured) at this size and horizon."""
        compute = train_flops(shape.count().flops_per_token(Convention.DEEPSEEK_M), tokens)
        ranges = ((n_params(shape), self.params), (tokens, self.tokens), (compute, self.flops))
        return all(in_range(value, limits) for value, limits in ranges)


def in_range(value: float, limits: tuple[float, float] | None) -> bool:
    return limits is None or limits[0] <= value <= limits[1]


def recipe_rule(recipe: Any) -> Callable[[Any, float], Hyperparameters]:
    return lambda shape, tokens: recipe.decide(shape, tokens, SweepHorizons(tokens, tokens))


RULES = (
    Rule("Step Law", ACCENTS[0], recipe_rule(step_law.StepLawRecipe()), step_law.FITTED_PARAMS, step_law.FITTED_TOKENS),
    Rule(
        "DeepSeek", ACCENTS[1], recipe_rule(deepseek.DeepSeekRecipe()), flops=deepseek.FITTED_FLOPS, batch_needs_size=True
    ),
    Rule("Porian et al.", ACCENTS[2], recipe_rule(porian.PorianRecipe()), porian.FITTED_PARAMS, batch_needs_size=True),
    Rule("Kaplan et al.", ACCENTS[3], recipe_rule(kaplan.KaplanRecipe()), kaplan.FITTED_PARAMS, has_batch=False),
    Rule(
        "recipe=default", INK, recipe_rule(default.DefaultRecipe()), default.CALIBRATED_PARAMS, default.CALIBRATED_TOKENS,
        width=2.4,
    ),
)  # fmt: skip


def n_params(shape: GPTShape) -> float:
    """N with the head."""
    return shape.count().n_params(Convention.SIX_N_WITH_HEAD)


def ladder() -> list[GPTShape]:
    """Sizes of 5e3 to 1e9 parameters, bytes as vocabulary: two layers up to width 112, then width / depth = 40."""
    sizes = [(width, 2) for width in range(10, 114, 2)] + [(40 * depth, depth) for depth in range(3, 38)]
    return [GPTShape(width=w, depth=d, heads=1, vocab_size=256, context=64) for w, d in sizes]


def size_of(n: float) -> GPTShape:
    """The size of the ladder nearest in N."""
    return min(ladder(), key=lambda shape: abs(math.log(n_params(shape) / n)))


def draw_curve(
    axes: Axes, x: np.ndarray, y: np.ndarray, solid: np.ndarray, color: str, width: float = 1.3
) -> None:
    """A curve that is solid where `solid`, else dashed; the parts meet."""
    axes.plot(x, y, color=color, linewidth=0.75 * width, linestyle=(0, (3, 2)))
    axes.plot(x, np.where(solid, y, np.nan), color=color, linewidth=width)


def draw_rules(axes: tuple[Axes, Axes], x: np.ndarray, points: list[tuple[GPTShape, float]]) -> None:
    """LR and batch of every rule at (shape, tokens) `points`."""
    for rule in RULES:
        chosen = [rule.decide(shape, tokens) for shape, tokens in points]
        solid = np.array([rule.fitted(shape, tokens) for shape, tokens in points])
        sensible = np.array([tokens >= n_params(shape) for shape, tokens in points])
        lr = np.array([c.optimizer.peak_lr for c in chosen])
        draw_curve(axes[0], x, np.where(sensible, lr, np.nan), solid, rule.color, rule.width)
        if rule.has_batch:
            batch = np.array([c.rule_batch_tokens or np.nan for c in chosen])
            if rule.batch_needs_size:
                batch = np.where(sensible, batch, np.nan)
            else:
                solid = np.array([in_range(tokens, rule.tokens) for _, tokens in points])
            draw_curve(axes[1], x, batch, solid, rule.color, rule.width)
    tokens = np.array([d for _, d in points])
    far = tokens >= default.CRITICAL_BATCH_FROM_TOKENS
    draw_curve(axes[1], x, BERGSMA_BATCH * tokens**BERGSMA_BATCH_EXPONENT, far, ACCENTS[5])
    draw_curve(axes[1], x, np.array([default.critical_batch_tokens(d) for d in tokens]), far, ACCENTS[4])


def measured_rates() -> list[tuple[float, ...]]:
    """(N, best LR, low, high) of the sizes of results/published/recipe_default.txt."""
    own, shapes = default.DefaultRecipe(), {round(n_params(s)): s for s in ladder()}
    found = []
    for line in (PUBLISHED / "recipe_default.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*([\d.e+]+)\s+(\d+)\s+\d+\s+([\d.]+) \(([\d.]+) to ([\d.]+)\)", line)
        if match:
            flops, n, *ratios = (float(group) for group in match.groups())
            tokens = flops / 6 / n
            rule = own.decide(shapes[round(n)], tokens, SweepHorizons(tokens, tokens)).optimizer.peak_lr
            found.append((n, *(rule * ratio for ratio in ratios)))
    return found


@dataclass(frozen=True)
class JoinPoint:
    """The best LR at the rule's batch, and the best batch at the rule's LR (None: one batch), of a size of recipe_join.txt."""

    n: float
    tokens: float
    lr: float
    batch: float | None


def join_points() -> list[JoinPoint]:
    """The sizes of results/published/recipe_join.txt, on grids of factors of 2."""
    found = []
    for block in (PUBLISHED / "recipe_join.txt").read_text(encoding="utf-8").split("N = ")[1:]:
        header = re.match(r"([\d.e+]+) .*?D = ([\d.e+]+);", block)
        assert header is not None
        # Batch, over the rule's, LR, over the rule's, steps, loss, excess.
        rows = np.array([fields for line in block.splitlines() if len(fields := numbers(line)) == 7])
        at_batch, at_lr = rows[np.abs(rows[:, 1] - 1) < 0.2], rows[np.abs(rows[:, 3] - 1) < 0.01]
        best_lr = float(at_batch[at_batch[:, 5].argmin(), 2])
        best_batch = float(at_lr[at_lr[:, 5].argmin(), 0]) if len(at_lr) > 1 else None
        found.append(JoinPoint(float(header[1]), float(header[2]), best_lr, best_batch))
    return found


def numbers(line: str) -> list[float]:
    """The numbers of a table's row; empty for other lines."""
    try:
        return [float(word.replace(",", "")) for word in line.split()]
    except ValueError:
        return []


def draw_measured(lr_axes: Axes, batch_axes: Axes) -> None:
    """What was measured here."""
    for n, best, low, high in measured_rates():
        lr_axes.errorbar(
            n, best, [[best - low], [high - best]], fmt="o", color=INK, markersize=4, linewidth=1, zorder=5
        )
    batch_axes.plot(*np.array(MEASURED_BATCHES).T, "o", color=INK, markersize=4, zorder=5)
    hollow = {"color": INK, "markerfacecolor": "white", "markersize": 4.5, "zorder": 5}
    points = join_points()
    lr_axes.plot([p.n for p in points], [p.lr for p in points], "o", **hollow)
    tuned = [p for p in points if p.batch is not None]
    batch_axes.plot([p.tokens for p in tuned], [p.batch for p in tuned], "o", **hollow)


def draw_disputed_sign(axes: Axes) -> None:
    """Slopes of the best LR in D that contradict Step Law's, from an arbitrary point."""
    x = np.array([2e9, 5e10])
    for (_, exponent), style, start in zip(FALLING_LR, SLOPE_STYLES, SLOPES_FROM_LR, strict=True):
        axes.plot(x, start * (x / x[0]) ** exponent, color=MUTED, linestyle=style, linewidth=1.4)
    marks = (
        (2e10, 7e-3, step_law.LR_D_EXPONENT, ACCENTS[0]),
        (9e10, 1.2e-3, deepseek.LR_EXPONENT, ACCENTS[1]),
    )
    for tokens, lr, exponent, color in marks:
        axes.text(
            tokens,
            lr,
            f"$D^{{{exponent:+g}}}$",
            color=text_color(color),
            ha="right",
            va="bottom",
            fontsize=8.5,
        )


def shade_join(axes: Axes, low: float, high: float) -> None:
    """Where our rule passes over into the published ones."""
    axes.axvspan(low, high, color=FAINT, alpha=0.3, linewidth=0, zorder=0)


def draw(figure: Figure) -> None:
    """Four panels: LR above batch, over N at 20 tokens per parameter and over D at one size."""
    (lr_n, lr_d), (batch_n, batch_d) = figure.subplots(2, 2, sharey="row")
    shapes = ladder()
    over_n = [(shape, TOKENS_PER_PARAM * n_params(shape)) for shape in shapes]
    draw_rules((lr_n, batch_n), np.array([n_params(shape) for shape in shapes]), over_n)
    fixed = size_of(FIXED_PARAMS)
    horizons = np.geomspace(1e5, 1e11, 97)
    draw_rules((lr_d, batch_d), horizons, [(fixed, float(d)) for d in horizons])
    draw_measured(lr_n, batch_d)
    draw_disputed_sign(lr_d)
    at_optimum = [math.sqrt(flops / 6 / TOKENS_PER_PARAM) for flops in default.JOIN_FLOPS]
    shade_join(lr_n, *at_optimum)
    shade_join(lr_d, *(flops / 6 / n_params(fixed) for flops in default.JOIN_FLOPS))
    horizons_joined = (default.CALIBRATED_TOKENS[1], default.PUBLISHED_TOKENS)
    shade_join(batch_n, *(tokens / TOKENS_PER_PARAM for tokens in horizons_joined))
    shade_join(batch_d, *horizons_joined)
    for axes in (lr_n, lr_d, batch_n, batch_d):
        axes.set_xscale("log")
        axes.set_yscale("log")
    lr_n.set_title(f"over N, at D = {TOKENS_PER_PARAM} N")
    lr_d.set_title(f"over D, at N = {FIXED_PARAMS:.0e}".replace("e+0", "e"))
    lr_n.set_ylabel("peak LR")
    batch_n.set_ylabel("batch, tokens")
    batch_n.set_xlabel("N, parameters with the head")
    batch_d.set_xlabel("D, training tokens")
    lr_n.set_ylim(1e-4, 0.05)
    lr_d.set_xlim(n_params(fixed), 1e11)
    batch_n.set_ylim(60, 2e7)
    figure.legend(handles=legend_entries(), loc="outside lower center", ncol=3)


def legend_entries() -> list[Artist]:
    """Every curve and mark once."""
    curves = [(r.label, r.color) for r in reversed(RULES)]
    curves += [("Bergsma et al.: best batch", ACCENTS[5]), ("Bergsma et al.: critical batch", ACCENTS[4])]
    entries: list[Artist] = [Line2D([], [], color=color, label=label) for label, color in curves]
    entries += [
        Line2D([], [], color=MUTED, linestyle=style, label=f"{label}: $D^{{{exponent:g}}}$")
        for (label, exponent), style in zip(FALLING_LR, SLOPE_STYLES, strict=True)
    ]
    entries.append(Patch(color=FAINT, alpha=0.4, linewidth=0, label="the join of recipe=default"))
    marks = [
        ("best measured here", INK),
        ("best of a grid of factors of 2", "white"),
    ]
    entries += [
        Line2D([], [], color=INK, linestyle="", marker="o", markersize=4, markerfacecolor=face, label=label)
        for label, face in marks
    ]
    return entries


def main() -> int:
    with figure_style():
        figure = Figure(figsize=(FIGURE_WIDTH, 5.6))
        draw(figure)
        (PUBLISHED / "recipe_rules.png").write_bytes(to_png(figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
