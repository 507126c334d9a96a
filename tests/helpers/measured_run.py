"""Prints what a program of a few steps takes above the process itself, as its peak and in torch's allocations, and the estimate."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from helpers.peak_memory import peak_bytes
from helpers.specs import tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.spec import EvalSpec, Execution, RunSpec
from scaling_lab.planning.memory import HEAP_BYTES, PROCESS_BYTES, corpus_bytes, estimate_bytes
from scaling_lab.training.measure.noise_scale import NoiseProbe
from scaling_lab.training.run.session import open_program


def train(specs: list[RunSpec], execution: Execution, steps: int) -> None:
    """A few steps, an evaluation and a measurement of the noise, from building the models on."""
    program = open_program(specs, execution, stacked=len(specs) > 1)
    program.run_block(dict.fromkeys(range(len(specs)), 0), steps)
    session = program.sessions[0]
    session.evaluate()
    windows = session.feed.windows(0, 0, 2)
    NoiseProbe(session.step.model, session.step.layout, specs[0]).measure(session.step.flat, windows)


def allocated_bytes(specs: list[RunSpec], execution: Execution) -> int:
    """The peak of torch's allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(specs, execution, 1)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main(case: dict[str, Any]) -> None:
    sequences, members, compiled = case["sequences"], case.get("members", 1), case.get("compiled", False)
    shape = GPTShape(**case["shape"])
    tokens = shape.context * sequences
    spec = tiny(
        1, shape=shape, batch_tokens=tokens, train_tokens=2 * tokens, dtype=case.get("dtype", "float32"),
        eval=EvalSpec(tokens=256), unique_tokens=2 * tokens,
    )  # fmt: skip
    specs = [replace(spec, seed_init=k, seed_data=k) for k in range(members)]
    execution = Execution(
        compile=compiled,
        stack="a" if members > 1 else None,
        stack_size=members,
        threads=case.get("threads", 1),
    )
    # The corpus, kernels and the compiler belong to the process.
    train([tiny(2, dtype=spec.dtype)], replace(execution, stack=None, stack_size=1), 1)
    if compiled:
        torch.compile(lambda x: (x @ x).sum())(torch.ones(8, 8))
    before = peak_bytes()
    train(specs, execution, 2)
    estimate = estimate_bytes(spec, "cpu", sequences, corpus_bytes(spec, members), members, compiled=compiled)
    print(
        json.dumps(
            {
                "params": shape.count().params.total * members,
                "process": before,
                "peak": peak_bytes() - before,
                "allocated": None if compiled else allocated_bytes(specs, execution),
                "estimate": estimate - PROCESS_BYTES["cpu"],
                "heap": HEAP_BYTES["cpu"],
            }
        )
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(sys.argv[1]))
