"""Learning-rate schedules: LR over peak LR as a pure function of training progress.

Progress p is the fraction of the run's steps that are done, in (0, 1]: step t (from 0) of T has p = (t + 1) / T, so a
cosine reaches its final multiplier exactly at the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from scaling_lab.core.errors import UserError, unknown


def _warmup(progress: float, warmup_fraction: float) -> float | None:
    """Linear warmup from 0; None after it."""
    if progress < warmup_fraction:
        return progress / warmup_fraction
    return None


def _check_fraction(owner: object, name: str, *, above_zero: bool = False) -> None:
    value = getattr(owner, name)
    low_ok = value > 0 if above_zero else value >= 0
    if not (low_ok and value <= 1):
        bounds = "(0, 1]" if above_zero else "[0, 1]"
        raise UserError(f"schedule.{name}={value!r} must be in {bounds} ({type(owner).__name__}).")


@dataclass(frozen=True)
class Cosine:
    """Linear warmup, then a cosine from 1 to `final_fraction` over the run's own horizon.

    Hoffmann et al. 2022 (arXiv 2203.15556, section 3.1): decay by 10x, horizon matched to the run. `horizon_fraction`
    above 1 deliberately sets a horizon longer than the run; above 1.25 the loss is clearly worse (their figure A1).
    """

    kind: ClassVar[str] = "cosine"

    warmup_fraction: float = 0.02
    final_fraction: float = 0.1
    horizon_fraction: float = 1.0

    def __post_init__(self) -> None:
        _check_fraction(self, "warmup_fraction")
        _check_fraction(self, "final_fraction")
        if self.horizon_fraction <= 0:
            raise UserError(f"schedule.horizon_fraction={self.horizon_fraction!r} must be positive.")

    def multiplier(self, progress: float) -> float:
        """LR over peak LR at `progress` in (0, 1]."""
        warm = _warmup(progress, self.warmup_fraction)
        if warm is not None:
            return warm
        span = self.horizon_fraction - self.warmup_fraction
        if span <= 0:
            return 1.0  # the warmup takes up the whole horizon: nothing is left to decay over
        done = min(1.0, (progress - self.warmup_fraction) / span)
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Constant:
    """Linear warmup, then 1. No point of the curve is optimal for its compute: the envelope flags such runs."""

    kind: ClassVar[str] = "constant"

    warmup_fraction: float = 0.02

    def __post_init__(self) -> None:
        _check_fraction(self, "warmup_fraction")

    def multiplier(self, progress: float) -> float:
        """LR over peak LR at `progress` in (0, 1]."""
        warm = _warmup(progress, self.warmup_fraction)
        return 1.0 if warm is None else warm


COOLDOWNS = ("sqrt", "linear")
# Far below one step's share of any cooldown.
ROUNDING = 1e-12


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warmup, a constant LR, and a cooldown to `final_fraction` over the last `decay_fraction` of the run.

    Haegele et al. 2024 (arXiv 2405.18392): a cooldown over 20% of the run matches a cosine, and 1 - sqrt beats linear;
    the best constant LR is about half the best peak LR of a cosine.
    """

    kind: ClassVar[str] = "wsd"

    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    cooldown: str = "sqrt"
    """sqrt (1 - sqrt of the fraction of the cooldown done) or linear."""
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction(self, "warmup_fraction")
        _check_fraction(self, "decay_fraction", above_zero=True)
        _check_fraction(self, "final_fraction")
        if self.cooldown not in COOLDOWNS:
            raise unknown("schedule.cooldown", self.cooldown, COOLDOWNS)
        if self.warmup_fraction + self.decay_fraction > 1 + ROUNDING:
            raise UserError(
                f"schedule.decay_fraction={self.decay_fraction!r} and schedule.warmup_fraction={self.warmup_fraction!r} "
                "overlap: their sum must be at most 1."
            )

    def multiplier(self, progress: float) -> float:
        """LR over peak LR at `progress` in (0, 1]."""
        warm = _warmup(progress, self.warmup_fraction)
        if warm is not None:
            return warm
        done = (progress - (1.0 - self.decay_fraction)) / self.decay_fraction
        # Rounding must not start the cooldown a step early: the square root turns 1e-16 into a change of 1e-8 in the LR.
        if done <= ROUNDING:
            return 1.0
        left = 1.0 - (math.sqrt(done) if self.cooldown == "sqrt" else done)
        return self.final_fraction + (1.0 - self.final_fraction) * max(0.0, left)


@dataclass(frozen=True)
class InverseSqrt:
    """Linear warmup, then 1 / sqrt(progress), continuous at the end of the warmup (Vaswani et al. 2017).

    Needs a warmup: without one the initial LR would be unbounded.
    """

    kind: ClassVar[str] = "inverse_sqrt"

    warmup_fraction: float = 0.02

    def __post_init__(self) -> None:
        _check_fraction(self, "warmup_fraction", above_zero=True)

    def multiplier(self, progress: float) -> float:
        """LR over peak LR at `progress` in (0, 1]."""
        warm = _warmup(progress, self.warmup_fraction)
        return math.sqrt(self.warmup_fraction / progress) if warm is None else warm


@dataclass(frozen=True)
class MultiStep:
    """Linear warmup, 1 up to `first_step`, then `second_fraction` up to `second_step`, then `final_fraction`.

    DeepSeek LLM (Bi et al. 2024, arXiv 2401.02954, section 2.3): 31.6% of the peak after 80% of the tokens and 10% after
    90%; as good as a cosine, and the first stage can be shared by several horizons.
    """

    kind: ClassVar[str] = "multi_step"

    warmup_fraction: float = 0.02
    first_step: float = 0.8
    second_step: float = 0.9
    second_fraction: float = 0.316
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "first_step", "second_step", "second_fraction", "final_fraction"):
            _check_fraction(self, name)
        if self.second_step < self.first_step:
            raise UserError(
                f"schedule.second_step={self.second_step!r} must not be before schedule.first_step={self.first_step!r}."
            )

    def multiplier(self, progress: float) -> float:
        """LR over peak LR at `progress` in (0, 1]."""
        warm = _warmup(progress, self.warmup_fraction)
        if warm is not None:
            return warm
        if progress <= self.first_step:
            return 1.0
        return self.second_fraction if progress <= self.second_step else self.final_fraction
