"""A sweep of 24 small models (four sizes, three learning rates, two seeds) against the plain loop, one run after another.

Ours in full: starting workers, loading what was compiled, validation, curves, checkpoints, records. A short sweep before it,
with a cold compile cache, shows what compiling takes. The plain loop at its best: steps and validation alone, measured on
one run of each size, without starting, compilation, records or checkpoints.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from gpu_checks.measurement import Measurement
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
from scaling_lab.training.measure.evaluation import evaluation_steps

# (width, depth, heads): 7 thousand to 0.4 million parameters.
SIZES = ((16, 1, 1), (32, 2, 2), (64, 2, 4), (96, 3, 6))
LR_FACTORS = (0.5, 1.0, 2.0)
SEEDS = (0, 1)
SEQUENCES, CONTEXT = {"full": 32, "tiny": 4}, 64
STEPS = {"full": 15_000, "tiny": 6}
# Of the sweep that compiles, and of the plain loop's sample.
COLD_STEPS, SAMPLE_STEPS = {"full": 64, "tiny": 3}, {"full": 400, "tiny": 4}
PLAIN_LIMIT_S = 60.0


def specs_of(size: str, steps: int) -> list[RunSpec]:
    tokens = SEQUENCES[size] * CONTEXT
    return [
        RunSpec(
            sweep="gpu_check", role="single", budget_flops=1.0, data=PySource(), schedule=Cosine(),
            shape=GPTShape(width=width, depth=depth, heads=heads, context=CONTEXT),
            # The default recipe's rule when this was written.
            optimizer=OptimizerSpec(peak_lr=factor * 0.0075 * (64 / width) ** 0.67), batch_tokens=tokens,
            train_tokens=steps * tokens, eval=EvalSpec(tokens=8192 if size == "full" else 256),
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


def plain_task(specs: list[RunSpec], device: str, size: str, compiled: bool) -> dict[str, Any]:
    """The plain loop on one run of each size."""
    of_shape = {spec.shape: spec.to_dict() for spec in specs}
    return {
        "kind": "sequence", "device": device, "compile": compiled, "sample_steps": SAMPLE_STEPS[size],
        "specs": list(of_shape.values()),
    }  # fmt: skip


def plain_seconds(specs: list[RunSpec], found: dict[str, Any]) -> float:
    """All runs with the plain loop, one after another, from its steps and evaluations."""
    if "error" in found:
        raise RuntimeError(f"the plain loop failed: {found['error']}")
    shapes = list(dict.fromkeys(spec.shape for spec in specs))
    measured = dict(zip(shapes, found["runs"], strict=True))
    return sum(
        spec.steps * measured[spec.shape]["step_s"]
        + len(evaluation_steps(spec)) * measured[spec.shape]["evaluation_s"]
        for spec in specs
    )


def run(context: Context) -> None:
    size, device = context.size, context.device
    specs = specs_of(size, STEPS[size])
    plan, cold_plan = (plan_of(each, device) for each in (specs, specs_of(size, COLD_STEPS[size])))
    compiled = not context.tiny
    context.write(
        runs=len(plan.runs),
        steps=STEPS[size],
        stacks=len({r.execution.stack for r in plan.runs if r.execution.stack is not None}),
        compiled=sum(r.execution.compile for r in plan.runs),
        plain_compiled=compiled,
    )
    # Its own cache, so that the first sweep is cold whatever ran before.
    folder = context.folder / "work" / "sweep"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    with open(context.logs / "sweep_plain.txt", "wb") as log:
        # The plain loop compiles while ours does.
        plain = Measurement(plain_task(specs, device, size, compiled), log)
        cold = train_seconds(cold_plan, folder / "cold")
        context.write(cold_steps=COLD_STEPS[size], ours_cold_s=round(cold, 2))
        plain.wait_until_ready()
        found = plain.measure(PLAIN_LIMIT_S)
    plain_s = plain_seconds(specs, found)
    context.write(plain={"seconds": plain_s, **found})
    warm = train_seconds(plan, folder / "warm")
    context.write(ours_warm_s=round(warm, 2), times_faster=plain_s / warm)
    context.say(f"ours {warm:.1f} s, plain loop {plain_s:.1f} s")
