"""Rough estimates of a plan's time, memory and disk use, before it is trained.

Once runs are in progress, the ETA of the live table comes from measured throughput instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import MAX_CURVE_POINTS
from scaling_lab.core.spec import PlannedRun
from scaling_lab.planning.devices import Device, run_seconds
from scaling_lab.planning.execution import program_key
from scaling_lab.planning.memory import corpus_bytes, estimate_bytes
from scaling_lab.planning.probe import Probe

# FLOP/s of one CPU core when training models of 7k and of 200k parameters, eager and compiled, and the time to compile one
# shape (2026, one core of a server processor; results/LOG.md).
CPU_EAGER_FLOPS_PER_S = (6e9, 16e9)
CPU_COMPILED_FLOPS_PER_S = (20e9, 45e9)
CPU_COMPILE_S = 15.0
# Importing torch and reading the corpus, once per worker.
WORKER_START_S = 5.0
CURVE_LINE_BYTES = 170
# Parameters and AdamW's two moments, float32.
CHECKPOINT_BYTES_PER_PARAM = 12
# Checkpoints of a run in progress: the last two, and one that is being written.
CHECKPOINTS_AT_ONCE = 3
# What a finished run leaves, bytes per parameter, and its name.
LEFT_BEHIND = {
    "weights": (4, "float32 weights"),
    "resume": (CHECKPOINT_BYTES_PER_PARAM, "weights and optimizer state"),
    "none": (0, "no weights"),
}
# Assumptions of `job_needs` for devices without measurements, deliberately pessimistic: small models are limited by kernel
# launches (several hundred per layer and step, 10 us each), larger ones by the throughput of a GPU several years old.
UNKNOWN_FLOPS_PER_S = 1e12
UNKNOWN_STEP_S = (5e-3, 5e-3)  # per step, and per step and layer
UNKNOWN_COMPILE_S = 60.0
# Host memory of the compiler's processes (2026, torch 2.13 on Linux: a worker takes 670 MB in all, 240 MB eager), of a GPU
# worker (CUDA libraries and pinned memory; assumed), and of the process of a cluster job that supervises workers.
COMPILER_BYTES, GPU_HOST_BYTES, JOB_BYTES = 0.45e9, 4e9, 0.15e9


def cpu_flops_per_s(n_params: float, compiled: bool) -> float:
    """FLOP/s of one core, interpolated in N between the two measured sizes and constant outside them."""
    low, high = CPU_COMPILED_FLOPS_PER_S if compiled else CPU_EAGER_FLOPS_PER_S
    share = min(1.0, max(0.0, (n_params - 7e3) / (200e3 - 7e3)))
    return low + share * (high - low)


@dataclass(frozen=True)
class Speeds:
    """Where the time of a run comes from: a probe of the device, else the CPU's measured speeds or the table of GPUs."""

    gpu: Device | None = None
    probe: Probe | None = None

    def run_seconds(self, run: PlannedRun) -> float | None:
        """Seconds for one worker to train one run, without compilation; None if the device's speed is unknown."""
        measured = None if self.probe is None else self.probe.run_seconds(run)
        if measured is not None:
            return measured
        if run.execution.device == "cpu":
            return run.spec.own_train_flops() / cpu_flops_per_s(run.spec.n_params(), run.execution.compile)
        return None if self.gpu is None or run.execution.device != "cuda" else run_seconds(run, self.gpu)

    def source(self, runs: Sequence[PlannedRun]) -> str:
        """Where the times of these runs come from, in words."""
        probed = 0
        if self.probe is not None:
            probed = sum(self.probe.run_seconds(run) is not None for run in runs)
        if probed == len(runs) and self.probe is not None:
            return f"measured steps on {self.probe.device}"
        if runs[0].execution.device == "cpu":
            rest = "speeds measured on another machine"
        elif self.gpu is not None:
            rest = f"the data sheet of {self.gpu.label} and an assumed MFU, not measured"
        else:
            rest = "assumed low speeds, not measured"
        return f"measured steps for {probed} of {len(runs)} runs, else {rest}" if probed else rest


UNMEASURED = Speeds()


def estimate_seconds(run: PlannedRun) -> float | None:
    """Seconds for one worker to train one run, without compilation; None for a device without measurements."""
    return UNMEASURED.run_seconds(run)


def estimate_plan_seconds(
    runs: Iterable[PlannedRun], workers: int, speeds: Speeds = UNMEASURED
) -> float | None:
    """Seconds until `workers` parallel workers have finished `runs`; None if the speed of a device is unknown."""
    runs = list(runs)
    seconds = [speeds.run_seconds(run) for run in runs]
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return None
    programs = {program_key(r.spec) for r in runs if r.execution.compile}
    busy = sum(known) + CPU_COMPILE_S * len(programs)
    return WORKER_START_S + max([busy / max(1, workers), *known])


