"""Owns the estimate of what a plan costs in time, memory and disk before anything is measured. A guess, and labelled so.

Once runs are under way the live table measures: its ETA comes from FLOPs done over time, not from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import MAX_CURVE_POINTS
from scaling_lab.core.spec import PlannedRun
from scaling_lab.planning.execution import program_key
from scaling_lab.planning.memory import corpus_bytes, estimate_bytes

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
# What `job_needs` assumes of a device that no table knows. Assumed, not measured, and meant to be low: tiny models are
# bound by launching kernels (some hundred a layer and step, about 10 us each), larger ones by a GPU of several years ago.
UNKNOWN_FLOPS_PER_S = 1e12
UNKNOWN_STEP_S = (5e-3, 5e-3)  # a step of any model, and a step's share of each layer
UNKNOWN_COMPILE_S = 60.0
# The compiler's processes beside a worker (2026, torch 2.13 on Linux: 670 MB in all against 240 MB eager), the host's side
# of a worker on a GPU (CUDA's libraries and pinned memory; assumed), and the process of a cluster job that watches them.
COMPILER_BYTES, GPU_HOST_BYTES, JOB_BYTES = 0.45e9, 4e9, 0.15e9


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
    return run.spec.own_train_flops() / cpu_flops_per_s(n, run.execution.compile)


def estimate_plan_seconds(runs: Iterable[PlannedRun], workers: int) -> float | None:
    """Seconds until the last of `runs` is done by `workers` side by side."""
    runs = list(runs)
    seconds = [estimate_seconds(run) for run in runs]
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return None
    programs = {program_key(r.spec) for r in runs if r.execution.compile}
    busy = sum(known) + CPU_COMPILE_S * len(programs)
    return WORKER_START_S + max([busy / max(1, workers), *known])


def estimate_disk_bytes(runs: Iterable[PlannedRun]) -> int:
    """Bytes of the curves, of one checkpoint a run, and of those kept for others: what a sweep leaves behind."""
    return sum(
        min(run.spec.steps, MAX_CURVE_POINTS) * CURVE_LINE_BYTES
        + CHECKPOINT_BYTES_PER_PARAM * run.spec.count().params.total * (1 + len(run.spec.keep_steps))
        for run in runs
    )


@dataclass(frozen=True)
class JobNeeds:
    """What to ask of a cluster for one job, before any safety factor."""

    seconds: float
    host_bytes: float
    known: bool
    """Whether the time comes from measured speeds; else from assumed ones, low for any GPU."""


def job_needs(runs: Sequence[PlannedRun], workers: int = 1) -> JobNeeds:
    """Time and host memory of a job that trains `runs`, `workers` of them side by side, from its start to its end."""
    seconds = [estimate_seconds(run) for run in runs]
    filled = [s if s is not None else _assumed_seconds(run) for run, s in zip(runs, seconds)]
    compiling = sum(
        CPU_COMPILE_S if run.execution.device == "cpu" else UNKNOWN_COMPILE_S
        for run in {program_key(r.spec): r for r in runs if r.execution.compile}.values()
    )
    largest = sorted((_worker_bytes(run) for run in runs), reverse=True)[: max(1, workers)]
    return JobNeeds(
        seconds=WORKER_START_S + max([(sum(filled) + compiling) / max(1, workers), *filled]),
        host_bytes=JOB_BYTES + sum(largest),
        known=None not in seconds,
    )


def _assumed_seconds(run: PlannedRun) -> float:
    step_s = UNKNOWN_STEP_S[0] + UNKNOWN_STEP_S[1] * run.spec.shape.depth
    return (run.spec.steps - run.spec.parent_step) * step_s + run.spec.own_train_flops() / UNKNOWN_FLOPS_PER_S


def _worker_bytes(run: PlannedRun) -> float:
    """Host memory of one worker: models live there on a CPU only; the corpus passes through it on any device."""
    compiler = COMPILER_BYTES if run.execution.compile else 0.0
    on_cpu = run.execution.device == "cpu"
    return compiler + (device_bytes(run) if on_cpu else GPU_HOST_BYTES + _corpus_copies_bytes(run))


def device_bytes(run: PlannedRun) -> float:
    """Peak memory of a run (with its stack) on its device."""
    spec, execution = run.spec, run.execution
    sequences = execution.micro_batch_sequences or spec.batch_sequences
    corpus = _corpus_copies_bytes(run)
    return estimate_bytes(spec, execution.device, sequences, corpus, execution.stack_size)


def _corpus_copies_bytes(run: PlannedRun) -> float:
    """Two copies of the training tokens that a run holds; 0 where the data are not on this machine."""
    try:
        return 2.0 * corpus_bytes(run.spec, run.execution.stack_size)
    except (UserError, OSError):
        return 0.0
