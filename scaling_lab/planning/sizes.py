"""The ladder of model sizes: targets evenly spaced in ln N, each met by an allowed width and depth."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_lab.core.errors import UserError

MAX_LADDER_SIZES = 200
# Width over depth may be this factor off the rule: loss is flat over a wide range (Kaplan et al. 2020, figure 5).
ASPECT_FACTOR = 1.4
# Largest |ln N - target| of a size. Matrix products on a GPU want widths in larger steps.
TOLERANCE_CPU, TOLERANCE_CUDA = 0.03, 0.10
WIDTH_MULTIPLE_CPU = 4
WIDTH_MULTIPLE_CUDA, WIDTH_MULTIPLE_CUDA_NARROW, CUDA_NARROW = 64, 16, 256
# A parabola has three parameters: with fewer sizes it has no degrees of freedom left.
MIN_SIZES = 4
# Offsets of the targets that are tried, evenly spaced over one step.
OFFSETS = 128


@dataclass(frozen=True)
class SizeLadder:
    """Which widths and depths a design may use, and how its sizes are spaced in N.

    Depth is width / aspect_ratio, at least `min_depth`, within a factor `ASPECT_FACTOR`.
    """

    min_width: int = 8
    max_width: int = 256
    ratio: float | None = None
    """Ratio of N of consecutive sizes; None: the design's."""
    width_multiple: int | None = None
    """None: 4; on CUDA 64 from width 256 on, 16 below."""
    tolerance: float | None = None
    """Largest |ln N - target|; None: 0.03, on CUDA 0.10."""
    aspect_ratio: float = 40.0
    min_depth: int = 2
    """One-layer models deviate from the trend (Kaplan et al. 2020, figure 6)."""
    width_ratio: float | None = None
    """Geometrically spaced widths instead, as earlier versions planned."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_width <= self.max_width:
            raise UserError(
                f"design.sizes.min_width={self.min_width} and design.sizes.max_width={self.max_width} must satisfy "
                "1 <= min <= max."
            )
        for name in ("ratio", "width_ratio"):
            value = getattr(self, name)
            if value is not None and not 1 < value < math.inf:
                raise UserError(f"design.sizes.{name}={value!r} must be above 1.")
        if self.ratio is not None and self.width_ratio is not None:
            raise UserError(
                f"design.sizes.ratio={self.ratio:g} (of N) and design.sizes.width_ratio={self.width_ratio:g} exclude each "
                "other: give design.sizes.ratio alone."
            )
        if (self.width_multiple or 1) < 1 or self.min_depth < 1 or not self.aspect_ratio > 0:
            raise UserError(
                f"design.sizes: width_multiple={self.width_multiple}, min_depth={self.min_depth} and "
                f"aspect_ratio={self.aspect_ratio} must be positive."
            )
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise UserError(f"design.sizes.tolerance={self.tolerance!r} must be positive.")

    def depth(self, width: int) -> int:
        """Depth at a width by the rule."""
        return max(self.min_depth, round(width / self.aspect_ratio))

    def depths(self, width: int) -> range:
        """Depths whose aspect ratio is within `ASPECT_FACTOR` of the rule's, at least `min_depth`."""
        rule = max(self.min_depth, width / self.aspect_ratio)
        low = math.ceil(rule / ASPECT_FACTOR - 1e-9)
        return range(max(self.min_depth, low), math.floor(rule * ASPECT_FACTOR + 1e-9) + 1)

    def widths(self, device: str = "cpu") -> list[int]:
        """Allowed widths, ascending."""
        if self.width_multiple is not None or device != "cuda":
            step = self.width_multiple or WIDTH_MULTIPLE_CPU
            return _multiples(step, self.min_width, self.max_width)
        narrow = _multiples(WIDTH_MULTIPLE_CUDA_NARROW, self.min_width, min(self.max_width, CUDA_NARROW - 1))
        return narrow + _multiples(WIDTH_MULTIPLE_CUDA, max(self.min_width, CUDA_NARROW), self.max_width)

    def max_error(self, device: str = "cpu") -> float:
        """Largest |ln N - target|."""
        return self.tolerance or (TOLERANCE_CUDA if device == "cuda" else TOLERANCE_CPU)

    def geometric_sizes(self) -> list[tuple[int, int]]:
        """Distinct (width, depth) of widths min_width * width_ratio^k, ascending."""
        assert self.width_ratio is not None
        step = self.width_multiple or WIDTH_MULTIPLE_CPU
        found: list[tuple[int, int]] = []
        width = float(self.min_width)
        while width <= self.max_width * (1 + 1e-9) and len(found) < MAX_LADDER_SIZES:
            rounded = max(step, round(width / step) * step)
            size = (rounded, self.depth(rounded))
            if not found or size != found[-1]:
                found.append(size)
            width *= self.width_ratio
        return found


