"""Owns `make_plan`: from settings to a `Plan` whose every rounding, omission and execution is stated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from scaling_lab.core.counts import Convention, train_flops, whole_steps
from scaling_lab.core.errors import UserError
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.spec import Plan, PlannedRun, RunSpec
from scaling_lab.core.storage.serialization import to_dict
from scaling_lab.planning.cooldown import cooldown_spec, saved_note, warmup_note
from scaling_lab.planning.corpus import check_corpus
from scaling_lab.planning.designs.base import RunRequest
from scaling_lab.planning.execution import executions
from scaling_lab.planning.recipes.base import Hyperparameters, SweepHorizons, decide, round_batch
from scaling_lab.planning.settings import SweepSettings
from scaling_lab.planning.sizes import SizeLadder

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
    parametrization: str


@dataclass(frozen=True)
class Shapes:
    """Sizes as shapes of the plan's family, vocabulary and context (`designs.base.ShapeMaker`)."""

    settings: SweepSettings
    _ladders: dict[SizeLadder, list[Any]] = field(default_factory=dict, compare=False, repr=False)
    """Made once: designs ask for the same ladder at every budget."""

    @property
    def convention(self) -> Convention:
        return self.settings.convention

    def shape(self, width: int, depth: int) -> Any:
        return self.settings.model.shape(width, depth, self.settings.data.vocab_size)

    def ladder(self, sizes: SizeLadder) -> list[Any]:
        """The ladder's shapes, ascending in N under the plan's convention."""
        if sizes not in self._ladders:
            shapes = [self.shape(width, depth) for width, depth in sizes.sizes()]
            self._ladders[sizes] = sorted(shapes, key=lambda shape: shape.count().n_params(self.convention))
        return list(self._ladders[sizes])


def make_plan(settings: SweepSettings) -> Plan:
    """Everything that the sweep will train. Raises `UserError` for what cannot be planned; nothing is launched."""
    check_corpus(settings)
    design = settings.design
    shapes = Shapes(settings)
    horizons = sweep_horizons(list(design.sweep(shapes)), settings.convention)
    rounding: list[str] = []
    notes: list[str] = []
    batches: list[float] = []
    specs: dict[str, RunSpec] = {}
    said_of: set[RunRequest] = set()
    for label, same in groupby(design.requests(shapes), key=lambda request: request.label):
        planned: set[Any] = set()
        kept: set[Any] = set()
        for request in same:
            planned.add(request.shape)
            spec, said = plan_run(settings, request, horizons)
            if (reason := too_many_epochs(settings, spec, label)) is not None:
                notes += [reason] if reason not in notes else []
                continue
            kept.add(request.shape)
            if (run_id := spec.run_id()) in specs:
                rounding.append(f"{run_id}: {multiplied(request)} rounds to a run that is planned already.")
                continue
            specs[run_id] = spec
            # What holds for every seed is said once.
            if (any_seed := replace(request, seed=0, role="")) not in said_of:
                said_of.add(any_seed)
                rounding += said.rounding
                batches.append(said.batch_off)
                notes += [note for note in said.notes if note not in notes]
        if len(kept) < len(planned):
            remark = design.remark(label, len(planned), len(kept))
            notes += [remark] if remark else []
    if not specs:
        raise UserError(
            f"design={design.kind}: no run is left, every one would pass over the "
            f"{settings.corpus_tokens():,} tokens of data={settings.data.kind} more than "
            f"data.max_epochs={settings.max_epochs:g} times."
        )
    if settings.unique_tokens not in (None, settings.corpus_tokens()):
        rounding.insert(
            0,
            f"data.unique_tokens={settings.unique_tokens:,} are {settings.corpus_tokens():,} in whole windows.",
        )
    return Plan(
        sweep=settings.sweep,
        runs=tuple(
            PlannedRun(spec, execution)
            for spec, execution in zip(
                specs.values(), executions(list(specs.values()), settings.execution), strict=True
            )
        ),
        convention=settings.convention,
        data_fingerprint=settings.data.fingerprint(),
        rounding=(*batch_rounding(batches), *rounding),
        notes=(*notes, *saved_note(list(specs.values()))),
        settings=to_dict(settings),
    )


