"""Owns how runs are computed: compiled or not, threads, micro-batches, stacks. Rules that depend on the plan and the kind of
machine alone, so that planning twice says the same; what they say is in plan.json, and nothing changes it afterwards."""

from __future__ import annotations

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
# eager 10-15 GFLOP/s (measured, results/LOG.md): it is repaid above about this many FLOPs of one program.
COMPILE_REPAID_FLOPS = 2e11
# Up to here a compiled step serves every batch of its shape (training/engine/library.py, which keeps constants of this length).
LIBRARY_PARAMS = 2e6
# From here on a step's matrices are large enough to keep several threads busy, and one process a core would hold as many
# copies of parameters and activations: runs take all cores, one after the other. Below, one-thread workers win clearly
# (results/LOG.md: 2.5 times at 33k parameters).
THREADED_PARAMS = 1e7
# Above this a GPU is busy with one run; below, its kernels are too short and a stack fills it.
STACKED_PARAMS = 1e7
MAX_STACK = {"cuda": 64, "cpu": 8, "mps": 1}
# On a CPU a stack takes runs from other workers and gains 1.2-1.4 times, compiled: only where every core has one.
MIN_CPU_STACK = 2
# Members of one stack may end so much earlier than the longest: a slot at rest still computes.
MAX_HORIZON_RATIO = 1.25
# A run below this much memory is not divided for the sake of a CPU's neighbours: what it takes is mostly the process itself.
SMALL_RUN_GB = 2.0
# Share of the device's memory that is planned with.
USABLE_MEMORY = 0.85
# Of control groups, version 2 and 1.
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def executions(specs: list[RunSpec], settings: ExecutionSettings) -> list[Execution]:
    """How each run is computed.

    On a CPU a program is compiled where all its runs together repay it and a C++ compiler is there.
    """
    group_flops: dict[Any, float] = defaultdict(float)
    for spec in specs:
        group_flops[program_key(spec)] += spec.own_train_flops()
    threads = settings.threads or threads_for(specs, settings)
    if settings.memory_gb is None and settings.device == "cpu":
        settings = replace(settings, memory_gb=share_of_memory_gb(settings, threads))

    @cache  # asked for thousands of runs
    def can_compile() -> bool:
        # On CUDA Triton builds its launcher with a C compiler.
        return has_compiler("cc", "gcc", "clang") if settings.device == "cuda" else can_compile_on_cpu()

    def compiled(spec: RunSpec) -> bool:
        if settings.compile != "auto":
            return settings.compile == "true"
        if settings.device == "cuda":
            return can_compile()
        repaid = group_flops[program_key(spec)] >= COMPILE_REPAID_FLOPS
        return settings.device == "cpu" and repaid and can_compile()

    alone = [Execution(settings.device, compiled(s), threads, settings.deterministic) for s in specs]
    return fitted(specs, stacked(specs, alone, settings), settings)


def program_key(spec: RunSpec) -> Any:
    """Runs with the same key share one compiled program on a CPU: those of a shape, or of a shape and batch."""
    small = spec.count().params.total <= LIBRARY_PARAMS
    return (spec.shape,) if small else (spec.shape, spec.batch_tokens)


def threads_for(specs: Sequence[RunSpec], settings: ExecutionSettings) -> int:
    """One thread a run, or all cores where the plan's largest model can use them. One number for a whole plan: its
    workers share the machine."""
    if settings.device != "cpu":
        return 1
    largest = max(spec.count().n_params(Convention.SIX_N_WITH_HEAD) for spec in specs)
    return (settings.cores or usable_cores()) if largest >= THREADED_PARAMS else 1


