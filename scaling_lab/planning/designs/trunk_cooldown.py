"""The `trunk_cooldown` design: one constant-LR trunk per size, with a cooldown branch for each of its budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from scaling_lab.core.counts import tokens_for_budget
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.schedules import COOLDOWNS
from scaling_lab.planning.designs.base import Cooldown, RunRequest, ShapeMaker
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.sizes import SizeLadder


@dataclass(frozen=True)
class TrunkCooldownDesign:
    """An IsoFLOP grid with shared training: each size trains once at a constant LR, and each budget's run branches off this
    trunk into its own cooldown. Haegele et al. 2024 (arXiv 2405.18392): as good as a matched cosine.

    The more budgets a size has, the more it saves: half the compute with budgets a factor of sqrt(2) apart. The trunk's
    checkpoints at the branch points are kept, so no step is computed twice.
    """

    kind: ClassVar[str] = "trunk_cooldown"

    budgets_flops: tuple[float, ...] = (1e11, 1.4e11, 2e11, 2.8e11, 4e11, 5.6e11, 8e11)
    sizes_per_budget: int = 6
    sizes: SizeLadder = field(default_factory=SizeLadder)
    n_opt_at_1e12: float = 75e3
    n_opt_exponent: float = 0.5
    decay_fraction: float = 0.2
    """Fraction of a run taken by its cooldown: more than 20% does not help (same paper, section 3)."""
    cooldown: str = "sqrt"
    """sqrt (1 - sqrt, which the paper finds better) or linear."""
    lr_ratio: float = 0.5
    """Constant LR over the recipe's peak LR, which is meant for a cosine: about half (same paper, section 3)."""
    span: float | None = None

    def __post_init__(self) -> None:
        self._grid()
        if not 0 < self.decay_fraction < 1:
            raise UserError(f"design.decay_fraction={self.decay_fraction!r} must be in (0, 1).")
        if self.cooldown not in COOLDOWNS:
            raise unknown("design.cooldown", self.cooldown, COOLDOWNS)
        if not self.lr_ratio > 0:
            raise UserError(f"design.lr_ratio={self.lr_ratio!r} must be positive.")

    def _grid(self) -> IsoFlopDesign:
        return IsoFlopDesign(
            self.budgets_flops,
            self.sizes_per_budget,
            self.sizes,
            self.n_opt_at_1e12,
            self.n_opt_exponent,
            span=self.span,
        )

    def requests(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        """The trunks, ascending in N, then the branches by budget and N. A size with one budget has no trunk."""
        branches = list(self._grid().requests_of_seeds(shapes, seeds=1))
        tokens: dict[Any, list[float]] = {}
        for branch in branches:
            assert branch.budget_flops is not None
            per_token = branch.shape.count().flops_per_token(shapes.convention)
            tokens.setdefault(branch.shape, []).append(tokens_for_budget(branch.budget_flops, per_token))
        cooldowns = {
            shape: Cooldown(tuple(sorted(horizons)), self.decay_fraction, self.cooldown)
            for shape, horizons in tokens.items()
        }
        for shape, horizons in tokens.items():
            if len(horizons) > 1:
                yield RunRequest(
                    shape, train_tokens=max(horizons), role="trunk", lr_multiplier=self.lr_ratio,
                    cooldown=cooldowns[shape],
                )  # fmt: skip
        for branch in branches:
            yield RunRequest(
                branch.shape, branch.budget_flops, role="isoflop", lr_multiplier=self.lr_ratio,
                cooldown=cooldowns[branch.shape],
            )  # fmt: skip

    def sweep(self, shapes: ShapeMaker) -> Iterator[RunRequest]:
        """The branches: the runs of an IsoFLOP sweep of the same budgets."""
        return self._grid().requests_of_seeds(shapes, seeds=1)

    def remark(self, label: str, planned: int, kept: int) -> str | None:
        """As for an IsoFLOP grid; none for trunks, which end at the longest planned horizon."""
        return self._grid().remark(label, planned, kept) if label.endswith("FLOPs") else None
