"""The `isoflop` design: model sizes around a guessed optimum at each of several budgets (Chinchilla's Approach 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from scaling_lab.core.errors import UserError
from scaling_lab.planning.designs.base import RunRequest, ShapeMaker, check_budgets
from scaling_lab.planning.sizes import MIN_SIZES, Rungs, SizeLadder, Window, best_windows

# Factors in N that the sizes of a budget may span: both sides of a valley rise well above seed noise. The planner takes
# that for which the fewest sizes are missing.
SPANS = tuple(10 * 1.6 ** (k / 12) for k in range(13))


@dataclass(frozen=True)
class IsoFlopDesign:
    """For each budget, `sizes_per_budget` sizes evenly spaced in ln N over a factor `span` around the guessed optimum.

    Budgets share their sizes. The guess N_opt(C) = n_opt_at_1e12 * (C / 1e12)^n_opt_exponent only centers the window. All
    budgets' windows are centered alike, because off-center windows bias the parabola (Czech et al. 2026, arXiv 2603.22339).
    The runs of `noise_budget` are repeated with `noise_seeds` seeds, which measures the noise floor.
    """

    kind: ClassVar[str] = "isoflop"

    budgets_flops: tuple[float, ...] = (5e10, 2e11, 8e11)
    sizes_per_budget: int = 6
    sizes: SizeLadder = field(default_factory=SizeLadder)
    n_opt_at_1e12: float = 75e3
    n_opt_exponent: float = 0.5
    noise_seeds: int = 2
    noise_budget: int = 0
    """Index (from 0, ascending) of the budget that is run with `noise_seeds` seeds."""
    span: float | None = None
    """Factor in N from a budget's smallest to its largest size; None: 10 to 16, or what `sizes.ratio` gives."""

    def __post_init__(self) -> None:
        budgets = self.budgets_flops
        check_budgets("design.budgets_flops", budgets, "FLOPs")
        if self.sizes_per_budget < MIN_SIZES:
            raise UserError(
                f"design.sizes_per_budget={self.sizes_per_budget} must be at least {MIN_SIZES}: a parabola has 3 parameters."
            )
        if self.noise_seeds < 1:
            raise UserError(f"design.noise_seeds={self.noise_seeds} must be at least 1.")
        if not 0 <= self.noise_budget < len(budgets):
            choices = ", ".join(map(str, range(len(budgets))))
            raise UserError(
                f"design.noise_budget={self.noise_budget} is not the index of a budget. Choices: {choices}."
            )
        if not self.n_opt_at_1e12 > 0:
            raise UserError(f"design.n_opt_at_1e12={self.n_opt_at_1e12!r} must be positive.")
        if self.span is not None:
            if not 1 < self.span < math.inf:
                raise UserError(f"design.span={self.span!r} must be above 1.")
            for name in ("ratio", "width_ratio"):
                if (ratio := getattr(self.sizes, name)) is not None:
                    raise UserError(
                        f"design.span={self.span:g} and design.sizes.{name}={ratio:g} exclude each other: give one of them."
                    )

    def n_opt_guess(self, budget_flops: float) -> float:
        """The center of the window, in parameters under the plan's convention."""
        return float(self.n_opt_at_1e12 * (budget_flops / 1e12) ** self.n_opt_exponent)

    def log_ratios(self) -> list[float]:
        """Spacings of the sizes in ln N that may be used."""
        if self.sizes.ratio is not None:
            return [math.log(self.sizes.ratio)]
        return [
            math.log(span) / (self.sizes_per_budget - 1) for span in ([self.span] if self.span else SPANS)
        ]

    def window(self, log_params: list[float], budget_flops: float) -> range:
        """Indices into a ladder of geometric widths (with ascending `log_params`) of the sizes trained at this budget."""
        n, k = len(log_params), self.sizes_per_budget
        if n < k:
            raise UserError(
                f"design.sizes gives {n} sizes, fewer than design.sizes_per_budget={k}: widen min_width..max_width "
                "or lower width_ratio."
            )
        target = math.log(self.n_opt_guess(budget_flops))
        off_center = [abs((log_params[i] + log_params[i + k - 1]) / 2 - target) for i in range(n - k + 1)]
        first = off_center.index(min(off_center))
        return range(first, first + k)

    def seeds(self, budget_index: int) -> range:
        """Seeds (relative to the plan's) of the budget with this index, in ascending order of budgets."""
        return range(self.noise_seeds if budget_index == self.noise_budget else 1)

    def requests(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        """Ascending by budget, then by size; a size's additional seeds follow its first."""
        return self.requests_of_seeds(shapes)

    def requests_of_seeds(self, shapes: ShapeMaker, seeds: int | None = None) -> Iterator[RunRequest]:
        """The requests with this many seeds of every run; None: as given by `noise_seeds`."""
        for index, (budget, sizes) in enumerate(self.windows(shapes).items()):
            for shape in sizes:
                for seed in self.seeds(index) if seeds is None else range(seeds):
                    role = "isoflop" if seed == 0 else "noise"
                    yield RunRequest(shape, budget, role=role, seed=seed)

    def sweep(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        return self.requests(shapes)

    def windows(self, shapes: ShapeMaker) -> dict[float, list[Any]]:
        """Budgets, ascending, and the sizes trained at each, ascending in N. Raises `UserError` if the widths do not suffice."""
        budgets = sorted(self.budgets_flops)
        if self.sizes.width_ratio is not None:
            ladder = shapes.geometric(self.sizes)
            return {b: [ladder[i] for i in self.window(_log_n(ladder, shapes), b)] for b in budgets}
        candidates = shapes.candidates(self.sizes)
        log_n = _log_n(candidates, shapes)
        centers = [math.log(self.n_opt_guess(budget)) for budget in budgets]
        tolerance = shapes.max_error(self.sizes)
        found = best_windows(log_n, candidates, centers, self.sizes_per_budget, self.log_ratios(), tolerance)
        if found is None:
            self._refuse_range(log_n)
        rungs, windows, step = found
        if any(len(window.met) < MIN_SIZES for window in windows):
            raise UserError(
                f"design.sizes: fewer than {MIN_SIZES} sizes are within {tolerance:g} of evenly spaced ln N. Raise "
                "design.sizes.max_width, lower design.sizes.width_multiple, or raise design.sizes.tolerance."
            )
        for text in self._notes(budgets, rungs, windows, step, tolerance):
            shapes.note(text)
        return {b: [rungs.shapes[i] for i in window.met] for b, window in zip(budgets, windows, strict=True)}

    def _refuse_range(self, log_n: list[float]) -> NoReturn:
        k, span = self.sizes_per_budget, math.exp(min(self.log_ratios()) * (self.sizes_per_budget - 1))
        have = f"a factor {math.exp(log_n[-1] - log_n[0]):.3g} of N" if log_n else "no size"
        raise UserError(
            f"design.sizes.min_width={self.sizes.min_width} to design.sizes.max_width={self.sizes.max_width} give {have}, but "
            f"design.sizes_per_budget={k} sizes span a factor {span:.3g}: raise max_width, or give a smaller "
            "design.span or design.sizes.ratio."
        )

    def _notes(
        self, budgets: list[float], rungs: Rungs, windows: list[Window], step: float, tolerance: float
    ) -> Iterator[str]:
        """How the sizes are spaced, which are missing, and which windows are off center."""
        errors = [abs(rungs.errors[i]) for window in windows for i in window.met]
        spans = [math.exp(rungs.targets[w.met[-1]] - rungs.targets[w.met[0]]) for w in windows]
        yield (
            f"sizes are a factor {math.exp(step):.3g} apart in N, within {math.expm1(max(errors)):.1%}; those of a "
            f"budget span a factor {min(spans):.3g}"
            + (f" to {max(spans):.3g}." if max(spans) > 1.01 * min(spans) else ".")
        )
        if missing := sorted({i for w in windows for i in w.rungs if rungs.shapes[i] is None}):
            counts = ", ".join(f"{len(w.met)} at {b:.3g}" for b, w in zip(budgets, windows, strict=True))
            at = ", ".join(f"{math.exp(rungs.targets[i]):,.0f}" for i in missing)
            yield (
                f"fewer than design.sizes_per_budget={self.sizes_per_budget} sizes: none of the allowed widths and depths is "
                f"within design.sizes.tolerance={tolerance:g} of N = {at}; sizes by budget (FLOPs): {counts}."
            )
        for budget, window in zip(budgets, windows, strict=True):
            if abs(window.off_center) > step:
                option = "min_width" if window.off_center > 0 else "max_width"
                yield (
                    f"the sizes at {budget:.3g} FLOPs are centered at {math.exp(window.off_center):.2g} times the expected "
                    f"optimum: {'lower' if option == 'min_width' else 'raise'} design.sizes.{option}="
                    f"{getattr(self.sizes, option)}."
                )

    def remark(self, label: str, planned: int, kept: int) -> str:
        """A window without some of its sizes is one-sided."""
        if kept == 0:
            return (
                f"the budget of {label} has none of its {planned} sizes. Use more data or a smaller budget."
            )
        few = f", fewer than the {MIN_SIZES} needed for a valley" if kept < MIN_SIZES else ""
        return (
            f"the budget of {label} has only {kept} of its {planned} sizes{few}; the remaining window is "
            "one-sided, which biases its minimum. Use more data or a smaller budget."
        )


def _log_n(ladder: list[Any], shapes: ShapeMaker) -> list[float]:
    return [math.log(shape.count().n_params(shapes.convention)) for shape in ladder]
