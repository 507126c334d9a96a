"""Owns the `isoflop` design: at each of several budgets, sizes around the guessed optimum (Chinchilla's Approach 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from scaling_lab.core.errors import UserError
from scaling_lab.planning.designs.base import RunRequest, ShapeMaker, check_budgets
from scaling_lab.planning.sizes import SizeLadder

# Below this a valley has no parabola with a degree of freedom left.
MIN_SIZES = 4


@dataclass(frozen=True)
class IsoFlopDesign:
    """`sizes_per_budget` sizes of the ladder nearest to the guessed optimum of each budget, in log N.

    The guess N_opt(C) = n_opt_at_1e12 * (C / 1e12)^n_opt_exponent only centres the window: every budget's window is
    centred alike, because off-centre windows bias the parabola (Czech et al. 2026, arXiv 2603.22339). All runs of one
    budget also run with `noise_seeds` seeds at `noise_budget`, which measures the noise floor.
    """

    kind: ClassVar[str] = "isoflop"

    budgets_flops: tuple[float, ...] = (5e10, 2e11, 8e11)
    sizes_per_budget: int = 6
    sizes: SizeLadder = field(default_factory=SizeLadder)
    n_opt_at_1e12: float = 75e3
    n_opt_exponent: float = 0.5
    noise_seeds: int = 2
    noise_budget: int = 0
    """Index of the budget (ascending from 0) that is run with `noise_seeds` seeds."""

    def __post_init__(self) -> None:
        budgets = self.budgets_flops
        check_budgets("design.budgets_flops", budgets, "FLOPs")
        if self.sizes_per_budget < MIN_SIZES:
            raise UserError(
                f"design.sizes_per_budget={self.sizes_per_budget} must be at least {MIN_SIZES}: a parabola has 3 unknowns."
            )
        if self.noise_seeds < 1:
            raise UserError(f"design.noise_seeds={self.noise_seeds} must be at least 1.")
        if not 0 <= self.noise_budget < len(budgets):
            choices = ", ".join(map(str, range(len(budgets))))
            raise UserError(f"design.noise_budget={self.noise_budget} is not a budget. Choices: {choices}.")
        if not self.n_opt_at_1e12 > 0:
            raise UserError(f"design.n_opt_at_1e12={self.n_opt_at_1e12!r} must be positive.")

    def n_opt_guess(self, budget_flops: float) -> float:
        """Where the window is centred, in parameters under the plan's convention."""
        return float(self.n_opt_at_1e12 * (budget_flops / 1e12) ** self.n_opt_exponent)

    def window(self, log_params: list[float], budget_flops: float) -> range:
        """Indices of the ladder (whose sizes have `log_params`, ascending) that this budget trains."""
        n, k = len(log_params), self.sizes_per_budget
        if n < k:
            raise UserError(
                f"design.sizes gives {n} sizes, fewer than design.sizes_per_budget={k}: widen min_width..max_width "
                "or lower width_ratio."
            )
        target = math.log(self.n_opt_guess(budget_flops))
        off_centre = [abs((log_params[i] + log_params[i + k - 1]) / 2 - target) for i in range(n - k + 1)]
        first = off_centre.index(min(off_centre))
        return range(first, first + k)

    def seeds(self, budget_index: int) -> range:
        """Seeds (relative to the plan's) of the budget with this index, ascending by budget."""
        return range(self.noise_seeds if budget_index == self.noise_budget else 1)

    def requests(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        """Ascending by budget, then by size; the repeated seeds of a size follow its first."""
        return self.requests_of_seeds(shapes)

    def requests_of_seeds(self, shapes: ShapeMaker, seeds: int | None = None) -> Iterator[RunRequest]:
        """The requests with so many seeds of every run; None: as `noise_seeds` says."""
        for index, budget in enumerate(sorted(self.budgets_flops)):
            for shape in self.window_shapes(shapes, budget):
                for seed in self.seeds(index) if seeds is None else range(seeds):
                    role = "isoflop" if seed == 0 else "noise"
                    yield RunRequest(shape, budget, role=role, seed=seed)

    def sweep(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        return self.requests(shapes)

    def window_shapes(self, shapes: ShapeMaker, budget_flops: float) -> list[Any]:
        """The sizes that this budget trains, ascending in N."""
        ladder = shapes.ladder(self.sizes)
        log_params = [math.log(shape.count().n_params(shapes.convention)) for shape in ladder]
        return [ladder[i] for i in self.window(log_params, budget_flops)]

    def remark(self, label: str, planned: int, kept: int) -> str:
        """A window that lost sizes is one-sided."""
        few = f": fewer than the {MIN_SIZES} of a valley" if kept < MIN_SIZES else ""
        return (
            f"the budget of {label} has {kept} of its {planned} sizes left{few}, and its window is "
            "one-sided, which biases its minimum. More data, or a smaller budget, mends it."
        )
