"""Owns `make_plan`: from settings to a `Plan` whose every rounding, omission and execution is stated."""

from __future__ import annotations

import math
import shutil
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_lab.core.counts import tokens_for_budget, whole_steps
from scaling_lab.core.errors import UserError
from scaling_lab.core.serial import to_dict
from scaling_lab.core.spec import Execution, Plan, PlannedRun, RunSpec
from scaling_lab.plan.designs.isoflop import MIN_SIZES
from scaling_lab.plan.settings import ExecutionSettings, SweepSettings
from scaling_lab.plan.sizes import SizeLadder

# On a CPU, compiling a tiny model's whole step costs 10-25 s of one core and makes it about 2.5 times faster than the
# eager 10-15 GFLOP/s (measured, results/LOG.md): it is repaid above about this many FLOPs of one shape and batch.
COMPILE_REPAID_FLOPS = 3e11
# A run that misses its budget by more than this through rounding to whole steps is named in the plan.
ROUNDING_TOLERANCE = 0.01


@dataclass(frozen=True)
class GridRow:
    """One run as the printed plan shows it."""

    run_id: str
    budget_flops: float
    width: int
    depth: int
    n_params: float
    train_tokens: int
    tokens_per_param: float
    epochs: float
    steps: int
    batch_tokens: int
    peak_lr: float
    seed: int
    compiled: bool


def make_plan(settings: SweepSettings) -> Plan:
    """Everything that the sweep will train. Raises `UserError` for what cannot be planned; nothing is launched."""
    check_corpus(settings)
    corpus_tokens = settings.data.n_tokens("train")
    shapes = ladder_shapes(settings)
    log_params = [math.log(shape.count().n_params(settings.convention)) for shape in shapes]
    design = settings.design
    rounding: list[str] = []
    notes: list[str] = []
    specs: list[RunSpec] = []
    for index, budget in enumerate(sorted(design.budgets_flops)):
        kept = 0
        for size in design.window(log_params, budget):
            spec, said = plan_run(settings, shapes[size], budget, settings.seed)
            epochs = spec.train_tokens / corpus_tokens
            if epochs > settings.max_epochs:
                notes.append(
                    f"not planned: width {spec.shape.width}, depth {spec.shape.depth} at {budget:.3g} FLOPs needs "
                    f"{spec.train_tokens:,} tokens, {epochs:.1f} passes over the corpus of {corpus_tokens:,} "
                    f"(data.max_epochs={settings.max_epochs:g})."
                )
                continue
            kept += 1
            rounding += said.rounding
            notes += [note for note in said.notes if note not in notes]
            for seed in design.seeds(index):
                role = "isoflop" if seed == 0 else "noise"
                number = settings.seed + seed
                specs.append(replace(spec, role=role, seed_init=number, seed_data=number))
        planned = len(design.window(log_params, budget))
        if kept < planned:
            few = f": fewer than the {MIN_SIZES} of a valley" if kept < MIN_SIZES else ""
            notes.append(
                f"the budget of {budget:.3g} FLOPs has {kept} of its {planned} sizes left{few}, and its window is "
                "one-sided, which biases its minimum. More data, or a smaller budget, mends it."
            )
    if not specs:
        raise UserError(
            f"design.budgets_flops={list(design.budgets_flops)}: no run is left, every one would pass over the "
            f"{corpus_tokens:,} tokens of data={settings.data.kind} more than data.max_epochs={settings.max_epochs:g} times."
        )
    return Plan(
        sweep=settings.sweep,
        runs=tuple(
            PlannedRun(s, e) for s, e in zip(specs, executions(specs, settings.execution), strict=True)
        ),
        convention=settings.convention,
        data_fingerprint=settings.data.fingerprint(),
        rounding=tuple(rounding),
        notes=tuple(notes),
        settings=to_dict(settings),
    )


def check_corpus(settings: SweepSettings) -> None:
    """Refuse a corpus in which a split is shorter than one window of the context."""
    for split in ("train", "validation"):
        tokens = settings.data.n_tokens(split)
        if tokens <= settings.model.context:
            raise UserError(
                f"data={settings.data.kind}: the {split} split has {tokens:,} tokens, less than one window of "
                f"model.context={settings.model.context} and a target."
            )


def ladder_shapes(settings: SweepSettings) -> list[Any]:
    """The ladder's shapes, ascending in N under the plan's convention."""
    vocab = settings.data.vocab_size
    shapes = [settings.model.shape(width, depth, vocab) for width, depth in settings.design.sizes.sizes()]
    return sorted(shapes, key=lambda shape: shape.count().n_params(settings.convention))


@dataclass(frozen=True)
class Said:
    """What had to be said about one planned run."""

    rounding: tuple[str, ...]
    notes: tuple[str, ...]


