"""When a run has diverged: its loss is not finite, or it has risen far above earlier losses and stays there.

A spike that recovers is not divergence; large learning rates cause them. A run has diverged if all losses over a patience
of steps are above one of two limits: three nats above a uniform guess, or one nat above the lowest mean over 32 steps so
far. The patience is 32 steps for the first limit, and 5% of the run for the second, which is how long recovering runs
take; at the end of a run 32 steps are enough for either. The result is a pure function of the losses; checkpoints hold the
detector's state.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from scaling_lab.core.spec import RunSpec

DIVERGED_ABOVE_UNIFORM_NATS = 3.0
DIVERGED_ABOVE_BEST_NATS = 1.0
# Losses of a few hundred tokens scatter by tenths of a nat, so the best loss is a mean over as many steps as this patience.
DIVERGED_STEPS = 32
PATIENCE_FRACTION = 0.05


class DivergenceDetector:
    """Takes the losses step by step; once the run has diverged, `reason` says why."""

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
        """The state that a resumed run needs to give the same result as an uninterrupted one; plain JSON."""
        known_best = {} if math.isinf(self._best) else {"best": self._best}
        return {
            "step": self._step, "recent": list(self._recent), **known_best,
            "above_uniform": self._above_uniform, "above_best": self._above_best,
        }  # fmt: skip

    def step(self, loss: float) -> bool:
        """Add one step's training loss; returns whether the run has diverged."""
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
                f"the training loss, {loss:.3g} nats, has been far above a uniform guess of {self._uniform:.3g} "
                f"for {self._above_uniform} steps"
            )
        elif self._above_best >= patience:
            self.reason = (
                f"the training loss, {loss:.3g} nats, has been far above its own best of {self._best:.3g} "
                f"for {self._above_best} steps"
            )
        return self.reason is not None

    def validation(self, loss: float) -> bool:
        """Add a validation loss; returns whether the run has diverged."""
        if not math.isfinite(loss):
            self.reason = "the validation loss is not finite"
        return self.reason is not None

    @staticmethod
    def _count(so_far: int, above: bool) -> int:
        return so_far + 1 if above else 0
