"""A sweep of 24 small models (four sizes, three learning rates, two seeds) against the plain loop, one run after another.

Ours in full: starting workers, compilation, validation, curves, checkpoints, records; with a cold and with a warm compile
cache. The plain loop from a sample of the steps of one run of each size, at its best: one process, one compilation a size
with a warm cache, no checkpoints.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import bench_train

from gpu_checks.runner import Context
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, OptimizerSpec, Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.progress import LineReporter
from scaling_lab.launching.workers import run_workers
from scaling_lab.planning.execution import plan_executions
from scaling_lab.planning.settings import ExecutionSettings

# (width, depth, heads): 7 thousand to 0.4 million parameters.
SIZES = ((16, 1, 1), (32, 2, 2), (64, 2, 4), (96, 3, 6))
LR_FACTORS = (0.5, 1.0, 2.0)
SEEDS = (0, 1)
SEQUENCES, CONTEXT = {"full": 32, "tiny": 4}, 64
STEPS = {"full": 6000, "tiny": 6}
SAMPLE_STEPS = {"full": 200, "tiny": 4}


def specs_of(size: str) -> list[RunSpec]:
    tokens = SEQUENCES[size] * CONTEXT
    return [
        RunSpec(
            sweep="gpu_check", role="single", budget_flops=1.0, data=PySource(), schedule=Cosine(),
            shape=GPTShape(width=width, depth=depth, heads=heads, context=CONTEXT),
            # The default recipe's rule when this was written.
            optimizer=OptimizerSpec(peak_lr=factor * 0.0075 * (64 / width) ** 0.67), batch_tokens=tokens,
            train_tokens=STEPS[size] * tokens, eval=EvalSpec(tokens=8192 if size == "full" else 256),
            seed_init=seed, seed_data=seed,
        )
        for width, depth, heads in SIZES
        for factor in LR_FACTORS
        for seed in SEEDS
    ]  # fmt: skip


def plan_of(specs: list[RunSpec], device: str) -> Plan:
    """Executions as the planner chooses them."""
    executions = plan_executions(specs, ExecutionSettings(device=device, deterministic=device == "cpu"))
    runs = tuple(map(PlannedRun, specs, executions))
    return Plan("gpu_check", runs, specs[0].convention, specs[0].data.fingerprint())


def train_seconds(plan: Plan, folder: Path) -> float:
    """Wall time until every run has a record. Raises RuntimeError if one did not complete."""
    store = RunStore(folder)
    store.write_plan(plan)
    began = time.perf_counter()
    run_workers(store, plan, [run.run_id for run in plan.runs], LineReporter())
    seconds = time.perf_counter() - began
    bad = [run.run_id for run in plan.runs if store.state(run.run_id).state != "completed"]
    if bad:
        reason = store.state(bad[0]).reason
        raise RuntimeError(
            f"{len(bad)} of {len(plan.runs)} runs did not complete, such as {bad[0]}: {reason}"
        )
    return seconds


def plain_seconds(specs: list[RunSpec], device: str, size: str, compiled: bool) -> dict[str, Any]:
    """The plain loop: seconds of all runs, and what was measured."""
    of_shape = {spec.shape: spec for spec in specs}
    task = {
        "kind": "sweep", "device": device, "compile": compiled, "sample": SAMPLE_STEPS[size] / STEPS[size],
        "specs": [spec.to_dict() for spec in of_shape.values()],
    }  # fmt: skip
    if compiled:
        bench_train.call({**task, "sample": 0.0}, 1)  # warms the cache
    found = bench_train.call(task, 1)
    if "error" in found:
        raise RuntimeError(f"the plain loop failed: {found['error']}")
    each = dict(zip(of_shape, zip(found["first"], found["seconds"], strict=True), strict=True))
    first = sum(first for first, _ in each.values())
    return {
        "seconds": first + sum(each[spec.shape][1] - each[spec.shape][0] for spec in specs),
        "compile_s": first,
        "run_s": [round(total - first, 3) for first, total in each.values()],
    }


def run(context: Context) -> None:
    specs = specs_of(context.size)
    plan = plan_of(specs, context.device)
    compiled = not context.tiny
    stacks = {r.execution.stack for r in plan.runs if r.execution.stack is not None}
    context.write(
        runs=len(plan.runs),
        steps=STEPS[context.size],
        stacks=len(stacks),
        compiled=sum(r.execution.compile for r in plan.runs),
        plain_compiled=compiled,
    )
    # Its own cache, so that the first sweep is cold whatever ran before.
    folder = context.folder / "work" / "sweep"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    cold = train_seconds(plan, folder / "cold")
    context.write(ours_cold_s=round(cold, 2))
    plain = plain_seconds(specs, context.device, context.size, compiled)
    context.write(plain=plain)
    warm = train_seconds(plan, folder / "warm")
    context.write(ours_warm_s=round(warm, 2), times_faster=plain["seconds"] / warm)
    context.say(f"ours {cold:.1f} s cold, {warm:.1f} s warm; plain loop {plain['seconds']:.1f} s")
