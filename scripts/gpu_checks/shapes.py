"""Tokens/s and MFU of our step and of the plain loop, eager and compiled (scripts/bench_train.py), from 7k to 350M parameters.

All measurements are prepared at once (imports and compilation take most of the time), then timed one after another.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from typing import Any

import bench_train

from gpu_checks.runner import Context
from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import RunSpec
from scaling_lab.planning.execution import usable_cores
from scaling_lab.training.engine.devices import peak_flops_per_s

WAYS = ("ours", "eager", "compiled")
# Share of the part's time for preparing, and seconds of each timed measurement.
PREPARE_SHARE, MEASURE_S = 0.7, {"full": 2.0, "tiny": 0.2}
# Seconds that a measurement may take, once it is told to begin, beyond its own.
GRACE_S = 30.0


class Measurement:
    """One process of bench_train: it prepares, says `ready`, and measures when told to."""

    def __init__(self, row: int, way: str, task: dict[str, Any], threads: int, log: Any) -> None:
        self.row, self.way, self.task = row, way, task
        self.ready, self.found = threading.Event(), {"error": "ended without a result"}
        self.began = time.monotonic()
        self.prepared_s: float | None = None
        env = bench_train.child_environment(threads, None)
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # several compile at once
        self.process = subprocess.Popen(
            [bench_train.sys.executable, bench_train.__file__, "--child", json.dumps(task)],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "ready":
                self.prepared_s = round(time.monotonic() - self.began, 1)
                self.ready.set()
            elif line.startswith("{"):
                self.found = json.loads(line)
        if self.process.wait():
            self.found = {"error": f"exit status {self.process.returncode}"}

    @property
    def ended(self) -> bool:
        return not self._reader.is_alive()

    def measure(self, limit_s: float) -> dict[str, Any]:
        """Tell it to measure, and wait for the result."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except OSError:  # it has ended
            pass
        self._reader.join(max(0.0, limit_s))
        if not self.ended:
            self.stop()
            return {"error": f"no result within {limit_s:.0f} s"}
        return {**self.found, "prepared_s": self.prepared_s}

    def stop(self) -> None:
        self.process.kill()
        self._reader.join()


def run(context: Context) -> None:
    seconds = MEASURE_S[context.size]
    shapes = bench_train.GPU_SHAPES[:1] if context.tiny else bench_train.GPU_SHAPES[::-1]
    specs, tasks = zip(*(bench_train.shape_task(context.device, numbers, seconds) for numbers in shapes))
    rows = [empty_row(spec) for spec in specs]
    context.write(rows=rows, counted="6 N with the head plus attention over the full context")
    waiting = [
        (row, way, {**task, "kind": "ours" if way == "ours" else "plain", "compile": way == "compiled", "wait": True})
        for row, task in enumerate(tasks)
        for way in WAYS
    ]  # fmt: skip
    with open(context.logs / "shapes_stderr.txt", "wb") as log:
        ready, failed = prepare(context, waiting, log)
        for each in sorted(ready, key=lambda m: (m.row, WAYS.index(m.way))):
            keep(context, rows, specs, each.row, each.way, each.measure(seconds + GRACE_S))
        # Alone on the device: several at once may have been too much for its memory.
        for row, way, task in failed:
            again = Measurement(row, way, task, task["execution"]["threads"], log)
            while not again.ended and not again.ready.is_set():
                time.sleep(0.05)
            keep(context, rows, specs, row, way, again.measure(seconds + GRACE_S))
    if errors := [f"{row['shape']} {way}" for row in rows for way in WAYS if "error" in row[way]]:
        raise RuntimeError(f"no result for {', '.join(errors)}: see logs/shapes_stderr.txt")


def prepare(
    context: Context, waiting: list[tuple[int, str, dict[str, Any]]], log: Any
) -> tuple[list[Measurement], list[tuple[int, str, dict[str, Any]]]]:
    """(measurements that are ready, those that failed). One that is not ready in time is stopped and stays without a result."""
    until = time.monotonic() + PREPARE_SHARE * context.left_s()
    slots = max(2, min(len(waiting), usable_cores() // 2))
    begun: list[Measurement] = []
    preparing: list[Measurement] = []
    queue = list(waiting)
    while (queue or preparing) and time.monotonic() < until:
        while queue and len(preparing) < slots:
            row, way, task = queue.pop(0)
            preparing.append(Measurement(row, way, task, task["execution"]["threads"], log))
            begun.append(preparing[-1])
        time.sleep(0.05)
        preparing = [m for m in preparing if not m.ready.is_set() and not m.ended]
    for each in preparing:
        each.stop()
    ready = [m for m in begun if m.ready.is_set()]
    failed = [(m.row, m.way, m.task) for m in begun if not m.ready.is_set() and m not in preparing]
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
