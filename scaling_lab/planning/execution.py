"""How runs are computed: compilation, threads, micro-batches, stacks.

These rules depend only on the plan and the type of machine, so that planning is reproducible. Their result is written to
plan.json and is not changed afterwards.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.planning.memory import corpus_bytes, estimate_bytes, micro_batch
from scaling_lab.planning.settings import ExecutionSettings

# On a CPU, compiling a tiny model's whole step costs 10-25 s of one core and makes it about 2.5 times faster than the
# eager 10-15 GFLOP/s (measured, results/LOG.md): it pays off if one program computes more than about this many FLOPs.
MIN_COMPILED_FLOPS = 2e11
# On CUDA compilation pays off if it saves as much time as it takes: COMPILE_S seconds for each program (assumed; planning/devices.py
# shows plans with it).
COMPILE_S = 60.0
# What it saves, assumed: about 150 of the 200 kernels of a layer's eager step (counted in a trace, results/LOG.md), which take 1.5
# us each in a CUDA graph however small; and a third of the time of large matrix products and of what lies between them, at the
# 1e14 FLOP/s that an eager bfloat16 loop reaches on a data center GPU. A model of 1e7 parameters with 20 tokens each repays it.
SAVED_S_PER_LAYER_STEP = 150 * 1.5e-6
SAVED_S_PER_FLOP = 1 / 3 / 1e14
# Up to this size a compiled step works for every batch size (training/engine/step_library.py embeds constants of this length).
LIBRARY_PARAMS = 2e6
# From this size a step's matrices keep several threads busy, and one process per core would hold that many copies of
# parameters and activations: runs use all cores, one run at a time. Below, one-thread workers are clearly faster
# (results/LOG.md: 2.5 times at 33k parameters).
THREADED_PARAMS = 1e7
# Larger models fill a GPU by themselves; smaller ones have kernels too short to do so, and are stacked.
STACKED_PARAMS = 1e7
MAX_STACK = {"cuda": 64, "cpu": 8, "mps": 1}
# On a CPU a stack takes runs from other workers and speeds up compiled steps 1.2-1.4 times: only if every core has a stack.
MIN_CPU_STACK = 2
# Maximum ratio of the horizons in a stack: a finished member's slot still costs compute.
MAX_HORIZON_RATIO = 1.25
# Runs on a CPU may always use this much: below it, memory is mostly the process itself, which micro-batches do not reduce.
SMALL_RUN_GB = 2.0
# Fraction of the device's memory that plans may use.
USABLE_MEMORY = 0.85
# Control groups, version 2 and 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def plan_executions(specs: list[RunSpec], settings: ExecutionSettings) -> list[Execution]:
    """How each run is computed.

    A program is compiled if its runs together are long enough to pay for it and the compiler that it needs is available.
    """
    program_flops: dict[Any, float] = defaultdict(float)
    for spec in specs:
        program_flops[program_key(spec)] += spec.own_train_flops()
    threads = settings.threads or threads_for(specs, settings)
    if settings.memory_gb is None and settings.device == "cpu":
        settings = replace(settings, memory_gb=memory_per_run_gb(settings, threads))

    @cache  # called for thousands of runs
    def can_compile() -> bool:
        # Triton builds its CUDA launcher with a C compiler.
        return has_compiler("cc", "gcc", "clang") if settings.device == "cuda" else can_compile_on_cpu()

    def compiled(spec: RunSpec) -> bool:
        if settings.compile != "auto":
            return settings.compile == "true"
        pays_off = program_flops[program_key(spec)] >= MIN_COMPILED_FLOPS
        return settings.device == "cpu" and pays_off and can_compile()

    base = Execution(
        settings.device, threads=threads, deterministic=settings.deterministic, keep=settings.keep
    )
    unstacked = [replace(base, compile=compiled(s)) for s in specs]
    planned = with_stacks(specs, unstacked, settings)
    if settings.device == "cuda" and settings.compile == "auto" and can_compile():
        planned = compiled_if_repaid(specs, planned)
    return with_micro_batches(specs, planned, settings)


def compiled_if_repaid(specs: Sequence[RunSpec], planned: Sequence[Execution]) -> list[Execution]:
    """The executions on CUDA, compiled where all runs of a program together save more time than its compilation takes."""
    saved_s: dict[Any, float] = defaultdict(float)
    steps: dict[Any, dict[str, int]] = defaultdict(dict)
    for spec, execution in zip(specs, planned, strict=True):
        program = cuda_program_key(spec, execution)
        saved_s[program] += spec.own_train_flops() * SAVED_S_PER_FLOP
        # The kernels of a stack are launched once for all of its members.
        launched = execution.stack or spec.run_id()
        steps[program][launched] = max(steps[program].get(launched, 0), spec.steps - spec.parent_step)
    for program, counts in steps.items():
        saved_s[program] += sum(counts.values()) * program[0].depth * SAVED_S_PER_LAYER_STEP
    return [
        replace(execution, compile=saved_s[cuda_program_key(spec, execution)] >= COMPILE_S)
        for spec, execution in zip(specs, planned, strict=True)
    ]


def cuda_program_key(spec: RunSpec, execution: Execution) -> Any:
    """Runs with the same key share one compiled program on CUDA (training/engine/shared_programs.py): alone whatever their
    batches, in stacks those of one batch."""
    batch = spec.batch_tokens if execution.stack else None
    return (spec.shape, spec.dtype, execution.stack_size, batch)


def program_key(spec: RunSpec) -> Any:
    """Runs with the same key share one compiled program on a CPU: same shape, and for larger models same batch."""
    small = spec.count().params.total <= LIBRARY_PARAMS
    return (spec.shape,) if small else (spec.shape, spec.batch_tokens)


def threads_for(specs: Sequence[RunSpec], settings: ExecutionSettings) -> int:
    """One thread per run, or all cores if the plan's largest model can use them. The same for the whole plan, since its
    workers share the machine."""
    if settings.device != "cpu":
        return 1
    largest = max(spec.count().n_params(Convention.SIX_N_WITH_HEAD) for spec in specs)
    return (settings.cores or usable_cores()) if largest >= THREADED_PARAMS else 1


def with_stacks(
    specs: Sequence[RunSpec], unstacked: Sequence[Execution], settings: ExecutionSettings
) -> list[Execution]:
    """The executions, with runs that train together assigned to named stacks."""
    out = list(unstacked)
    if settings.stack == "false" or MAX_STACK[settings.device] < 2:
        return out
    compatible: dict[Any, list[int]] = defaultdict(list)
    for k, spec in enumerate(specs):
        small = spec.count().n_params(Convention.SIX_N_WITH_HEAD) <= STACKED_PARAMS
        # A run that continues another one cannot start together with the rest.
        if small and spec.parent is None and (settings.device == "cuda" or unstacked[k].compile):
            compatible[stack_key(spec)].append(k)
    for members in compatible.values():
        members.sort(key=lambda k: (-specs[k].steps, k))
        for part in split_stack(members, specs, unstacked, settings):
            name = f"{specs[part[0]].run_id()}x{len(part)}"
            for k in part:
                out[k] = replace(out[k], stack=name, stack_size=len(part))
    return out


def stack_key(spec: RunSpec) -> Any:
    """What all members of a stack share; LR, schedule, clipping, decay, seeds and horizon may differ."""
    optimizer = spec.optimizer
    return (
        spec.shape, spec.parametrization, spec.data, spec.batch_tokens, spec.dtype, spec.eval,
        optimizer.beta1, optimizer.beta2, optimizer.eps,
    )  # fmt: skip


def split_stack(
    members: Sequence[int],
    specs: Sequence[RunSpec],
    unstacked: Sequence[Execution],
    settings: ExecutionSettings,
) -> list[list[int]]:
    """Split compatible runs, longest first, into stacks of similar horizon that fit the device; single runs are omitted."""
    similar: list[list[int]] = []
    for k in members:
        if similar and specs[similar[-1][0]].steps <= MAX_HORIZON_RATIO * specs[k].steps:
            similar[-1].append(k)
        else:
            similar.append([k])
    parts = []
    for group in similar:
        most = MAX_STACK[settings.device]
        if settings.device == "cpu":
            most = min(most, len(group) // (settings.cores or usable_cores()))
            if most < MIN_CPU_STACK:
                continue
        if limit := usable_bytes(settings):
            most = stack_that_fits(specs[group[0]], most, limit, unstacked[group[0]])
        # Equal sizes, so that no small stack is left over.
        count = -(-len(group) // max(1, most))
        parts += [group[i::count] for i in range(count)]
    return [part for part in parts if len(part) > 1]


def stack_that_fits(spec: RunSpec, most: int, limit_bytes: float, execution: Execution) -> int:
    """How many such runs fit the memory together, up to `most`; at least 1."""

    def needed(size: int) -> float:
        corpus = corpus_bytes(spec, size)
        return estimate_bytes(
            spec, execution.device, spec.batch_sequences, corpus, size, compiled=execution.compile
        )

    return next((size for size in range(most, 1, -1) if needed(size) <= limit_bytes), 1)


def with_micro_batches(
    specs: Sequence[RunSpec], planned: Sequence[Execution], settings: ExecutionSettings
) -> list[Execution]:
    """The executions, with micro-batches for runs whose whole batch would not fit in the device's memory."""
    limit = usable_bytes(settings)
    if limit is None:
        return list(planned)
    known: dict[Any, int | None] = {}  # thousands of runs share few distinct keys

    def size(spec: RunSpec, execution: Execution) -> int | None:
        members, compiled = execution.stack_size, execution.compile
        key = (spec.shape, spec.data, spec.batch_tokens, spec.dtype, spec.unique_tokens, members, compiled)
        if key not in known:
            corpus = corpus_bytes(spec, members)
            known[key] = micro_batch(spec, settings.device, limit, corpus, members, compiled=compiled)
        return known[key]

    return [
        replace(execution, micro_batch_sequences=found) if (found := size(spec, execution)) else execution
        for spec, execution in zip(specs, planned, strict=True)
    ]


