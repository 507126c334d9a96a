"""The figures of a report: each drawn from the analysis or a finding, with a caption that says how to read it."""

from __future__ import annotations

import logging
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from scaling_lab.analysis.analysis import Analysis
from scaling_lab.analysis.estimate import BudgetStatus
from scaling_lab.analysis.finding import Finding
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.text import SHORT_APPROACH_NAMES, format_count, format_flops, format_loss
from scaling_lab.core.errors import STRICT_VARIABLE
from scaling_lab.core.record import RunRecord
from scaling_lab.reporting import (
    figures_checks,
    figures_curves,
    figures_frontier,
)
from scaling_lab.reporting.finding_figures import draw_finding
from scaling_lab.reporting.style import (
    FIGURE_WIDTH,
    figure_style,
)
from scaling_lab.reporting.svg import inline, on_white, to_png, to_svg


@dataclass(frozen=True)
class Drawn:
    """One figure in all its file formats."""

    name: str
    """File name without its ending, and the id in the page."""
    title: str
    caption: str
    alt: str
    """The same facts in words, for a reader who cannot see it."""
    inline_svg: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class NotDrawn:
    """A figure that cannot be drawn from these data, and why."""

    name: str
    title: str
    reason: str


ReportFigure = Drawn | NotDrawn

_log = logging.getLogger(__name__)

MINIMUM_WORDS = {
    "parabola": "a parabola in ln N",
    "cubic": "a cubic in ln N",
    "akima": "Akima's interpolation in ln N",
    "shared": "fitting all valleys with one shared shape",
}


def draw_figures(
    analysis: Analysis | None, records: Sequence[RunRecord], findings: Sequence[Finding] = ()
) -> list[ReportFigure]:
    """Every figure of the report, in its order."""
    figures: list[ReportFigure] = []
    if analysis is not None:
        draws = (_loss, _valleys, _scaling, _contour, _residuals, _backtest, _sensitivity)
        figures = [draw(analysis) for draw in draws]
    return [*figures, *draw_finding_figures(findings), _training(records)]


def draw_finding_figures(findings: Sequence[Finding]) -> list[ReportFigure]:
    """The figures of findings, from the findings alone."""
    return [_of_finding(finding) for finding in findings if finding.chart is not None]


def _finish(
    name: str, title: str, height: float, draw: Callable[[Figure], tuple[str, str] | str]
) -> ReportFigure:
    """Draw into a new figure. `draw` returns (caption, alt), or the reason why there is nothing to draw."""
    try:
        return _draw(name, title, height, draw)
    except Exception as error:
        if os.environ.get(STRICT_VARIABLE):
            raise
        # Hours of training and a good analysis must not be without a report because of one figure.
        _log.error("the figure %s could not be drawn", name, exc_info=error)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return NotDrawn(
            name, title, f"Drawing it failed ({what}). This is a bug in scaling-lab; please report it."
        )


def _draw(
    name: str, title: str, height: float, draw: Callable[[Figure], tuple[str, str] | str]
) -> ReportFigure:
    with figure_style():
        # Without pyplot: no window system is needed, and no global state is left behind.
        figure = Figure(figsize=(FIGURE_WIDTH, height))
        drawn = draw(figure)
        if isinstance(drawn, str):
            return NotDrawn(name, title, drawn)
        caption, alt = drawn
        svg = to_svg(figure)
        return Drawn(name, title, caption, alt, inline(svg, name, alt), on_white(svg), to_png(figure))