@dataclass(frozen=True)
class DiskUse:
    """Disk space of a sweep, in bytes."""

    curves: int
    running: int
    """Checkpoints of the runs that are trained at the same time, at most, and of those kept for other runs to start from."""
    left: int
    """Weights, and optimizer state where it is kept, of finished runs."""


def disk_use(runs: Sequence[PlannedRun], concurrent: int, keep: str) -> DiskUse:
    """Disk space of a sweep of which `concurrent` runs (or stacks) are trained at a time; `keep` as in `LEFT_BEHIND`."""
    units: dict[str, int] = defaultdict(int)
    params = {run.run_id: run.spec.count().params.total for run in runs}
    for run in runs:
        units[run.execution.stack or run.run_id] += params[run.run_id]
    largest = sum(sorted(units.values(), reverse=True)[: max(1, concurrent)])
    for_others = sum(params[run.run_id] * len(run.spec.keep_steps) for run in runs)
    return DiskUse(
        curves=sum(min(run.spec.steps, MAX_CURVE_POINTS) * CURVE_LINE_BYTES for run in runs),
        running=CHECKPOINT_BYTES_PER_PARAM * (CHECKPOINTS_AT_ONCE * largest + for_others),
        left=LEFT_BEHIND[keep][0] * sum(params.values()),
    )


@dataclass(frozen=True)
class JobNeeds:
    """Time and memory to request from a cluster for one job, before any safety factor."""

    seconds: float
    host_bytes: float
    known: bool
    """Whether there is a speed for each run; otherwise the time is based on assumed ones, which are low for any GPU."""


def job_needs(
    runs: Sequence[PlannedRun], workers: int = 1, speeds: Speeds = UNMEASURED, gpus: int = 1
) -> JobNeeds:
    """Total time and host memory of a job that trains `runs` with `workers` parallel workers, on `gpus` GPUs if on CUDA."""
    seconds = [speeds.run_seconds(run) for run in runs]
    filled = [s if s is not None else _assumed_seconds(run) for run, s in zip(runs, seconds)]
    compiling = sum(
        CPU_COMPILE_S if run.execution.device == "cpu" else UNKNOWN_COMPILE_S
        for run in {program_key(r.spec): r for r in runs if r.execution.compile}.values()
    )
    largest = sorted((_worker_bytes(run) for run in runs), reverse=True)[: max(1, workers)]
    # Where the speed of a GPU is known it is that of one run at a time: workers that share a GPU add nothing to rely on.
    on_known_gpu = runs[0].execution.device == "cuda" and None not in seconds
    parallel = max(1, min(workers, gpus) if on_known_gpu else workers)
    return JobNeeds(
        seconds=WORKER_START_S + max([(sum(filled) + compiling) / parallel, *filled]),
        host_bytes=JOB_BYTES + sum(largest),
        known=None not in seconds,
    )


def _assumed_seconds(run: PlannedRun) -> float:
    step_s = UNKNOWN_STEP_S[0] + UNKNOWN_STEP_S[1] * run.spec.shape.depth
    return (run.spec.steps - run.spec.parent_step) * step_s + run.spec.own_train_flops() / UNKNOWN_FLOPS_PER_S


def _worker_bytes(run: PlannedRun) -> float:
    """Host memory of one worker: includes the model only on a CPU, and on any device the corpus and the copy of parameters
    and moments that a checkpoint is written from."""
    copy = CHECKPOINT_BYTES_PER_PARAM * run.spec.count().params.total * run.execution.stack_size
    compiler = COMPILER_BYTES if run.execution.compile else 0.0
    on_cpu = run.execution.device == "cpu"
    return copy + compiler + (device_bytes(run) if on_cpu else GPU_HOST_BYTES + _corpus_copies_bytes(run))


def device_bytes(run: PlannedRun) -> float:
    """Peak memory of a run (with its stack) on its device."""
    spec, execution = run.spec, run.execution
    sequences = execution.micro_batch_sequences or spec.batch_sequences
    corpus = _corpus_copies_bytes(run)
    return estimate_bytes(
        spec, execution.device, sequences, corpus, execution.stack_size, compiled=execution.compile
    )


def _corpus_copies_bytes(run: PlannedRun) -> float:
    """Twice the size of a run's training tokens; 0 if the data are not on this machine."""
    try:
        return 2.0 * corpus_bytes(run.spec, run.execution.stack_size)
    except (UserError, OSError):
        return 0.0
