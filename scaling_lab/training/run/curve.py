"""Writing a run's curve: which steps become points, and when the lines reach the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import IO

from scaling_lab.core.counts import train_flops
from scaling_lab.core.record import EvalPoint, curve_block_steps
from scaling_lab.core.spec import RunSpec
from scaling_lab.core.storage.store import curve_line


class CurveWriter:
    """Turns the losses of steps into points of curve.jsonl; `points` holds all of them."""

    def __init__(
        self,
        spec: RunSpec,
        file: IO[str],
        points: Sequence[EvalPoint] = (),
        block_losses_nats: Sequence[float] = (),
        wall_time_s: float = 0.0,
    ) -> None:
        self.points = list(points)
        self._spec = spec
        self._file = file
        self._flops_per_token = spec.flops_per_token()
        self._block_steps = curve_block_steps(spec.steps)
        self._block = list(block_losses_nats)
        self._began = time.perf_counter() - wall_time_s

    @property
    def wall_time_s(self) -> float:
        return time.perf_counter() - self._began

    def add(
        self,
        step: int,
        train_loss_nats: float,
        val_loss_nats: float | None = None,
        val_loss_sem_nats: float | None = None,
        noise_scale_tokens: float | None = None,
        evals: dict[str, float] | None = None,
    ) -> EvalPoint | None:
        """Add the loss of `step` (counted from 1); returns a point at the end of a block and at evaluations."""
        self._block.append(train_loss_nats)
        spec = self._spec
        if step % self._block_steps and val_loss_nats is None and step != spec.steps:
            return None
        tokens = step * spec.batch_tokens
        point = EvalPoint(
            step=step,
            tokens=tokens,
            train_flops=train_flops(self._flops_per_token, tokens),
            lr=spec.learning_rate(step - 1),
            train_loss_nats=sum(self._block) / len(self._block),
            val_loss_nats=val_loss_nats,
            val_loss_sem_nats=val_loss_sem_nats,
            noise_scale_tokens=noise_scale_tokens,
            evals=evals or None,
            wall_time_s=round(self.wall_time_s, 3),
        )
        self._block.clear()
        self.points.append(point)
        self._file.write(curve_line(point))
        return point

    @property
    def block_losses_nats(self) -> tuple[float, ...]:
        """Losses since the last point of the curve."""
        return tuple(self._block)

    def flush(self) -> None:
        """Flush the lines to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Sync the flushed lines to the disk, before a checkpoint that refers to them."""
        os.fsync(self._file.fileno())
