"""Model FLOPs utilization (MFU): FLOPs of the model's matrix products over what its devices could do in the same time.

Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B): 6 N with the head plus attention over the full context, without
recomputation, against the dense peak of the run's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import RunSpec


class UtilizationMeter:
    """The MFU of one program: of a run, or of a stack of runs together.

    Counts from the end of the first block of steps, which compiles, and leaves out evaluations.
    """

    def __init__(self, spec: RunSpec, peak_flops_per_s: float | None) -> None:
        flops_per_token = spec.count().flops_per_token(Convention.MATMUL_PLUS_ATTENTION)
        self._step_flops = flops_per_token * spec.batch_tokens
        self._peak_flops_per_s = peak_flops_per_s
        self._steps = 0
        self._began: float | None = None
        self._last = self._excluded_s = self._since_last_s = 0.0

    def add(self, steps: int) -> None:
        """A block is done: `steps` steps, summed over the runs that took part."""
        self._last = time.perf_counter()
        if self._began is None:
            self._began = self._last
        else:
            self._steps += steps
            self._excluded_s += self._since_last_s
        self._since_last_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in this context is not training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since_last_s += time.perf_counter() - began

    @property
    def mfu(self) -> float | None:
        """Share of the peak up to the end of the last block; None where the peak is not known or only one block was done."""
        if self._peak_flops_per_s is None or self._began is None or not self._steps:
            return None
        elapsed = self._last - self._began - self._excluded_s
        return self._step_flops * self._steps / elapsed / self._peak_flops_per_s if elapsed > 0 else None
