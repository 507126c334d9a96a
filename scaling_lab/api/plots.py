"""The figures of an analysis on matplotlib axes: those of the report, to be combined with your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scaling_lab.analysis.analysis import Analysis
    from scaling_lab.analysis.finding import Finding


class Plots:
    """`analysis.plot`: each method draws one figure and returns its axes.

    Without `ax` a new figure is made, in the report's style; with it the axes given are drawn on, in theirs. All raise
    `UserError` where these data do not allow the figure, with the reason.

    >>> analysis.plot.isoflop().get_xlabel()
    'parameters N'
    """

    def __init__(self, analysis: Callable[[], Analysis], finding: Callable[[str], Finding]) -> None:
        self._open, self._finding = analysis, finding

    def envelope(self, ax: Axes | None = None) -> Axes:
        """Loss (nats per token) against training FLOPs: every run's curve and, in bold, their lower envelope."""
        from scaling_lab.reporting.figures_curves import loss_vs_flops

        analysis = self._open()
        with drawing_on(ax, height=4.2) as axes:
            loss_vs_flops(axes, analysis.points, analysis.estimates)
        return axes

    def isoflop(self, ax: Axes | None = None) -> Axes:
        """Loss (nats per token) against parameters, one valley for each compute budget, with its minimum."""
        from scaling_lab.analysis.estimate import BudgetStatus
        from scaling_lab.reporting.figures_frontier import isoflop_valleys

        analysis = self._open()
        estimate = analysis.estimate("isoflop")
        if all(b.status is BudgetStatus.TOO_FEW for b in estimate.budgets):
            raise UserError(f"plot.isoflop: {estimate.message}")
        tolerance = analysis.settings.approach.isoflop.budget_tolerance
        with drawing_on(ax, height=4.2) as axes:
            isoflop_valleys(axes, analysis.points, estimate, tolerance)
        return axes

    def frontier(self, ax: Any = None) -> Any:
        """The best parameters (above) and training tokens (below) against training FLOPs, with intervals.

        Args:
            ax: two axes.

        Returns:
            (2,) array of axes, parameters and tokens.
        """
        from scaling_lab.reporting.figures_frontier import frontier_scaling

        analysis = self._open()
        if all(e.frontier is None for e in analysis.estimates):
            raise UserError("plot.frontier: " + " ".join(e.message for e in analysis.estimates))
        with drawing_on(ax, height=6.6, rows=2) as axes:
            bands = {band.approach: band for band in analysis.bands}
            frontier_scaling(axes[0], axes[1], analysis.points, analysis.estimates, bands)
        return axes

    def parametric(self, ax: Axes | None = None) -> Axes:
        """Contours of the fitted law over tokens and parameters, the runs, and the efficient frontier."""
        from scaling_lab.reporting.figures_frontier import parametric_contour

        analysis = self._open()
        estimate = analysis.estimate("parametric")
        if not estimate.fits:
            raise UserError(f"plot.parametric: {estimate.message}")
        with drawing_on(ax, height=4.4) as axes:
            drawn = parametric_contour(axes, analysis.points, estimate)
        if not drawn:
            _discard(axes, ax)
            raise UserError(
                f"plot.parametric: law={estimate.law} has no contour over N and D: it depends on more than these two, or it "
                "is flat here."
            )
        return axes

    def residuals(self, ax: Any = None) -> Any:
        """Measured less fitted loss, percent, against parameters (left) and tokens (right).

        Args:
            ax: two axes.

        Returns:
            (2,) array of axes.
        """
        from scaling_lab.reporting.figures_checks import residuals

        analysis = self._open()
        estimate = analysis.estimate("parametric")
        if not estimate.fits:
            raise UserError(f"plot.residuals: {estimate.message}")
        with drawing_on(ax, height=2.9, columns=2) as axes:
            residuals(axes[0], axes[1], analysis.points, estimate.fits[0])
        return axes

    def sensitivity(self, ax: Axes | None = None) -> Axes:
        """The exponent a under every other choice that was tried, next to the analysis's own."""
        from scaling_lab.reporting.figure_list import forest_rows
        from scaling_lab.reporting.figures_checks import forest_height, sensitivity_forest

        analysis = self._open()
        rows = forest_rows(analysis)
        if len({row.label for row in rows}) < 2:
            raise UserError(
                "plot.sensitivity: no other choice was tried (sensitivity=False, or no approach has a frontier)."
            )
        intervals = {band.approach: band.interval("params_exponent") for band in analysis.bands}
        shaded = {name: None if i is None else (i.lo, i.hi) for name, i in intervals.items()}
        with drawing_on(ax, height=forest_height(rows)) as axes:
            sensitivity_forest(axes, rows, shaded)
        return axes

    def finding(self, study: str) -> Any:
        """The figure of what a study found, in a new figure.

        Returns:
            (panels,) array of axes.
        """
        import numpy as np

        from scaling_lab.reporting.finding_figures import draw_finding

        found = self._finding(study)
        if found.chart is None:
            raise UserError(f"plot.finding: study={study} has no figure. {found.reason or found.answer}")
        with new_figure(found.chart.height_inches) as figure:
            draw_finding(figure, found)
        return np.array(figure.axes, dtype=object)

    def __repr__(self) -> str:
        return "plot." + ", plot.".join(name for name in vars(type(self)) if not name.startswith("_"))


@contextmanager
def drawing_on(ax: Any, *, height: float, rows: int = 1, columns: int = 1) -> Iterator[Any]:
    """The axes to draw on: those given, or those of a new figure."""
    count = rows * columns
    if ax is not None:
        import numpy as np

        given = ax if count == 1 else np.ravel(np.asarray(ax, dtype=object))
        if not (hasattr(ax, "plot") if count == 1 else given.size == count):
            wanted = "matplotlib axes" if count == 1 else f"{count} matplotlib axes"
            raise UserError(f"ax={ax!r}: wanted {wanted}, or nothing for a new figure.")
        yield given
        return
    with new_figure(height) as figure:
        yield figure.subplots(rows, columns)


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """A new figure in the report's style, closed again after an error."""
    import matplotlib.pyplot as plt

    from scaling_lab.reporting.style import FIGURE_WIDTH, figure_style

    with figure_style():
        figure = plt.figure(figsize=(FIGURE_WIDTH, height))
        try:
            yield figure
        except BaseException:
            plt.close(figure)
            raise


def _discard(axes: Any, given: Any) -> None:
    if given is None:
        import matplotlib.pyplot as plt

        plt.close(axes.figure)
