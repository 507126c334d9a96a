"""The runs that one process and a team of two both train (see team.py)."""

from __future__ import annotations

from dataclasses import replace

from helpers.specs import SHAPE, tiny
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.spec import Execution, OptimizerSpec, Plan, PlannedRun

STEPS = 24
SPECS = {
    "even": tiny(STEPS),
    "uneven": tiny(STEPS, batch_tokens=192, train_tokens=192 * STEPS),  # two sequences and one
    # A small LR: gradients that are zero but for rounding (of gpt2's key biases) move Adam by as much as any.
    "tied": tiny(STEPS, shape=GPT2Shape(width=16, depth=2, heads=2), optimizer=OptimizerSpec(peak_lr=0.002)),
    "bfloat16": tiny(STEPS, dtype="bfloat16"),
    "tied-bfloat16": tiny(
        STEPS,
        shape=GPT2Shape(width=16, depth=2, heads=2),
        optimizer=OptimizerSpec(peak_lr=0.002),
        dtype="bfloat16",
    ),
    # Two processes compute its logits in chunks (LOGITS_AT_ONCE below), one process computes them at once.
    "vocabulary": tiny(STEPS, shape=replace(SHAPE, vocab_size=1000)),
    # Its corpus is not held on the device: all processes read chunks of it (CHUNK_STEPS below).
    "generated": tiny(STEPS, data=ContextTree(), noise=0.1, seed_data=4),
}
# Those that are also trained with gradients summed during the backward pass, in buckets of so many bytes: several of a model.
OVERLAPPED = ("uneven", "tied", "bfloat16", "vocabulary")
BUCKET_BYTES = 4096
CHUNK_STEPS = 5
LOGITS_AT_ONCE = 2**16  # of `vocabulary` a share's 2 sequences have 128,000, of all others at most 49,152
STACK = tuple(tiny(steps, seed_init=seed, seed_data=seed) for steps, seed in ((STEPS, 1), (STEPS // 2, 2)))


def planned_stack() -> Plan:
    execution = Execution(stack="s", stack_size=len(STACK))
    runs = tuple(PlannedRun(spec, execution) for spec in STACK)
    return Plan("t", runs, STACK[0].convention, STACK[0].data.fingerprint())
