"""The ladder of model sizes: geometrically spaced widths, with depth given by a rule."""

from __future__ import annotations

from dataclasses import dataclass

from scaling_lab.core.errors import UserError

MAX_LADDER_SIZES = 200


@dataclass(frozen=True)
class SizeLadder:
    """Widths min_width * ratio^k, rounded to `width_multiple`; depth = width / aspect_ratio, at least `min_depth`.

    The aspect ratio (width over depth) hardly matters over a wide range: Kaplan et al. 2020, figure 5.
    """

    min_width: int = 8
    max_width: int = 256
    width_ratio: float = 1.26
    width_multiple: int = 4
    aspect_ratio: float = 40.0
    min_depth: int = 2
    """One-layer models deviate from the trend (Kaplan et al. 2020, figure 6)."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_width <= self.max_width:
            raise UserError(
                f"design.sizes.min_width={self.min_width} and design.sizes.max_width={self.max_width} must satisfy "
                "1 <= min <= max."
            )
        if not self.width_ratio > 1:
            raise UserError(f"design.sizes.width_ratio={self.width_ratio!r} must be above 1.")
        if self.width_multiple < 1 or self.min_depth < 1 or not self.aspect_ratio > 0:
            raise UserError(
                f"design.sizes: width_multiple={self.width_multiple}, min_depth={self.min_depth} and "
                f"aspect_ratio={self.aspect_ratio} must be positive."
            )

    def depth(self, width: int) -> int:
        """Depth at a width."""
        return max(self.min_depth, round(width / self.aspect_ratio))

    def sizes(self) -> list[tuple[int, int]]:
        """Distinct (width, depth), ascending."""
        found: list[tuple[int, int]] = []
        width = float(self.min_width)
        while width <= self.max_width * (1 + 1e-9) and len(found) < MAX_LADDER_SIZES:
            rounded = max(self.width_multiple, round(width / self.width_multiple) * self.width_multiple)
            size = (rounded, self.depth(rounded))
            if not found or size != found[-1]:
                found.append(size)
            width *= self.width_ratio
        return found