def sweep_horizons(requests: Sequence[RunRequest], convention: Convention) -> SweepHorizons:
    """What a recipe may know of the other runs. Raises `UserError` where the design asks for none."""
    if not requests:
        raise UserError("the design asks for no run: give it sizes and budgets.")
    tokens = [request.tokens(convention) for request in requests]
    by_label = [
        (request.budget_flops if request.budget_flops is not None else request.train_tokens or 0.0, t)
        for request, t in zip(requests, tokens, strict=True)
    ]
    smallest = min(spend for spend, _ in by_label)
    return SweepHorizons(
        smallest_budget_tokens=geometric_mean([t for spend, t in by_label if spend == smallest]),
        longest_tokens=max(tokens),
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def too_many_epochs(settings: SweepSettings, spec: RunSpec, label: str) -> str | None:
    """Why the run is not planned, if it would pass over its corpus too often."""
    if (over := epochs_over(settings, spec)) is None:
        return None
    return f"not planned: width {spec.shape.width}, depth {spec.shape.depth} at {label} needs {over}."


def epochs_over(settings: SweepSettings, spec: RunSpec) -> str | None:
    """In how far the run would pass over its corpus too often, and what it lacks; None where it would not."""
    corpus_tokens = settings.corpus_tokens()
    epochs = spec.train_tokens / corpus_tokens
    if epochs <= settings.max_epochs:
        return None
    lacks = math.ceil(spec.train_tokens / settings.max_epochs) - corpus_tokens
    which = (
        "the corpus of" if settings.unique_tokens is None else f"data.unique_tokens={settings.unique_tokens},"
    )
    return (
        f"{spec.train_tokens:,} tokens, {epochs:.1f} passes over {which} {corpus_tokens:,} "
        f"(data.max_epochs={settings.max_epochs:g}): it lacks {lacks:,} tokens"
    )


@dataclass(frozen=True)
class Said:
    """What had to be said about one planned run."""

    rounding: tuple[str, ...]
    notes: tuple[str, ...]
    batch_off: float
    """The batch over what the recipe's rule gives, less 1."""


def plan_run(settings: SweepSettings, request: RunRequest, horizons: SweepHorizons) -> tuple[RunSpec, Said]:
    """The run that `request` asks for, tuned by the recipe and rounded to whole steps, and what the rounding did."""
    shape = request.shape
    per_token = shape.count().flops_per_token(settings.convention)
    wanted = request.tokens(settings.convention)
    # Runs that share a trunk share its batch, LR and warm-up: those of their middle horizon.
    tuned_for = wanted if request.cooldown is None else geometric_mean(request.cooldown.horizons_tokens)
    chosen = decide(settings.recipe, settings.parametrization, shape, tuned_for, horizons)
    if request.cooldown is not None and chosen.warmup_in_tokens:
        longest = max(request.cooldown.horizons_tokens)
        chosen = decide(settings.recipe, settings.parametrization, shape, longest, horizons)
    chosen = scaled(chosen, request, shape.context)
    steps = whole_steps(wanted, chosen.batch_tokens)
    if steps < 1:
        raise UserError(
            f"{too_little(request, wanted)} less than one step of {chosen.batch_tokens} tokens. Raise it, or lower the "
            "batch (recipe.batch_tokens) or the size."
        )
    train_tokens = steps * chosen.batch_tokens
    budget = request.budget_flops
    seed = settings.seed + request.seed
    if request.cooldown is not None:
        spec = cooldown_spec(settings, request, chosen)
        return spec, said_of_run(settings, request, spec, chosen)
    spec = RunSpec(
        sweep=settings.sweep, role=request.role,
        budget_flops=float(budget) if budget is not None else train_flops(per_token, train_tokens),
        shape=shape, data=settings.data,
        schedule=replace(chosen.schedule or settings.schedule, warmup_fraction=chosen.warmup_fraction),
        optimizer=chosen.optimizer, batch_tokens=chosen.batch_tokens, train_tokens=train_tokens,
        eval=settings.eval, seed_init=seed, seed_data=seed,
        dtype=settings.dtype, convention=settings.convention,
        parametrization=settings.parametrization, noise=settings.noise,
        unique_tokens=None if settings.unique_tokens is None else settings.corpus_tokens(),
    )  # fmt: skip
    return spec, said_of_run(settings, request, spec, chosen)


def said_of_run(settings: SweepSettings, request: RunRequest, spec: RunSpec, chosen: Hyperparameters) -> Said:
    """What rounding did to a run, and the recipe's notes."""
    rounding: tuple[str, ...] = ()
    off = spec.train_tokens / request.tokens(settings.convention) - 1
    # A trunk's length is its last branch point.
    if abs(off) > ROUNDING_TOLERANCE and request.role != "trunk":
        of_what = "budget" if request.budget_flops is not None else "horizon"
        rounding = (f"{spec.run_id()}: {spec.steps} whole steps spend {off:+.1%} of the {of_what}.",)
    notes = (*chosen.notes, *schedule_note(settings, chosen), *warmup_note(spec, chosen))
    return Said(rounding, notes, chosen.batch_tokens / (chosen.rule_batch_tokens or chosen.batch_tokens) - 1)


def batch_rounding(off: Sequence[float]) -> tuple[str, ...]:
    """How far the batches lie from what the recipe's rule gives."""
    if not off or max(map(abs, off)) <= ROUNDING_TOLERANCE:
        return ()
    return (
        f"batches are whole sequences of four significant bits: {min(off):+.1%} to {max(off):+.1%} from the recipe's rule.",
    )


def schedule_note(settings: SweepSettings, chosen: Hyperparameters) -> tuple[str, ...]:
    """That the recipe's schedule takes the place of one that the user chose."""
    if settings.design is not None and settings.design.kind == "trunk_cooldown":
        if chosen.schedule is None and settings.schedule == Cosine():
            return ()
        return (
            "design=trunk_cooldown has schedules of its own: neither schedule= nor the recipe's is used.",
        )
    if chosen.schedule is None or settings.schedule == Cosine():
        return ()
    return (
        f"recipe={settings.recipe.kind} has a schedule of its own ({chosen.schedule.kind}): "
        f"schedule={settings.schedule.kind} is not used.",
    )


def scaled(chosen: Hyperparameters, request: RunRequest, context: int) -> Hyperparameters:
    """The recipe's choice under the request's multipliers."""
    if request.lr_multiplier == 1 and request.batch_multiplier == 1:
        return chosen
    batch = chosen.batch_tokens
    if request.batch_multiplier != 1:
        wanted = batch * request.batch_multiplier
        chosen = replace(chosen, rule_batch_tokens=wanted)
        batch = round_batch(wanted, context)
    optimizer = replace(chosen.optimizer, peak_lr=chosen.optimizer.peak_lr * request.lr_multiplier)
    return replace(chosen, batch_tokens=batch, optimizer=optimizer)


def multiplied(request: RunRequest) -> str:
    """The request's multipliers in words."""
    return f"{request.batch_multiplier:g} x batch, {request.lr_multiplier:g} x LR"


def too_little(request: RunRequest, tokens: float) -> str:
    """The beginning of the sentence that refuses a horizon below one step."""
    if request.train_tokens is not None:
        option = "train_tokens" if request.role == "single" else "design.horizons_tokens:"
        return f"{option}={tokens:.0f} is" if request.role == "single" else f"{option} {tokens:.0f} is"
    return (
        f"design.budgets_flops: {request.label} buy {tokens:.0f} tokens at width {request.shape.width}, depth "
        f"{request.shape.depth},"
    )


def plan_single(settings: SweepSettings, train_tokens: float) -> PlannedRun:
    """One run outside a sweep: the shape from `settings.model` (without a depth the ladder's own), the horizon in tokens,
    rounded to whole steps. `single_notes` has what must be said about it."""
    return _single(settings, train_tokens)[0]


def single_notes(settings: SweepSettings, train_tokens: float) -> tuple[str, ...]:
    """What rounding did to the run of `plan_single`, and the recipe's notes."""
    said = _single(settings, train_tokens)[1]
    return (*said.rounding, *batch_rounding([said.batch_off]), *said.notes)


def _single(settings: SweepSettings, train_tokens: float) -> tuple[PlannedRun, Said]:
    model = settings.model
    if model.width is None:
        raise UserError("model.width is missing: one run needs a width, for example model.width=64.")
    depth = SizeLadder().depth(model.width) if model.depth is None else model.depth
    if not train_tokens > 0:
        raise UserError(f"train_tokens={train_tokens!r} must be positive.")
    check_corpus(settings)
    shape = model.shape(model.width, depth, settings.data.vocab_size)
    request = RunRequest(shape, train_tokens=float(train_tokens), role="single")
    spec, said = plan_run(settings, request, SweepHorizons(train_tokens, train_tokens))
    if (over := epochs_over(settings, spec)) is not None:
        raise UserError(f"train_tokens={spec.train_tokens} of data={settings.data.kind}: a run of {over}.")
    return PlannedRun(spec, executions([spec], settings.execution)[0]), said


def describe(plan: Plan, corpus_tokens: int | None = None) -> list[GridRow]:
    """The grid as rows, in the plan's order; epochs need the corpus's size (else they are NaN)."""
    rows = []
    for run in plan.runs:
        spec, n = run.spec, run.spec.n_params()
        rows.append(
            GridRow(
                run_id=run.run_id, budget_flops=spec.budget_flops, width=spec.shape.width, depth=spec.shape.depth,
                n_params=n, train_tokens=spec.train_tokens, tokens_per_param=spec.train_tokens / n,
                epochs=spec.train_tokens / (spec.unique_tokens or corpus_tokens or math.nan), steps=spec.steps,
                batch_tokens=spec.batch_tokens, peak_lr=spec.optimizer.peak_lr, seed=spec.seed_init,
                compiled=run.execution.compile, parametrization=spec.parametrization.kind,
            )
        )  # fmt: skip
    return rows
