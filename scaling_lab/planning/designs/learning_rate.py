"""The `learning_rate` design: learning rates (and batch sizes) around the recipe's, at chosen sizes and horizons."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

from scaling_lab.core.errors import UserError
from scaling_lab.planning.designs.base import RunRequest, ShapeMaker, check_budgets
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.sizes import SizeLadder

ROLE = "lr_sweep"


@dataclass(frozen=True)
class LearningRateDesign:
    """At each size and budget (or horizon) the recipe's LR times each of `lr_multipliers`, for `seeds` seeds.

    With `batch_multipliers` every pair of multipliers is trained, since the best LR depends on the batch. The run with both
    multipliers 1 has the same run id as in an IsoFLOP sweep of the same budget.
    """

    kind: ClassVar[str] = "learning_rate"

    budgets_flops: tuple[float, ...] = ()
    """Exactly one of this and `horizons_tokens` is given."""
    horizons_tokens: tuple[float, ...] = ()
    """The same number of tokens for every size."""
    grid_sizes: int | None = None
    """Take sizes from an IsoFLOP grid of the same budgets with this many sizes per budget (its design.sizes_per_budget):
    `sizes_per_budget` of them, evenly spaced from smallest to largest. None: use `widths`."""
    sizes_per_budget: int = 3
    n_opt_at_1e12: float = 75e3
    """Of that grid, like `n_opt_exponent`."""
    n_opt_exponent: float = 0.5
    widths: tuple[int, ...] = ()
    """Empty: the ladder's smallest, middle and largest width."""
    depths: tuple[int, ...] = ()
    """Empty: the ladder's depth at each width; otherwise every width is trained at each of these depths."""
    lr_multipliers: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    batch_multipliers: tuple[float, ...] = (1.0,)
    seeds: int = 1
    sizes: SizeLadder = field(default_factory=SizeLadder)
    span: float | None = None
    """Of that grid."""

    def __post_init__(self) -> None:
        if bool(self.budgets_flops) == bool(self.horizons_tokens):
            raise UserError(
                f"design.budgets_flops={list(self.budgets_flops)} and design.horizons_tokens={list(self.horizons_tokens)}: "
                "give exactly one of the two."
            )
        if self.budgets_flops:
            check_budgets("design.budgets_flops", self.budgets_flops, "FLOPs")
        if self.horizons_tokens:
            check_budgets("design.horizons_tokens", self.horizons_tokens, "tokens")
        if self.grid_sizes is not None:
            self._check_grid(self.grid_sizes)
        for name in ("lr_multipliers", "batch_multipliers"):
            values = getattr(self, name)
            if (
                not values
                or any(not v > 0 or math.isinf(v) for v in values)
                or len(set(values)) < len(values)
            ):
                raise UserError(f"design.{name}={list(values)} must be a list of distinct positive numbers.")
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if any(v < 1 for v in values) or len(set(values)) < len(values):
                raise UserError(f"design.{name}={list(values)} must be distinct integers of at least 1.")
        if self.seeds < 1:
            raise UserError(f"design.seeds={self.seeds} must be at least 1.")

    def _check_grid(self, grid_sizes: int) -> None:
        if not self.budgets_flops or self.widths or self.depths:
            raise UserError(
                f"design.grid_sizes={grid_sizes} takes its sizes from an IsoFLOP grid of design.budgets_flops: it cannot be "
                "combined with design.widths, design.depths or design.horizons_tokens."
            )
        if not 1 <= self.sizes_per_budget <= grid_sizes:
            raise UserError(
                f"design.sizes_per_budget={self.sizes_per_budget} must be between 1 and design.grid_sizes={grid_sizes}."
            )
        self._grid(grid_sizes)

    def _grid(self, grid_sizes: int) -> IsoFlopDesign:
        return IsoFlopDesign(
            self.budgets_flops,
            grid_sizes,
            self.sizes,
            self.n_opt_at_1e12,
            self.n_opt_exponent,
            span=self.span,
        )

    def shapes(self, shapes: ShapeMaker, budget_flops: float | None) -> list[Any]:
        """The shapes trained at one budget (None: at a horizon)."""
        if self.grid_sizes is not None and budget_flops is not None:
            window = self._grid(self.grid_sizes).windows(shapes)[budget_flops]
            gaps = max(1, self.sizes_per_budget - 1)
            return [window[round(i * (len(window) - 1) / gaps)] for i in range(self.sizes_per_budget)]
        widths = self.widths or self._ladder_widths(shapes)
        return [
            shapes.shape(width, depth)
            for width in widths
            for depth in (self.depths or (self.sizes.depth(width),))
        ]

    def _ladder_widths(self, shapes: ShapeMaker) -> list[int]:
        """The smallest allowed width, the geometric middle, and the largest."""
        if self.sizes.width_ratio is not None:
            geometric = [width for width, _ in self.sizes.geometric_sizes()]
            return sorted({geometric[0], geometric[len(geometric) // 2], geometric[-1]})
        allowed = sorted({shape.width for shape in shapes.candidates(self.sizes)})
        middle = math.sqrt(allowed[0] * allowed[-1])
        return sorted({allowed[0], min(allowed, key=lambda w: abs(w - middle)), allowed[-1]})

    def requests(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        """Ascending by budget, then by size, LR and seed."""
        multipliers = list(product(sorted(self.lr_multipliers), sorted(self.batch_multipliers)))
        for budget, horizon in [
            *((budget, None) for budget in sorted(self.budgets_flops)),
            *((None, horizon) for horizon in sorted(self.horizons_tokens)),
        ]:
            for shape, (lr, batch), seed in product(
                self.shapes(shapes, budget), multipliers, range(self.seeds)
            ):
                yield RunRequest(shape, budget, horizon, ROLE, seed, lr, batch)

    def sweep(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        """The grid's runs if there is a grid, since this design tunes the grid's recipe."""
        if self.grid_sizes is None:
            return self.requests(shapes)
        return self._grid(self.grid_sizes).sweep(shapes)

    def remark(self, label: str, planned: int, kept: int) -> str | None:
        """None: sizes are independent here, so a missing one does not affect the others."""
