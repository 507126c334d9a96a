"""Measuring planned steps on the device at hand (`plan probe=true`), for the times of this plan and of later ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import date

import torch

from scaling_lab.core.formatting import human_count, human_time
from scaling_lab.core.reporter import Reporter
from scaling_lab.core.spec import PlannedRun
from scaling_lab.planning.probe import (
    Probe,
    StepTime,
    load_probe,
    processor_name,
    program_text,
    save_probe,
    step_flops,
    steps_to_measure,
)
from scaling_lab.training.engine.devices import apply_execution, cuda_name, resolve_device
from scaling_lab.training.engine.memory import is_out_of_memory, release_memory
from scaling_lab.training.engine.optimizer import control_rows
from scaling_lab.training.engine.step import TrainStep
from scaling_lab.training.models import build_model

# Time for all measured steps together, without compilation, and how many of a plan's programs are measured at most.
PROBE_S, MAX_PROGRAMS = 30.0, 6
# Windows are drawn from so many random tokens: what a step takes does not depend on the text.
PROBE_TOKENS = 1 << 20
BLOCK_STEPS = 4
# A program whose single step would take longer than this share of the time is left out: expected from one measured before.
MAX_STEP_SHARE = 0.5


def measure_plan(runs: Sequence[PlannedRun], reporter: Reporter) -> Probe:
    """Measure steps of a plan's programs for about `PROBE_S` in all, and keep them on disk; returns all of the device.

    Raises `UserError` if the plan's device is not at hand.
    """
    device = runs[0].execution.device
    resolve_device(device)
    label = device_label(device)
    chosen = steps_to_measure(runs)[:MAX_PROGRAMS]
    # The smallest first: from its speed follows which of the others take too long.
    chosen.sort(key=step_flops)
    programs = len({program_text(run) for run in runs})
    reporter.say(f"probe: {PROBE_S:.0f} s of steps of {len(chosen)} of {programs} programs on {label}")
    steps: list[StepTime] = []
    began = time.monotonic()
    for k, run in enumerate(chosen):
        if steps and expected_seconds(run, steps) > MAX_STEP_SHARE * PROBE_S:
            reporter.say(f"  {program_name(run)}: one step would take too long here; not measured")
            continue
        try:
            found = measure(members_of(run, runs), PROBE_S / len(chosen))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reporter.say(f"  {program_name(run)}: out of memory; not measured")
            continue
        finally:
            release_memory()
        steps.append(found)
        elapsed = time.monotonic() - began
        eta = elapsed / (k + 1) * (len(chosen) - k - 1)
        reporter.say(
            f"  {program_name(run)}: {1e3 * found.seconds:.3g} ms a step, {found.step_flops / found.seconds:.3g} FLOP/s"
            + (f"; ETA {human_time(eta)}" if k + 1 < len(chosen) else "")
        )
    probe = load_probe(label).merged(steps)
    try:
        save_probe(probe)
    except OSError as error:
        reporter.warn(f"the measurements are not kept for later plans ({error}).")
    return probe


def device_label(device: str) -> str:
    """The name under which the measurements of this machine's device are kept."""
    if device == "cuda":
        return cuda_name() or "cuda"
    return processor_name() if device == "cpu" else f"{processor_name()} ({device})"


def program_name(run: PlannedRun) -> str:
    stack = f", a stack of {run.execution.stack_size}" if run.execution.stack_size > 1 else ""
    return f"N={human_count(run.spec.n_params())}, batch {run.spec.batch_tokens:,}{stack}"


def members_of(run: PlannedRun, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that are trained with this one as one program."""
    stack = run.execution.stack
    return [run] if stack is None else [r for r in runs if r.execution.stack == stack]


def expected_seconds(run: PlannedRun, steps: Sequence[StepTime]) -> float:
    """At most so long takes a step at the speed of the largest measured one: speed rises with size."""
    last = steps[-1]
    return step_flops(run) / last.step_flops * last.seconds


def measure(members: Sequence[PlannedRun], seconds: float) -> StepTime:
    """The time of a step as planned, on random tokens: the median of the blocks that fit in `seconds`, after a first
    step that compiles and is not counted."""
    run = members[0]
    spec, execution = run.spec, run.execution
    device = apply_execution(execution, spec.dtype)
    torch.compiler.reset()
    torch.manual_seed(0)
    stacked = execution.stack is not None
    models = [build_model(m.spec.shape, m.spec.parametrization).to(device) for m in members]
    tokens = random_tokens(run).to(device)
    specs = [m.spec for m in members]
    step = TrainStep(models if stacked else models[0], tokens, specs if stacked else spec, execution)
    rows = [control_rows([m.optimizer.peak_lr] * BLOCK_STEPS, 0, m.optimizer) for m in specs]
    controls = (torch.stack(rows, 1) if stacked else rows[0]).to(device)
    lead = (BLOCK_STEPS, len(members)) if stacked else (BLOCK_STEPS,)
    starts = torch.randint(len(tokens) - spec.shape.context - 1, (*lead, spec.batch_sequences)).to(device)
    step.run(starts[:1], controls[:1]).cpu()
    blocks: list[float] = []
    deadline = time.monotonic() + seconds
    size = 1
    while not blocks or time.monotonic() + blocks[-1] * size < deadline:
        began = time.perf_counter()
        step.run(starts[:size], controls[:size]).cpu()
        blocks.append((time.perf_counter() - began) / size)
        size = BLOCK_STEPS
    return StepTime(
        program=program_text(run),
        dtype=spec.dtype,
        compiled=execution.compile,
        threads=execution.threads,
        step_flops=step_flops(run),
        seconds=sorted(blocks)[len(blocks) // 2],
        torch=torch.__version__,
        date=date.today().isoformat(),
    )


def random_tokens(run: PlannedRun) -> torch.Tensor:
    """A corpus of the type that the run's own has on its device (`training/data/feed.py`)."""
    data = run.spec.data
    vocab_size = data.vocab_size
    small = vocab_size <= 256 and not hasattr(data, "documents")
    kind = torch.uint8 if small else torch.int32 if vocab_size <= 65_536 else torch.int64
    return torch.randint(vocab_size, (PROBE_TOKENS + run.spec.shape.context,), dtype=kind)
