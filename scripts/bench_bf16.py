#!/usr/bin/env python
"""Compare two ways of training in bfloat16, to choose the one that `dtype=bfloat16` uses.

autocast   parameters are float32; torch.autocast rounds parameters and activations for matrix products. Normalization,
           softmax and the residual stream stay float32, according to autocast's op lists.
weights    forward and backward with a bfloat16 copy of all parameters and buffers and bfloat16 activations; the flat vector
           updated by AdamW is the float32 master copy. Gradients are bfloat16 and accumulated in float32.

Everything else is the engine's own step: same data order, LR, clipping, AdamW, loss in float32, whole step compiled.

loss    final validation loss, evaluated in float32, of a small model trained in float32 and both ways with the same --seeds
        seeds. The standard deviation of the float32 losses over seeds is the seed noise; the shift is the mean difference
        from float32 over seeds, with its standard error.
speed   seconds per compiled step on one thread, at several widths, alternating between the three; median over rounds.

    scripts/bench_bf16.py                  about 4 minutes on one core; --out FILE also writes its output to a file
    scripts/bench_bf16.py --quick          few steps; numbers are meaningless (CI: checks that it runs)
    scripts/bench_bf16.py --device cuda    the same on a GPU, with larger widths
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import scaling_lab.training.engine.step as step_module
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, RunSpec
from scaling_lab.training.engine.devices import device_name, resolve_device
from scaling_lab.training.engine.gradient import GradientFunction, token_loss
from scaling_lab.training.engine.optimizer import FlatLayout
from scaling_lab.training.run.session import TrainingSession, open_session, train_block

WAYS = ("float32", "autocast", "weights")
# (width, depth, heads, context, sequences a step)
LOSS_SHAPE = (32, 2, 2, 64, 16)
SPEED_SHAPES = {
    "cpu": [(32, 2, 2, 64, 16), (128, 3, 8, 64, 16), (384, 4, 6, 128, 8)],
    "cuda": [(256, 6, 4, 256, 64), (768, 12, 12, 1024, 16)],
}
LINES: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    LINES.append(line)


def spec_of(sizes: tuple[int, ...], way: str, steps: int, seed: int = 0) -> RunSpec:
    width, depth, heads, context, sequences = sizes
    return RunSpec(
        sweep="bf16", role="single", budget_flops=1.0, shape=GPTShape(width, depth, heads, context=context),
        data=PySource(), schedule=Cosine(warmup_fraction=0.05),
        # The default recipe's rule when the committed table was made.
        optimizer=OptimizerSpec(peak_lr=0.007 * 64 / width), batch_tokens=sequences * context,
        train_tokens=steps * sequences * context, eval=EvalSpec(tokens=65_536, points=1),
        seed_init=seed, seed_data=seed, dtype="bfloat16" if way == "autocast" else "float32",
    )  # fmt: skip


def bfloat16_weights_gradient(
    model: nn.Module, layout: FlatLayout, spec: RunSpec, sequences: int, compiled: bool = False
) -> GradientFunction:
    """A replacement for `gradient.make_gradient` that computes all logits at once, since the vocabulary here is 256: there
    are no chunks for `compiled` to be about."""
    device = next(model.parameters()).device
    offsets = torch.arange(spec.shape.context + 1, device=device)
    buffers = {
        n: b.bfloat16() if b.is_floating_point() else b for n, b in model.named_buffers()
    }  # rotary tables

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (parameters, buffers), (inputs,))
        return token_loss(logits, targets)

    gradient_and_loss: Callable[..., Any] = torch.func.grad_and_value(loss_of)

    def gradient(flat: Tensor, starts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        window = tokens[starts[:, None] + offsets].long()
        gradients, loss = gradient_and_loss(layout.views(flat.bfloat16()), window[:, :-1], window[:, 1:])
        return layout.flatten(gradients).float(), loss

    return gradient


@contextmanager
def way_of_training(way: str) -> Iterator[None]:
    """Steps that are built in this context compute their gradient this way."""
    before = step_module.make_gradient, step_module.can_use_library
    if way == "weights":
        step_module.make_gradient = bfloat16_weights_gradient
    # A library's key does not depend on the replaced gradient: `weights` would load the library of float32.
    step_module.can_use_library = lambda *arguments: False
    try:
        yield
    finally:
        step_module.make_gradient, step_module.can_use_library = before


def opened(sizes: tuple[int, ...], way: str, steps: int, device: str, seed: int = 0) -> TrainingSession:
    with way_of_training(way):
        return open_session(spec_of(sizes, way, steps, seed), Execution(device=device, compile=True))


@dataclass(frozen=True)
class Shift:
    """Difference of losses from float32 with the same seeds, nats."""

    mean: float
    standard_error: float

    @staticmethod
    def of(losses: list[float], full: list[float]) -> Shift:
        differences = [a - b for a, b in zip(losses, full, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return Shift(statistics.fmean(differences), error)


def final_loss(way: str, steps: int, seed: int, device: str) -> float:
    """Validation loss in float32 arithmetic with the trained (master) weights."""
    session = opened(LOSS_SHAPE, way, steps, device, seed)
    train_block(session, 0, steps)
    found, _ = session.evaluation.main.loss(session.step.model, session.step.parameters())
    return found


def bench_loss(steps: int, seeds: int, device: str) -> None:
    width, depth, _, context, sequences = LOSS_SHAPE
    say(
        f"final validation loss, nats: width {width}, depth {depth}, {steps} steps of {sequences * context:,} tokens, "
        f"{seeds} seeds"
    )
    losses = {way: [final_loss(way, steps, seed, device) for seed in range(seeds)] for way in WAYS}
    noise = statistics.stdev(losses["float32"])
    say(f"  {'':9} {'mean':>7}   shift from float32      shift / seed noise of {noise:.4f}   each seed")
    for way in WAYS:
        each = " ".join(f"{loss:.4f}" for loss in losses[way])
        shift = Shift.of(losses[way], losses["float32"])
        said = f"{shift.mean:+.4f} +- {shift.standard_error:.4f}" if way != "float32" else ""
        share = f"{shift.mean / noise:+.2f}" if way != "float32" else ""
        say(f"  {way:9} {statistics.fmean(losses[way]):7.4f}   {said:21}   {share:29}   {each}")


def bench_speed(shapes: list[tuple[int, ...]], seconds: float, rounds: int, device: str) -> None:
    say(f"seconds per step, compiled, one thread; median of {rounds} alternating rounds (ratio to float32)")
    say("  " + f"{'shape':34}" + "".join(f"{way:>22}" for way in WAYS))
    for sizes in shapes:
        width, depth, _, context, sequences = sizes
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        steppers = {way: opened(sizes, way, 10_000, device) for way in WAYS}
        count = 3
        for session in steppers.values():
            train_block(session, 0, 3)  # compiles
            began = time.perf_counter()
            train_block(session, 3, 6)
            count = max(count, round(seconds / rounds / (time.perf_counter() - began) * 3))
        for turn in range(rounds):
            for way, session in steppers.items():
                first = 6 + turn * count
                began = time.perf_counter() if device != "cpu" else time.thread_time()
                train_block(session, first, first + count)
                now = time.perf_counter() if device != "cpu" else time.thread_time()
                taken[way].append((now - began) / count)
        median = {way: statistics.median(values) for way, values in taken.items()}
        cells = [f"{median[way]:.5f} ({median[way] / median['float32']:.2f})" for way in WAYS]
        name = f"width {width}, depth {depth}, {sequences} x {context}"
        say(f"  {name:34}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    torch.set_num_threads(1)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    native = device != "cpu" or bool(asked and asked())
    say(
        f"{datetime.date.today()}, {device_name(torch.device(device))}, torch {torch.__version__}, bfloat16 products in "
        f"hardware: {'yes' if native else 'no'}{', quick' * options.quick}"
    )
    if options.quick:
        bench_loss(4, 2, device)
        bench_speed(SPEED_SHAPES[device][:1], 0.1, 2, device)
    else:
        bench_loss(options.steps, options.seeds, device)
        bench_speed(SPEED_SHAPES[device], 6.0, 5, device)
    if options.out:
        options.out.write_text("\n".join(LINES) + "\n")


if __name__ == "__main__":
    main()
