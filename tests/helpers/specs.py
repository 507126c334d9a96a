"""Run specs for tests: a plain one, and one that trains in a fraction of a second."""

from __future__ import annotations

from dataclasses import replace

from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, OptimizerSpec, RunSpec

SHAPE = GPTShape(width=16, depth=1, heads=1)


def tiny(steps: int = 40, **changes) -> RunSpec:
    base = RunSpec(
        sweep="t", role="isoflop", budget_flops=1e9, shape=SHAPE, data=PySource(), schedule=Cosine(),
        optimizer=OptimizerSpec(peak_lr=0.02), batch_tokens=256, train_tokens=256 * steps,
        eval=EvalSpec(tokens=4096, points=4, max_cost_fraction=1.0),
    )  # fmt: skip
    return replace(base, **changes)


def spec(**changes) -> RunSpec:
    base = RunSpec(
        sweep="s", role="isoflop", budget_flops=1e11, shape=GPTShape(width=32, depth=2, heads=2), data=PySource(),
        schedule=Cosine(), optimizer=OptimizerSpec(peak_lr=0.02), batch_tokens=512, train_tokens=512_000,
    )  # fmt: skip
    return replace(base, **changes)