def _loss(analysis: Analysis) -> ReportFigure:
    def draw(figure: Figure) -> tuple[str, str]:
        points = analysis.points
        shown = figures_curves.loss_vs_flops(figure.add_subplot(), points, analysis.estimates)
        envelope = analysis.estimate("envelope")
        some = (
            ""
            if shown["drawn"] == shown["curves"]
            else f" {shown['drawn']} of {shown['curves']} curves are drawn."
        )
        if not shown["curves"]:
            return (
                "Each point is one run's final loss and compute. There are no curves in these data (one row a run), "
                "so Approach 1, the envelope, cannot be applied. Fewer FLOPs for the same loss are better.",
                f"Scatter of final loss against training FLOPs for {shown['runs']} runs.",
            )
        kind = points.curves.kind
        usable = (
            f" {envelope.message}"
            if envelope.frontier is not None
            else f" Not usable here: {envelope.message}"
        )
        return (
            f"Each line is one run ({kind}), and its end is its final loss. The loss of a small model (violet) falls early "
            "and then flattens; that of a large one (green) falls later and ends lower. The thick line, the lower envelope, "
            "is the lowest loss at each compute among the runs still in training there; runs that have ended no longer "
            "count. Where it passes from one size to the next (blue marks), both sizes are equally good: those points are "
            f"Approach 1.{usable} The line steps up where the runs of one budget end.{some}",
            f"Loss against training FLOPs of {shown['runs']} runs on logarithmic axes, colored by size, with their "
            f"lower envelope, which falls from {format_loss(float(points.curves.loss_nats.max()))} to "
            f"{format_loss(float(points.loss_nats.min()))} nats.",
        )

    return _finish("loss_vs_flops", "Loss against compute", 4.2, draw)


def _valleys(analysis: Analysis) -> ReportFigure:
    estimate = analysis.estimate("isoflop")

    def draw(figure: Figure) -> tuple[str, str] | str:
        if all(b.status is BudgetStatus.TOO_FEW for b in estimate.budgets):
            return estimate.message
        isoflop = analysis.settings.approach.isoflop
        shown = figures_frontier.isoflop_valleys(
            figure.add_subplot(), analysis.points, estimate, isoflop.budget_tolerance
        )
        if not shown["budgets"]:
            return f"There is nothing to draw: no run lies on a budget with enough sizes. {estimate.message}"
        minimum = isoflop.minimum
        how = MINIMUM_WORDS.get(minimum, f"the method {minimum!r}")
        found = [
            f"{format_flops(b.budget_flops)} FLOPs: N = {format_count(b.params_opt)}, "
            f"loss {format_loss(b.loss_opt)}"
            for b in estimate.budgets
            if b.status is BudgetStatus.OK and b.params_opt is not None and b.loss_opt is not None
        ]
        rest = (
            ""
            if shown["ok"] == shown["budgets"]
            else " A dashed curve has no usable minimum; its label gives the reason."
        )
        few = f" {shown['too_few']} budget(s) with too few sizes are not drawn." if shown["too_few"] else ""
        moved = (
            ""
            if analysis.points.budgets_match_convention
            else " The budgets were planned under another way of counting: each run's loss is shown shifted to its "
            "budget's mean compute along the fitted law, as the approach used it."
        )
        return (
            "Each curve is one compute budget, spent on models of different sizes. A model that is too small (left) cannot "
            "make use of its many tokens; one that is too large (right) gets too few. The minimum of the valley between "
            f"them (star) is the best size for that budget, found by {how}. It moves right as the budget grows; how fast is "
            f"the exponent a of Approach 2.{rest}{few}{moved}",
            "IsoFLOP valleys, final loss against parameters. Minima at "
            + ("; ".join(found) or "no budget")
            + ".",
        )

    return _finish("isoflop_valleys", "IsoFLOP valleys", 4.2, draw)