def memory_per_run_gb(settings: ExecutionSettings, threads: int) -> float | None:
    """Memory available to each of the runs that share a CPU machine; None if the machine's memory is unknown."""
    total = machine_memory_gb()
    if total is None:
        return None
    parallel_runs = max(1, (settings.cores or usable_cores()) // threads)
    return max(SMALL_RUN_GB, total / parallel_runs)


def machine_memory_gb() -> int | None:
    """Memory of this machine, or of its container if that is limited, in whole GB so that similar machines plan alike."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(path).read_text()))
    return int(min(limits) // 1e9) if limits else None


def usable_bytes(settings: ExecutionSettings) -> float | None:
    """Memory that one run may use; None if the device's memory is unknown."""
    return None if settings.memory_gb is None else USABLE_MEMORY * settings.memory_gb * 1e9


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator_is_possible() -> bool:
    """Whether torch may find a GPU here: false only where no driver of one can be loaded."""
    if sys.platform == "darwin" or Path("/dev/kfd").exists():  # Apple's and AMD's
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def can_compile_on_cpu() -> bool:
    """Whether torch.compile works here: needs Linux, a C++ compiler and Python's headers."""
    return sys.platform == "linux" and has_compiler("g++", "clang++", "c++")


def has_compiler(*names: str) -> bool:
    """Whether one of these compilers is installed, and Python's headers, which code generated by torch.compile includes."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in names)