def _multiples(step: int, low: int, high: int) -> list[int]:
    return list(range(-(-low // step) * step, high + 1, step))


@dataclass(frozen=True)
class Rungs:
    """Targets evenly spaced in ln N, and the shapes that meet them."""

    targets: tuple[float, ...]
    shapes: tuple[Any, ...]
    """One for each target; None: no allowed shape is within the tolerance, or the nearest is already taken."""
    errors: tuple[float, ...]
    """ln N - target of the nearest shape."""


def evenly_spaced(
    log_n: Sequence[float], shapes: Sequence[Any], first: float, step: float, tolerance: float
) -> Rungs:
    """The nearest of `shapes`, ascending in `log_n`, for each target first, first + step, ... up to the largest shape."""
    count = min(MAX_LADDER_SIZES, 1 + math.floor((log_n[-1] + tolerance - first) / step + 1e-9))
    targets = tuple(first + step * k for k in range(count))
    found: list[Any] = []
    errors: list[float] = []
    taken = -1
    for target in targets:
        at = bisect_left(log_n, target)
        near = min((i for i in (at - 1, at) if 0 <= i < len(log_n)), key=lambda i: abs(log_n[i] - target))
        errors.append(log_n[near] - target)
        met = abs(errors[-1]) <= tolerance and near > taken
        found.append(shapes[near] if met else None)
        taken = near if met else taken
    return Rungs(targets, tuple(found), tuple(errors))


@dataclass(frozen=True)
class Window:
    """The targets of one budget."""

    rungs: tuple[int, ...]
    """Indices of the targets, ascending, met or not."""
    met: tuple[int, ...]
    """Those trained: the met ones, and beyond them the nearest met ones while they are fewer than `MIN_SIZES`."""
    off_center: float
    """Middle of the targets less the budget's expected optimum, in ln N."""


def window_around(rungs: Rungs, center: float, size: int) -> Window:
    """The `size` consecutive targets whose middle is closest to `center`."""

    def off(first: int) -> float:
        return (rungs.targets[first] + rungs.targets[first + size - 1]) / 2 - center

    first = min(range(len(rungs.targets) - size + 1), key=lambda i: abs(off(i)))
    met = {i for i in range(first, first + size) if rungs.shapes[i] is not None}
    others = [i for i, shape in enumerate(rungs.shapes) if shape is not None and i not in met]
    others.sort(key=lambda i: abs(rungs.targets[i] - center))
    met |= set(others[: max(0, MIN_SIZES - len(met))])
    return Window(tuple(range(first, first + size)), tuple(sorted(met)), off(first))


def best_windows(
    log_n: Sequence[float],
    shapes: Sequence[Any],
    centers: Sequence[float],
    size: int,
    steps: Sequence[float],
    tolerance: float,
) -> tuple[Rungs, list[Window], float] | None:
    """Rungs for all budgets, their windows and their step: the step among `steps` and the offset for which the fewest sizes
    are missing, then those that center windows best.

    None: the shapes span too small a range for `size` targets.
    """
    found = [
        (*score, step)
        for step in steps
        if log_n and (score := _best_offset(log_n, centers, size, step, tolerance)) is not None
    ]
    if not found:
        return None
    *_, first, step = max(found)
    rungs = evenly_spaced(log_n, shapes, first, step, tolerance)
    return rungs, [window_around(rungs, center, size) for center in centers], step


def _best_offset(
    log_n: Sequence[float], centers: Sequence[float], size: int, step: float, tolerance: float
) -> tuple[int, int, float, float] | None:
    """(fewest sizes of a window, sizes of all windows, -largest distance off center, first target) of the best offset."""
    firsts = log_n[0] - tolerance + step * np.arange(OFFSETS) / OFFSETS
    counts = 1 + np.floor((log_n[-1] + tolerance - firsts) / step + 1e-9).astype(int)
    firsts, counts = firsts[counts >= size], np.minimum(counts[counts >= size], MAX_LADDER_SIZES)
    if not firsts.size:
        return None
    targets = firsts[:, None] + step * np.arange(counts.max())
    # (offsets, targets): distance to the nearest shape.
    ends = np.concatenate([[-np.inf], log_n, [np.inf]])
    at = np.searchsorted(ends, targets)
    met = np.minimum(targets - ends[at - 1], ends[at] - targets) <= tolerance
    before = np.concatenate([np.zeros((len(firsts), 1)), np.cumsum(met, axis=1)], axis=1)
    rows, sizes, off = np.arange(len(firsts)), [], []
    for center in centers:
        exact = (center - firsts) / step - (size - 1) / 2
        window = np.clip(np.rint(exact), 0, counts - size).astype(int)
        sizes.append(before[rows, window + size] - before[rows, window])
        off.append(np.abs(window - exact) * step)
    scores = zip(
        np.min(sizes, axis=0).tolist(), np.sum(sizes, axis=0).tolist(), (-np.max(off, axis=0)).tolist(),
        firsts.tolist(), strict=True,
    )  # fmt: skip
    return max(scores)