def _scaling(analysis: Analysis) -> ReportFigure:
    def draw(figure: Figure) -> tuple[str, str] | str:
        if all(e.frontier is None for e in analysis.estimates):
            return "No approach gave a frontier: " + " ".join(e.message for e in analysis.estimates)
        ax_n, ax_d = figure.subplots(2, 1)
        bands = {b.approach: b for b in analysis.bands}
        used = figures_frontier.frontier_scaling(ax_n, ax_d, analysis.points, analysis.estimates, bands)
        level = f"{analysis.settings.bootstrap.level:.0%}"
        slopes = [
            f"{SHORT_APPROACH_NAMES[e.approach]}: N as C^{e.frontier.params.exponent:.3f}, "
            f"D as C^{e.frontier.tokens.exponent:.3f}"
            for e in analysis.estimates
            if e.frontier is not None
        ]
        return (
            "The answer: the model size (above) and number of tokens (below) that make the best use of a given amount of "
            "compute. The axes are logarithmic, so a power law is a straight line whose slope is its exponent, written "
            f"after its name. Lines are solid where there are data and dashed beyond; the {level} interval is shaded. Points "
            "are the envelope's crossings and the valleys' minima. Thin lines have the slopes of Kaplan et al. 2020 and "
            "Hoffmann et al. 2022 (Chinchilla), drawn through the middle of ours: compare slopes, not heights. The "
            "dash-dotted line is 20 tokens per parameter at the compute of these runs, "
            f"{used['flops_per_param_token']:.3g} FLOPs per parameter and token.",
            "Compute-optimal parameters and tokens against training FLOPs. " + "; ".join(slopes) + ".",
        )

    return _finish("frontier_scaling", "Optimal size and tokens against compute", 6.6, draw)


def _contour(analysis: Analysis) -> ReportFigure:
    estimate = analysis.estimate("parametric")

    def draw(figure: Figure) -> tuple[str, str] | str:
        if not estimate.fits:
            return estimate.message
        if not figures_frontier.parametric_contour(figure.add_subplot(), analysis.points, estimate):
            if set(get_law(estimate.fits[0].law).columns) <= {"n_params", "n_tokens"}:
                return "The fitted law is flat over these sizes and tokens, or far from their losses: there is nothing to draw."
            return f"The fitted law, {estimate.law}, depends on more than N and D: it has no contour over the two."
        shown = ", ".join(f"{k} = {v:.4g}" for k, v in estimate.fits[0].parameters.items())
        return (
            "Approach 3: one formula fitted to all runs (dots). Each solid line is a contour of "
            "the loss written on it. Along each dotted line training takes the same compute, one budget per line. The best "
            "split of a budget is where its dotted line touches the lowest loss; the thick line, the efficient frontier, "
            "joins these points.",
            f"Contours of the fitted loss over tokens and parameters with the runs and the frontier. {shown}.",
        )

    return _finish("parametric_contour", "The fitted law and its efficient frontier", 4.4, draw)


def _residuals(analysis: Analysis) -> ReportFigure:
    estimate = analysis.estimate("parametric")

    def draw(figure: Figure) -> tuple[str, str] | str:
        if not estimate.fits:
            return estimate.message
        fit = estimate.fits[0]
        ax_n, ax_d = figure.subplots(1, 2)
        figures_checks.residuals(ax_n, ax_d, analysis.points, fit)
        worst = 100 * float(abs(fit.residuals_log).max())
        return (
            "Residuals: how far each run's loss is above or below the formula. Those of a good fit scatter about zero "
            "without a pattern, as widely as seeds do. A bend or a slope means that the law is wrong for these runs and "
            f"should not be extrapolated. The largest residual is {worst:.2f}%.",
            f"Residuals of the parametric fit in percent against parameters and tokens; the largest is {worst:.2f}%.",
        )

    return _finish("residuals", "What the law does not explain", 2.9, draw)


def _backtest(analysis: Analysis) -> ReportFigure:
    rows = []
    for test in analysis.backtest:
        loss = test.predicted.loss_opt if test.predicted is not None else None
        if loss is not None:
            reached = test.best_sampled_loss_nats
            span = None if loss.interval is None else (loss.interval.lo, loss.interval.hi)
            rows.append((SHORT_APPROACH_NAMES[test.approach], test.approach, loss.estimate, span, reached))

    def draw(figure: Figure) -> tuple[str, str] | str:
        if not rows:
            why = " ".join(t.message for t in analysis.backtest)
            return why or "A backtest needs at least two budgets, the largest of them with three runs."
        figures_checks.predicted_and_reached(figure.add_subplot(), rows)
        predicted = "; ".join(f"{r[0]} {format_loss(r[2])}" for r in rows)
        return (
            "Each approach was fitted again without the largest budget, "
            f"{format_flops(analysis.backtest[0].budget_flops)} FLOPs, and predicted the best loss there. Its prediction "
            "(with its interval) is compared with the loss that the runs of that budget reached (vertical bar). An arrow "
            "means that the interval continues beyond the figure.",
            f"Predicted against reached loss at the largest budget: {predicted}; reached {format_loss(rows[0][4])} nats.",
        )

    return _finish("backtest", "Predicted and reached", 0.95 + 0.33 * max(2, len(rows)), draw)


