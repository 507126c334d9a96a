"""Parametrizations: how each parameter's initialization, forward multipliers, learning rate, weight decay and Adam epsilon
scale with the model's shape, relative to a base shape. Pure functions; the modules in training/ only apply the numbers.

At its base shape every parametrization equals `standard`. Elsewhere, with m = width / base width, l = depth / base depth:

                           standard          mup               completep
    hidden matrices: init  the family's      base * m^-1/2     as mup
                     LR    1                 m^-1              m^-1 * l^(alpha - 1)
                     decay 1                 m                 m
    embedding, head: init  the family's      base              as mup
                     LR    1                 1                 1
    gains and biases: LR   1                 1                 l^(alpha - 1) in blocks, 1 outside
    Adam's epsilon         1                 m^-1              m^-1 * l^-alpha in blocks, m^-1 outside
    logit multiplier       1                 m^-1              m^-1
    residual multiplier    1                 1                 l^-alpha
    init of matrices that write to the residual stream
                           (2 depth)^-1/2    (2 depth)^-1/2    (2 base depth)^-1/2
    attention multiplier   head_dim^-1/2     base_head_dim^1/2 / head_dim (both)

Yang et al. 2022 (arXiv 2203.03466), table 8 and definition 4.1; Dey et al. 2025 (arXiv 2505.01618), table 1. Weight decay
is multiplied by the LR (as in `torch.optim.AdamW`), so that m * m^-1 keeps the decay per step the same at every width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from scaling_lab.core.errors import UserError, unknown


class Role(StrEnum):
    """A parameter's role in its model: which of its dimensions grow with width, and whether it is in a residual branch."""

    INPUT = "input"
    """Token and position embeddings, (anything, width); includes a tied head."""
    HIDDEN = "hidden"
    """Matrices of a block: both dimensions grow with the width."""
    BLOCK_VECTOR = "block_vector"
    """Gains and biases of a block."""
    VECTOR = "vector"
    """Gains and biases outside the blocks: the final normalization."""
    OUTPUT = "output"
    """The head, (vocabulary, width)."""


def role_of(name: str, dimensions: int) -> Role:
    """The role of the parameter `name` (dotted, as in `named_parameters`) with this number of dimensions.

    Raises:
        ValueError: a matrix that is not `embedding.*`, `positions.*`, `head.*` or `blocks.*`: its scaling is undefined.
    """
    top = name.partition(".")[0]
    if top in ("embedding", "positions"):
        return Role.INPUT
    if top == "head":
        return Role.OUTPUT
    if top == "blocks":
        return Role.HIDDEN if dimensions >= 2 else Role.BLOCK_VECTOR
    if dimensions >= 2:
        raise ValueError(
            f"the parameter {name!r} has no role: name a matrix embedding.*, positions.*, head.* or blocks.*"
        )
    return Role.VECTOR


@dataclass(frozen=True)
class Multipliers:
    """Factors that a module applies in its forward pass and at initialization."""

    residual: float = 1.0
    """On the output of each residual branch."""
    head: float = 1.0
    """On the head's input, and so on the logits."""
    attention: float | None = None
    """On q k before the softmax; None: 1 / sqrt(head_dim)."""
    hidden_init: float = 1.0
    """On the initial standard deviation that the family gives its hidden matrices at the base shape."""


@dataclass(frozen=True)
class GroupFactors:
    """Factors on the optimizer settings of a role."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


class Parametrization(Protocol):
    """A frozen dataclass with a `kind`, its short name."""

    kind: ClassVar[str]

    def base_shape(self, shape: Any) -> Any:
        """The shape at which the recipe's LR and the family's own initial standard deviations hold."""
        ...

    def multipliers(self, shape: Any) -> Multipliers: ...

    def factors(self, role: Role, shape: Any) -> GroupFactors: ...


@dataclass(frozen=True)
class Standard:
    """The family's own initialization at every size and one LR for all parameters; the best LR falls with model size."""

    kind: ClassVar[str] = "standard"

    def base_shape(self, shape: Any) -> Any:
        return shape

    def multipliers(self, shape: Any) -> Multipliers:
        return Multipliers()

    def factors(self, role: Role, shape: Any) -> GroupFactors:
        return GroupFactors()


STANDARD = Standard()


@dataclass(frozen=True)
class MuP:
    """muP in width (Yang et al. 2022): every width uses the LR that is best at `base_width` and the run's own depth."""

    kind: ClassVar[str] = "mup"

    base_width: int = 64
    base_head_dim: int = 16
    """Head dimension of the base shape: attention logits are divided by the head dimension, not by its square root."""

    def __post_init__(self) -> None:
        for name in ("base_width", "base_head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"parametrization.{name}={getattr(self, name)!r} must be at least 1.")
        if self.base_head_dim % 2 or self.base_width % self.base_head_dim:
            raise UserError(
                f"parametrization.base_head_dim={self.base_head_dim} must be even and divide "
                f"parametrization.base_width={self.base_width}: the base shape needs a whole number of heads."
            )

    def base_shape(self, shape: Any) -> Any:
        return replace(shape, width=self.base_width, heads=self.base_width // self.base_head_dim)

    def multipliers(self, shape: Any) -> Multipliers:
        m = shape.width / self.base_width
        return Multipliers(
            head=1 / m, attention=self.base_head_dim**0.5 / shape.head_dim, hidden_init=m**-0.5
        )

    def factors(self, role: Role, shape: Any) -> GroupFactors:
        m = shape.width / self.base_width
        # Logits are divided by m and matrices of fan-in ~ m scale as m^-1/2, so all gradients scale as 1/m, and so does eps.
        if role is Role.HIDDEN:
            return GroupFactors(lr=1 / m, weight_decay=m, eps=1 / m)
        return GroupFactors(eps=1 / m)


@dataclass(frozen=True)
class CompleteP(MuP):
    """muP in width and depth (Dey et al. 2025): one LR for every width and depth."""

    kind: ClassVar[str] = "completep"

    base_depth: int = 2
    alpha: float = 1.0
    """Residual branches are divided by (depth / base_depth)^alpha: 1 is CompleteP, 0.5 depth-muP (arXiv 2310.02244)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_depth < 1:
            raise UserError(f"parametrization.base_depth={self.base_depth!r} must be at least 1.")
        if not 0.5 <= self.alpha <= 1:
            # Below 1/2 the residual stream grows without bound with depth; above 1 deep layers stop mattering.
            raise UserError(f"parametrization.alpha={self.alpha!r} must be in [0.5, 1].")

    def base_shape(self, shape: Any) -> Any:
        return replace(super().base_shape(shape), depth=self.base_depth)

    def multipliers(self, shape: Any) -> Multipliers:
        return replace(super().multipliers(shape), residual=self._depth_factor(shape) ** -self.alpha)

    def factors(self, role: Role, shape: Any) -> GroupFactors:
        width = super().factors(role, shape)
        if role not in (Role.HIDDEN, Role.BLOCK_VECTOR):
            return width
        depth = self._depth_factor(shape)
        return replace(width, lr=width.lr * depth ** (self.alpha - 1), eps=width.eps * depth**-self.alpha)

    def _depth_factor(self, shape: Any) -> float:
        return float(shape.depth / self.base_depth)


CLASSES: dict[str, type] = {cls.kind: cls for cls in (Standard, MuP, CompleteP)}


def parametrization_class(kind: str) -> Any:
    """A parametrization by its short name."""
    if kind not in CLASSES:
        raise unknown("parametrization", kind, CLASSES)
    return CLASSES[kind]
