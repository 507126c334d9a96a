#!/usr/bin/env python
"""Time that the host needs per step of training, for one run and for a stack of 64, with a device that takes no time.

Everything but the steps is real: the order of the data, learning rates and corrections, blocks, curves, and the files of each run.
On a GPU this time is hidden as long as it is shorter than the device's (`Program.overlaps`).

    scripts/bench_host.py [--steps N] [--batch SEQUENCES] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import scaling_lab.training.run.session as session
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, PlannedRun, RunSpec
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.measure.evaluation import EvaluationResult
from scaling_lab.training.run.loop import ClaimedRun, train_together
from scaling_lab.training.run.member import Member

STACK = 64
spent_s: defaultdict[str, float] = defaultdict(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32, help="sequences of 64 tokens in a batch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measure_calls()
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, microseconds per step"
    ]
    lines.append(f"{'':12}{'inputs':>10}{'records':>10}{'all':>10}{'all, ms per block of 64':>26}")
    for name, members in (("one run", 1), (f"stack of {STACK}", STACK)):
        found = measure(members, options.steps, options.batch)
        columns = "".join(f"{found[key] * 1e6:10.1f}" for key in ("inputs", "records", "all"))
        lines.append(f"{name:12}{columns}{found['all'] * 64e3:26.2f}")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def measure(members: int, steps: int, batch: int) -> dict[str, float]:
    """Seconds per step of the whole program, by what they are spent on."""
    spec = RunSpec(
        sweep="bench", role="isoflop", budget_flops=1e9, shape=GPTShape(width=16, depth=1, heads=1), data=PySource(),
        schedule=Cosine(), optimizer=OptimizerSpec(peak_lr=0.01), batch_tokens=64 * batch, train_tokens=64 * batch * steps,
        eval=EvalSpec(tokens=64, points=1),
    )  # fmt: skip
    execution = Execution(stack="bench" if members > 1 else None, stack_size=members)
    group = [PlannedRun(replace(spec, seed_init=k, seed_data=k), execution) for k in range(members)]
    with tempfile.TemporaryDirectory() as folder:
        store, claims = RunStore(folder), {}
        for planned in group:
            claim = store.claim(planned.spec)
            assert claim is not None
            claims[planned.run_id] = ClaimedRun(claim)
        spent_s.clear()
        trained = train_together(group, claims, store, checkpoint_every_s=1e9)
    for member in trained:
        if member.error is not None:
            raise member.error
    parts = {"inputs": spent_s["inputs"], "records": spent_s["records"]}
    return {name: seconds / steps for name, seconds in {**parts, "all": sum(parts.values())}.items()}


def measure_calls() -> None:
    """Replace the step by one that takes no time, and time the host's work."""

    def run(step: TrainStep, starts: Tensor, controls: Tensor) -> Tensor:
        return torch.full((*controls.shape[:-1], 3), 5.0)

    TrainStep.run = run
    session.TrainingSession.evaluate = lambda self: EvaluationResult(5.0, 0.1)
    session.TrainingSession.measure_noise = lambda *_: None
    session.Program._make_inputs = timed("inputs", session.Program._make_inputs)
    Member.add_block = timed("records", Member.add_block)


def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def measured(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return work(*arguments)
        finally:
            spent_s[name] += time.thread_time() - began

    return measured


if __name__ == "__main__":
    main()