def _sensitivity(analysis: Analysis) -> ReportFigure:
    rows = forest_rows(analysis)

    def draw(figure: Figure) -> tuple[str, str] | str:
        if len({r.label for r in rows}) < 2:
            return "No other choice was tried (sensitivity is off, or no approach has a frontier)."
        base = {
            b.approach: None if (i := b.interval("params_exponent")) is None else (i.lo, i.hi)
            for b in analysis.bands
        }
        figures_checks.sensitivity_forest(figure.add_subplot(), rows, base)
        values = [r.value for r in rows]
        return (
            "The same analysis with one choice changed at a time. The first row is this report; the shaded columns are "
            "its intervals. A choice that moves an exponent out of its column matters more than the error bar, and should "
            "be stated wherever the exponent is quoted. An arrow means that an interval continues beyond the figure.",
            f"The exponent of N under {len({r.label for r in rows}) - 1} other choices, "
            f"from {min(values):.3f} to {max(values):.3f}.",
        )

    return _finish("sensitivity", "How much the choices matter", figures_checks.forest_height(rows), draw)


def forest_rows(analysis: Analysis) -> list[figures_checks.ForestRow]:
    """The rows of the sensitivity figure: the analysis itself, then every other choice that gave an exponent."""
    rows = []
    for estimate, band in zip(analysis.estimates, analysis.bands):
        if estimate.frontier is not None:
            interval = band.interval("params_exponent")
            span = None if interval is None else (interval.lo, interval.hi)
            rows.append(
                figures_checks.ForestRow(
                    "this report", estimate.approach, estimate.frontier.params.exponent, span, True
                )
            )
    for kind in ("convention", "data", "method", "influence"):
        for row in analysis.sensitivity:
            if row.kind == kind and row.params_exponent is not None:
                label = short_choice(row.choice)
                rows.append(figures_checks.ForestRow(label, row.approach, row.params_exponent))
    return rows


def short_choice(choice: str) -> str:
    """A choice as the figure's margin has room for it: no option path, no hash of a run id."""
    text = re.sub(r"^approach\.", "", choice)
    text = re.sub(r"^convention=", "counting ", text)
    text = re.sub(r"(run \S+?)-[0-9a-f]{10}$", r"\1", text)
    return "\n".join(textwrap.wrap(text, 40, max_lines=2, placeholder=" ..."))


def _of_finding(finding: Finding) -> ReportFigure:
    chart = finding.chart
    assert chart is not None

    def draw(figure: Figure) -> tuple[str, str]:
        draw_finding(figure, finding)
        return chart.caption, chart.alt

    return _finish(chart.name, chart.title, chart.height_inches, draw)


def _training(records: Sequence[RunRecord]) -> ReportFigure:
    def draw(figure: Figure) -> tuple[str, str] | str:
        if not any(len(r.curve) >= 2 for r in records):
            return "This needs the runs' own records with their curves; the analysis was made from a plain table."
        ax_loss, ax_lr = figure.subplots(2, 1, height_ratios=[3, 1.3])
        shown = figures_curves.training_curves(ax_loss, ax_lr, records)
        some = (
            ""
            if shown["drawn"] == shown["curves"]
            else f" {shown['drawn']} of {shown['curves']} runs are drawn."
        )
        return (
            "Every run from its first step to its last: training loss (line, averaged over short intervals) and loss on "
            "the validation set (dots). Below, the learning rate. Look here when a valley looks odd: a run that stops "
            "falling early, jumps, or ends in a red cross (diverged) was badly tuned, not badly sized. The last drop "
            f"comes from the falling learning rate: a run is only worth comparing at its end.{some}",
            f"Training curves and learning rates of {shown['curves']} runs.",
        )

    return _finish("training_curves", "The runs in training", 5.2, draw)
