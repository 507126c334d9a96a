"""Owns when a run is lost: a loss that is not finite, or that has risen far above its own past and stays there.

A spike that comes back is none: large learning rates have them. Lost is a run whose every loss over a patience of steps
lies above a limit, the lower of two: a uniform guess and three nats, and one nat above the lowest mean of 32 steps so
far. The patience is 32 steps for the first, and 5% of the run for the second, which is what a run that recovers takes;
at the end of a run 32 steps of either are enough. It is a pure function of the losses, whose memory a checkpoint keeps.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from scaling_lab.core.spec import RunSpec

DIVERGED_ABOVE_UNIFORM_NATS = 3.0
DIVERGED_ABOVE_BEST_NATS = 1.0
# Losses of a few hundred tokens scatter by tenths of a nat: a past is a mean over as many steps as the shortest patience.
DIVERGED_STEPS = 32
PATIENCE_FRACTION = 0.05


class Divergence:
    """Watches the losses, one step after the other: when the run is lost, `reason` says why."""

    def __init__(self, spec: RunSpec, state: dict[str, Any] | None = None) -> None:
        self.reason: str | None = None
        self._uniform = math.log(spec.shape.vocab_size)
        self._steps = spec.steps
        self._patience = max(DIVERGED_STEPS, math.ceil(PATIENCE_FRACTION * spec.steps))
        state = state or {}
        self._step: int = state.get("step", 0)
        self._recent: deque[float] = deque(state.get("recent", ()), DIVERGED_STEPS)
        self._best: float = state.get("best", math.inf)
        self._above_uniform: int = state.get("above_uniform", 0)
        self._above_best: int = state.get("above_best", 0)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on watching as if it had never stopped; plain JSON."""
        known_best = {} if math.isinf(self._best) else {"best": self._best}
        return {
            "step": self._step, "recent": list(self._recent), **known_best,
            "above_uniform": self._above_uniform, "above_best": self._above_best,
        }  # fmt: skip

    def step(self, loss: float) -> bool:
        """Take one step's training loss; says whether the run is lost."""
        self._step += 1
        if not math.isfinite(loss):
            self.reason = "the training loss is not finite"
            return True
        self._above_uniform = self._count(
            self._above_uniform, loss > self._uniform + DIVERGED_ABOVE_UNIFORM_NATS
        )
        self._above_best = self._count(self._above_best, loss > self._best + DIVERGED_ABOVE_BEST_NATS)
        self._recent.append(loss)
        if len(self._recent) == DIVERGED_STEPS:
            self._best = min(self._best, math.fsum(self._recent) / DIVERGED_STEPS)
        patience = DIVERGED_STEPS if self._step >= self._steps else self._patience
        if self._above_uniform >= DIVERGED_STEPS:
            self.reason = (
                f"the training loss, {loss:.3g} nats, is far above a uniform guess of {self._uniform:.3g} "
                f"for {self._above_uniform} steps"
            )
        elif self._above_best >= patience:
            self.reason = (
                f"the training loss, {loss:.3g} nats, is far above its own best of {self._best:.3g} "
                f"for {self._above_best} steps"
            )
        return self.reason is not None

    def validation(self, loss: float) -> bool:
        """Take a validation loss; says whether the run is lost."""
        if not math.isfinite(loss):
            self.reason = "the validation loss is not finite"
        return self.reason is not None

    @staticmethod
    def _count(so_far: int, above: bool) -> int:
        return so_far + 1 if above else 0
