"""The `isoflop` design: model sizes around a guessed optimum at each of several budgets (Chinchilla's Approach 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from scaling_lab.core.errors import UserError
from scaling_lab.planning.designs.base import RunRequest, ShapeMaker, check_budgets
from scaling_lab.planning.sizes import SizeLadder

# With fewer sizes a parabola has no degrees of freedom left.
MIN_SIZES = 4


@dataclass(frozen=True)
class IsoFlopDesign:
    """For each budget, the `sizes_per_budget` sizes of the ladder closest to the guessed optimum in log N.

    The guess N_opt(C) = n_opt_at_1e12 * (C / 1e12)^n_opt_exponent only centers the window. All budgets' windows are centered
    the same way, because off-center windows bias the parabola (Czech et al. 2026, arXiv 2603.22339). The runs of
    `noise_budget` are repeated with `noise_seeds` seeds, which measures the noise floor.
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

    def n_opt_guess(self, budget_flops: float) -> float:
        """The center of the window, in parameters under the plan's convention."""
        return float(self.n_opt_at_1e12 * (budget_flops / 1e12) ** self.n_opt_exponent)

    def window(self, log_params: list[float], budget_flops: float) -> range:
        """Indices into the ladder (with ascending `log_params`) of the sizes trained at this budget."""
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
        for index, budget in enumerate(sorted(self.budgets_flops)):
            for shape in self.window_shapes(shapes, budget):
                for seed in self.seeds(index) if seeds is None else range(seeds):
                    role = "isoflop" if seed == 0 else "noise"
                    yield RunRequest(shape, budget, role=role, seed=seed)

    def sweep(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        return self.requests(shapes)

    def window_shapes(self, shapes: ShapeMaker, budget_flops: float) -> list[Any]:
        """The sizes trained at this budget, ascending in N."""
        ladder = shapes.ladder(self.sizes)
        log_params = [math.log(shape.count().n_params(shapes.convention)) for shape in ladder]
        return [ladder[i] for i in self.window(log_params, budget_flops)]

    def remark(self, label: str, planned: int, kept: int) -> str:
        """A window without some of its sizes is one-sided."""
        few = f", fewer than the {MIN_SIZES} needed for a valley" if kept < MIN_SIZES else ""
        return (
            f"the budget of {label} has only {kept} of its {planned} sizes{few}; the remaining window is "
            "one-sided, which biases its minimum. Use more data or a smaller budget."
        )
