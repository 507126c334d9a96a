"""Owns the estimate of what a plan costs in time and disk before anything is measured. A guess, and labelled so.

Once runs are under way the live table measures: its ETA comes from FLOPs done over time, not from here.
"""

from __future__ import annotations

from collections.abc import Iterable

from scaling_lab.core.record import MAX_CURVE_POINTS
from scaling_lab.core.spec import PlannedRun

# FLOP/s of one CPU core in the training of tiny models, eager and compiled, at 7k and at 200k parameters, and the cost
# of compiling one shape (2026, one core of a server processor; results/LOG.md).
CPU_EAGER_FLOPS_PER_S = (6e9, 16e9)
CPU_COMPILED_FLOPS_PER_S = (20e9, 45e9)
CPU_COMPILE_S = 15.0
# Importing torch and reading the corpus, once a worker.
WORKER_START_S = 5.0
CURVE_LINE_BYTES = 170
# Parameters and AdamW's two moments, float32.
CHECKPOINT_BYTES_PER_PARAM = 12


def cpu_flops_per_s(n_params: float, compiled: bool) -> float:
    """Speed of one core, interpolated in N between the two measured sizes and held outside them."""
    low, high = CPU_COMPILED_FLOPS_PER_S if compiled else CPU_EAGER_FLOPS_PER_S
    share = min(1.0, max(0.0, (n_params - 7e3) / (200e3 - 7e3)))
    return low + share * (high - low)


def estimate_seconds(run: PlannedRun) -> float | None:
    """Seconds of one worker for one run, compilation left out; None for a device without a measured table."""
    if run.execution.device != "cpu":
        return None
    n = run.spec.n_params()
    return run.spec.train_flops() / cpu_flops_per_s(n, run.execution.compile)


def estimate_plan_seconds(runs: Iterable[PlannedRun], workers: int) -> float | None:
    """Seconds until the last of `runs` is done by `workers` side by side."""
    runs = list(runs)
    seconds = [estimate_seconds(run) for run in runs]
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return None
    compiled_shapes = {(r.spec.shape, r.spec.batch_tokens) for r in runs if r.execution.compile}
    busy = sum(known) + CPU_COMPILE_S * len(compiled_shapes)
    return WORKER_START_S + max([busy / max(1, workers), *known])


def estimate_disk_bytes(runs: Iterable[PlannedRun]) -> int:
    """Bytes of the curves and of one checkpoint a run, what a sweep leaves behind."""
    return sum(
        min(run.spec.steps, MAX_CURVE_POINTS) * CURVE_LINE_BYTES
        + CHECKPOINT_BYTES_PER_PARAM * run.spec.count().params.total
        for run in runs
    )