def plan_run(
    settings: SweepSettings, shape: Any, budget_flops: float, seed: int, role: str = "isoflop"
) -> tuple[RunSpec, Said]:
    """The run of `shape` that spends `budget_flops`, rounded to whole steps, and what the rounding did."""
    per_token = shape.count().flops_per_token(settings.convention)
    wanted = tokens_for_budget(budget_flops, per_token)
    chosen = settings.recipe.decide(shape, wanted)
    steps = whole_steps(wanted, chosen.batch_tokens)
    if steps < 1:
        too_little = (
            f"train_tokens={wanted:.0f} is"
            if role == "single"
            else f"design.budgets_flops: {budget_flops:.3g} FLOPs buy {wanted:.0f} tokens at width {shape.width}, depth "
            f"{shape.depth},"
        )
        raise UserError(
            f"{too_little} less than one step of {chosen.batch_tokens} tokens. Raise it, or lower the batch "
            "(recipe.batch_tokens) or the size."
        )
    schedule = replace(settings.schedule, warmup_fraction=chosen.warmup_fraction)
    spec = RunSpec(
        sweep=settings.sweep, role=role, budget_flops=float(budget_flops), shape=shape, data=settings.data,
        schedule=schedule, optimizer=chosen.optimizer, batch_tokens=chosen.batch_tokens,
        train_tokens=steps * chosen.batch_tokens, eval=settings.eval, seed_init=seed, seed_data=seed,
        dtype=settings.dtype, convention=settings.convention,
    )  # fmt: skip
    off = spec.train_flops() / budget_flops - 1
    rounding: tuple[str, ...] = ()
    if abs(off) > ROUNDING_TOLERANCE:
        rounding = (f"{spec.run_id()}: {steps} whole steps spend {off:+.1%} of the budget.",)
    return spec, Said(rounding, chosen.notes)


def plan_single(settings: SweepSettings, train_tokens: float) -> PlannedRun:
    """One run outside a sweep: the shape from `settings.model` (without a depth the ladder's own), the horizon in tokens,
    rounded to whole steps."""
    model = settings.model
    if model.width is None:
        raise UserError("model.width is missing: one run needs a width, for example model.width=64.")
    depth = SizeLadder().depth(model.width) if model.depth is None else model.depth
    if not train_tokens > 0:
        raise UserError(f"train_tokens={train_tokens!r} must be positive.")
    check_corpus(settings)
    shape = model.shape(model.width, depth, settings.data.vocab_size)
    flops = shape.count().flops_per_token(settings.convention) * float(train_tokens)
    spec, _ = plan_run(settings, shape, flops, settings.seed, role="single")
    # The budget is what the run spends: a single run belongs to no other.
    spec = replace(spec, budget_flops=spec.train_flops())
    epochs = spec.train_tokens / settings.data.n_tokens("train")
    if epochs > settings.max_epochs:
        raise UserError(
            f"train_tokens={spec.train_tokens} is {epochs:.1f} passes over data={settings.data.kind} "
            f"({settings.data.n_tokens('train'):,} tokens), more than data.max_epochs={settings.max_epochs:g}."
        )
    return PlannedRun(spec, executions([spec], settings.execution)[0])


def executions(specs: list[RunSpec], settings: ExecutionSettings) -> list[Execution]:
    """How each run is computed, by a rule that depends on the plan and the kind of machine alone.

    On a CPU a shape and batch is compiled where all its runs together repay it and a C++ compiler is there.
    """
    group_flops: dict[tuple[Any, int], float] = defaultdict(float)
    for spec in specs:
        group_flops[spec.shape, spec.batch_tokens] += spec.train_flops()

    def compiled(spec: RunSpec) -> bool:
        if settings.compile != "auto":
            return settings.compile == "true"
        if settings.device == "cuda":
            # Triton builds its launcher with a C compiler.
            return has_compiler("cc", "gcc", "clang")
        repaid = group_flops[spec.shape, spec.batch_tokens] >= COMPILE_REPAID_FLOPS
        return settings.device == "cpu" and repaid and can_compile_on_cpu()

    return [Execution(settings.device, compiled(s), settings.threads, settings.deterministic) for s in specs]


def can_compile_on_cpu() -> bool:
    """Whether torch.compile has what it needs here: a C++ compiler and Python's headers (on Linux; elsewhere more)."""
    return sys.platform == "linux" and has_compiler("g++", "clang++", "c++")


def has_compiler(*names: str) -> bool:
    """A compiler of one of these names, and the headers that what torch.compile writes includes."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in names)


def describe(plan: Plan, corpus_tokens: int | None = None) -> list[GridRow]:
    """The grid as rows, in the plan's order; epochs need the corpus's size (else they are NaN)."""
    rows = []
    for run in plan.runs:
        spec, n = run.spec, run.spec.n_params()
        rows.append(
            GridRow(
                run_id=run.run_id, budget_flops=spec.budget_flops, width=spec.shape.width, depth=spec.shape.depth,
                n_params=n, train_tokens=spec.train_tokens, tokens_per_param=spec.train_tokens / n,
                epochs=spec.train_tokens / corpus_tokens if corpus_tokens else math.nan, steps=spec.steps,
                batch_tokens=spec.batch_tokens, peak_lr=spec.optimizer.peak_lr, seed=spec.seed_init,
                compiled=run.execution.compile,
            )
        )  # fmt: skip
    return rows
