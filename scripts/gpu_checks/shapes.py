"""Tokens/s and MFU of our step and of the plain loop, eager and compiled (scripts/bench_train.py), from 7k to 350M parameters.

All measurements are prepared at once (imports and compilation take most of the time), then timed one after another.
"""

from __future__ import annotations

import time
from typing import Any

import bench_train

from gpu_checks.measurement import Measurement
from gpu_checks.runner import Context
from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import RunSpec
from scaling_lab.planning.execution import usable_cores
from scaling_lab.training.engine.devices import peak_flops_per_s

WAYS = ("ours", "eager", "compiled")
Waiting = tuple[int, str, dict[str, Any]]
# Seconds of each timed measurement, what is kept for it beyond that when preparing ends, and what it may take at most.
MEASURE_S, RESERVE_S, GRACE_S = {"full": 1.5, "tiny": 0.2}, 1.5, 30.0


def run(context: Context) -> None:
    seconds = MEASURE_S[context.size]
    shapes = bench_train.GPU_SHAPES[:1] if context.tiny else bench_train.GPU_SHAPES[::-1]
    # On a CPU a step of ours is compiled into a library, which is not what a GPU does: tiny leaves that out.
    specs, tasks = zip(*(bench_train.shape_task(context.device, numbers, seconds) for numbers in shapes))
    for task in tasks:
        task["execution"]["compile"] = not context.tiny
    rows = [empty_row(spec) for spec in specs]
    context.write(rows=rows, counted="6 N with the head plus attention over the full context")
    waiting = [
        (row, way, {**task, "kind": "ours" if way == "ours" else "plain", "compile": way == "compiled"})
        for row, task in enumerate(tasks)
        for way in WAYS
    ]  # fmt: skip
    with open(context.logs / "shapes_stderr.txt", "wb") as log:
        ready, failed = prepare(context, waiting, log)
        for row, way, each in sorted(ready, key=lambda m: (m[0], WAYS.index(m[1]))):
            keep(context, rows, specs, row, way, each.measure(seconds + GRACE_S))
        # Alone on the device: several at once may have been too much for its memory.
        for row, way, task in failed:
            again = Measurement(task, log)
            again.wait_until_ready()
            keep(context, rows, specs, row, way, again.measure(seconds + GRACE_S))
    if errors := [f"{row['shape']} {way}" for row in rows for way in WAYS if "error" in row[way]]:
        raise RuntimeError(f"no result for {', '.join(errors)}: see logs/shapes_stderr.txt")


def prepare(
    context: Context, waiting: list[Waiting], log: Any
) -> tuple[list[tuple[int, str, Measurement]], list[Waiting]]:
    """(measurements that are ready, what failed). One that is not ready in time is stopped and stays without a result."""
    reserve = len(waiting) * (MEASURE_S[context.size] + RESERVE_S)
    until = time.monotonic() + context.left_s() - reserve
    slots = max(2, min(len(waiting), usable_cores() // 2))
    queue, begun = list(waiting), []
    preparing: list[Measurement] = []
    while (queue or preparing) and time.monotonic() < until:
        while queue and len(preparing) < slots:
            row, way, task = queue.pop(0)
            preparing.append(Measurement(task, log))
            begun.append((row, way, task, preparing[-1]))
        time.sleep(0.05)
        preparing = [m for m in preparing if not m.ready.is_set() and not m.ended]
    for late in preparing:
        late.stop()
    ready = [(row, way, m) for row, way, _, m in begun if m.ready.is_set()]
    failed = [(row, way, task) for row, way, task, m in begun if not m.ready.is_set() and m not in preparing]
    return ready, failed


def empty_row(spec: RunSpec) -> dict[str, Any]:
    sizes = {"n_params": spec.n_params(), "tokens_per_step": spec.batch_tokens}
    missing = {way: {"error": "not ready in time"} for way in WAYS}
    return {
        "shape": bench_train.shape_label(spec),
        **sizes,
        **missing,
        "over_compiled": None,
        "ours_mfu": None,
    }


def keep(
    context: Context, rows: list[dict[str, Any]], specs: Any, row: int, way: str, found: dict[str, Any]
) -> None:
    """Add a measurement to its row, with its MFU and the ratio to the compiled loop where they are known."""
    import torch

    spec, line = specs[row], rows[row]
    if "tokens_per_s" in found:
        peak = peak_flops_per_s(torch.device(context.device), spec.dtype)
        flops_per_token = spec.count().flops_per_token(Convention.MATMUL_PLUS_ATTENTION)
        found["mfu"] = None if peak is None else found["tokens_per_s"] * flops_per_token / peak
    line[way] = found
    line["ours_mfu"] = line["ours"].get("mfu")
    ours, theirs = (line[each].get("tokens_per_s") for each in ("ours", "compiled"))
    line["over_compiled"] = ours / theirs if ours and theirs else None
    context.write(rows=rows)
    rate = f"{found['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in found else found["error"]
    context.say(f"{line['shape']} {way}: {rate}")