def stacked(
    specs: Sequence[RunSpec], alone: Sequence[Execution], settings: ExecutionSettings
) -> list[Execution]:
    """`alone`, and the runs that go together in stacks named."""
    out = list(alone)
    if settings.stack == "false" or MAX_STACK[settings.device] < 2:
        return out
    alike: dict[Any, list[int]] = defaultdict(list)
    for k, spec in enumerate(specs):
        small = spec.count().n_params(Convention.SIX_N_WITH_HEAD) <= STACKED_PARAMS
        # A run that continues another one cannot begin with the rest.
        if small and spec.parent is None and (settings.device == "cuda" or alone[k].compile):
            alike[stack_key(spec)].append(k)
    for members in alike.values():
        members.sort(key=lambda k: (-specs[k].steps, k))
        for part in split_stack(members, specs, settings):
            name = f"{specs[part[0]].run_id()}x{len(part)}"
            for k in part:
                out[k] = replace(out[k], stack=name, stack_size=len(part))
    return out


def stack_key(spec: RunSpec) -> Any:
    """What the members of a stack have in common; LR, schedule, clipping, decay, seeds and horizon are each one's own."""
    optimizer = spec.optimizer
    return (
        spec.shape, spec.parametrization, spec.data, spec.batch_tokens, spec.dtype, spec.eval,
        optimizer.beta1, optimizer.beta2, optimizer.eps,
    )  # fmt: skip


def split_stack(
    members: Sequence[int], specs: Sequence[RunSpec], settings: ExecutionSettings
) -> list[list[int]]:
    """Runs alike, longest first, in parts of nearly equal horizon that fit the device; single runs are left out."""
    near: list[list[int]] = []
    for k in members:
        if near and specs[near[-1][0]].steps <= MAX_HORIZON_RATIO * specs[k].steps:
            near[-1].append(k)
        else:
            near.append([k])
    parts = []
    for group in near:
        most = MAX_STACK[settings.device]
        if settings.device == "cpu":
            most = min(most, len(group) // (settings.cores or usable_cores()))
            if most < MIN_CPU_STACK:
                continue
        spec, limit = specs[group[0]], usable_bytes(settings)
        while (
            limit
            and most > 1
            and estimate_bytes(spec, settings.device, spec.batch_sequences, corpus_bytes(spec, most), most)
            > limit
        ):
            most -= 1
        # Parts of equal size, so that none is a straggler.
        count = -(-len(group) // max(1, most))
        parts += [group[i::count] for i in range(count)]
    return [part for part in parts if len(part) > 1]


def fitted(
    specs: Sequence[RunSpec], planned: Sequence[Execution], settings: ExecutionSettings
) -> list[Execution]:
    """Micro-batches for the runs whose whole batch would not fit the device's memory."""
    limit = usable_bytes(settings)
    if limit is None:
        return list(planned)
    known: dict[Any, int | None] = {}  # of thousands of runs few differ in what decides

    def size(spec: RunSpec, members: int) -> int | None:
        key = (spec.shape, spec.data, spec.batch_tokens, spec.dtype, spec.unique_tokens, members)
        if key not in known:
            known[key] = micro_batch(spec, settings.device, limit, corpus_bytes(spec, members), members)
        return known[key]

    return [
        replace(execution, micro_batch_sequences=found)
        if (found := size(spec, execution.stack_size))
        else execution
        for spec, execution in zip(specs, planned, strict=True)
    ]


def share_of_memory_gb(settings: ExecutionSettings, threads: int) -> float | None:
    """What each of the runs side by side on a CPU may take, of all that its machine has; None where nobody knows."""
    total = machine_gb()
    if total is None:
        return None
    side_by_side = max(1, (settings.cores or usable_cores()) // threads)
    return max(SMALL_RUN_GB, total / side_by_side)


def machine_gb() -> int | None:
    """Memory of this machine in whole GB, so that machines of one kind plan alike, or less where a container has less."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(path).read_text()))
    return int(min(limits) // 1e9) if limits else None


def usable_bytes(settings: ExecutionSettings) -> float | None:
    """What one run may take; None where the device's memory is not known."""
    return None if settings.memory_gb is None else USABLE_MEMORY * settings.memory_gb * 1e9


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_compile_on_cpu() -> bool:
    """Whether torch.compile has what it needs here: a C++ compiler and Python's headers (on Linux; elsewhere more)."""
    return sys.platform == "linux" and has_compiler("g++", "clang++", "c++")


def has_compiler(*names: str) -> bool:
    """A compiler of one of these names, and the headers that what torch.compile writes includes."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in names)
