"""`make_plan`: from settings to a `Plan` that lists every rounding, omission and execution."""

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
from scaling_lab.planning.execution import plan_executions
from scaling_lab.planning.preparation import NOT_PREPARED, marked_unprepared
from scaling_lab.planning.recipes.base import Hyperparameters, SweepHorizons, decide, round_batch
from scaling_lab.planning.settings import SweepSettings
from scaling_lab.planning.sizes import SizeLadder

# Runs that miss their budget by more than this fraction, because of whole steps, are listed in the plan.
ROUNDING_TOLERANCE = 0.01


@dataclass(frozen=True)
class GridRow:
    """One run in the printed plan."""

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
    """Makes shapes with the plan's model family, vocabulary, context and device (implements `designs.base.ShapeMaker`)."""

    settings: SweepSettings
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    _candidates: dict[SizeLadder, list[Any]] = field(default_factory=dict, compare=False, repr=False)
    """A cache: designs use the same ladder at every budget."""

    @property
    def convention(self) -> Convention:
        return self.settings.convention

    @property
    def _device(self) -> str:
        return self.settings.execution.device

    def shape(self, width: int, depth: int) -> Any:
        return self.settings.model.shape(width, depth, self.settings.vocab_size, self._device)

    def candidates(self, sizes: SizeLadder) -> list[Any]:
        if sizes not in self._candidates:
            widths = [
                w for w in sizes.widths(self._device) if self.settings.model.has_exact_heads(w, self._device)
            ]
            pairs = [(width, depth) for width in widths for depth in sizes.depths(width)]
            self._candidates[sizes] = self._ascending(pairs)
        return list(self._candidates[sizes])

    def geometric(self, sizes: SizeLadder) -> list[Any]:
        return self._ascending(sizes.geometric_sizes())

    def _ascending(self, pairs: Sequence[tuple[int, int]]) -> list[Any]:
        shapes = [self.shape(width, depth) for width, depth in pairs]
        return sorted(shapes, key=lambda shape: shape.count().n_params(self.convention))

    def max_error(self, sizes: SizeLadder) -> float:
        return sizes.max_error(self._device)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def make_plan(settings: SweepSettings) -> Plan:
    """All runs of the sweep. Raises `UserError` for settings that cannot be planned; launches nothing."""
    check_corpus(settings)
    design = settings.design
    shapes = Shapes(settings)
    horizons = sweep_horizons(list(design.sweep(shapes)), settings.convention, settings.execution.device)
    rounding: list[str] = []
    notes: list[str] = []
    batches: list[float] = []
    specs: dict[str, RunSpec] = {}
    reported: set[RunRequest] = set()
    for label, same in groupby(design.requests(shapes), key=lambda request: request.label):
        planned: set[Any] = set()
        kept: set[Any] = set()
        for request in same:
            planned.add(request.shape)
            spec, remarks = plan_run(settings, request, horizons)
            if (reason := too_many_epochs(settings, spec, label)) is not None:
                notes += [reason] if reason not in notes else []
                continue
            kept.add(request.shape)
            if (run_id := spec.run_id()) in specs:
                rounding.append(
                    f"{run_id}: {multipliers_text(request)} rounds to a run that is already planned."
                )
                continue
            specs[run_id] = spec
            # Remarks are the same for every seed: report them once.
            if (any_seed := replace(request, seed=0, role="")) not in reported:
                reported.add(any_seed)
                rounding += remarks.rounding
                batches.append(remarks.batch_off)
                notes += [note for note in remarks.notes if note not in notes]
        if len(kept) < len(planned):
            remark = design.remark(label, len(planned), len(kept))
            notes += [remark] if remark else []
    if not specs:
        raise UserError(
            f"design={design.kind}: no run is left, because each would need more than "
            f"data.max_epochs={settings.max_epochs:g} epochs over the {settings.corpus_tokens():,} tokens of "
            f"data={settings.data.kind}."
        )
    if settings.unique_tokens not in (None, settings.corpus_tokens()):
        rounding.insert(
            0,
            f"data.unique_tokens={settings.unique_tokens:,} is rounded to {settings.corpus_tokens():,}, a whole number of "
            "windows.",
        )
    plan = Plan(
        sweep=settings.sweep,
        runs=tuple(
            PlannedRun(spec, execution)
            for spec, execution in zip(
                specs.values(), plan_executions(list(specs.values()), settings.execution), strict=True
            )
        ),
        convention=settings.convention,
        data_fingerprint=NOT_PREPARED if settings.corpus_is_missing() else settings.data.fingerprint(),
        rounding=(*batch_rounding(batches), *rounding),
        notes=(
            *shapes.notes,
            *settings.recipe.overview(list(specs.values())),
            *notes,
            *saved_note(list(specs.values())),
        ),
        settings=to_dict(settings),
    )
    return marked_unprepared(plan, settings)


def sweep_horizons(
    requests: Sequence[RunRequest], convention: Convention, device: str = "cpu"
) -> SweepHorizons:
    """What a recipe may know about the other runs. Raises `UserError` if the design has no runs."""
    if not requests:
        raise UserError("the design has no runs: give it sizes and budgets.")
    tokens = [request.tokens(convention) for request in requests]
    by_budget = [
        (request.budget_flops if request.budget_flops is not None else request.train_tokens or 0.0, t)
        for request, t in zip(requests, tokens, strict=True)
    ]
    smallest = min(budget for budget, _ in by_budget)
    return SweepHorizons(
        smallest_budget_tokens=geometric_mean([t for budget, t in by_budget if budget == smallest]),
        longest_tokens=max(tokens),
        device=device,
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


def too_many_epochs(settings: SweepSettings, spec: RunSpec, label: str) -> str | None:
    """Why the run is not planned, if it needs too many epochs over its corpus; else None."""
    if (excess := excess_epochs(settings, spec)) is None:
        return None
    return f"not planned: width {spec.shape.width}, depth {spec.shape.depth} at {label}: {excess}."


def excess_epochs(settings: SweepSettings, spec: RunSpec) -> str | None:
    """The run's number of epochs and how many tokens the corpus lacks, if it exceeds data.max_epochs; else None."""
    corpus_tokens = settings.corpus_tokens()
    epochs = spec.train_tokens / corpus_tokens
    if epochs <= settings.max_epochs:
        return None
    missing = math.ceil(spec.train_tokens / settings.max_epochs) - corpus_tokens
    unique = "" if settings.unique_tokens is None else f"data.unique_tokens={settings.unique_tokens}, "
    return (
        f"{spec.train_tokens:,} tokens are {epochs:.1f} epochs over a corpus of {corpus_tokens:,} "
        f"({unique}data.max_epochs={settings.max_epochs:g}); {missing:,} more corpus tokens would be enough"
    )


@dataclass(frozen=True)
class RunRemarks:
    """Remarks on one planned run."""

    rounding: tuple[str, ...]
    notes: tuple[str, ...]
    batch_off: float
    """Relative difference of the batch from the recipe's rule."""


def plan_run(
    settings: SweepSettings, request: RunRequest, horizons: SweepHorizons
) -> tuple[RunSpec, RunRemarks]:
    """The requested run with the recipe's hyperparameters, rounded to whole steps, and remarks on the rounding."""
    shape = request.shape
    per_token = shape.count().flops_per_token(settings.convention)
    requested = request.tokens(settings.convention)
    # Runs on a trunk share its batch, LR and warmup, decided for the geometric mean of their horizons.
    tuned_for = requested if request.cooldown is None else geometric_mean(request.cooldown.horizons_tokens)
    chosen = decide(settings.recipe, settings.parametrization, shape, tuned_for, horizons)
    if request.cooldown is not None and chosen.warmup_in_tokens:
        longest = max(request.cooldown.horizons_tokens)
        chosen = decide(settings.recipe, settings.parametrization, shape, longest, horizons)
    chosen = apply_multipliers(chosen, request, shape.context)
    steps = whole_steps(requested, chosen.batch_tokens)
    if steps < 1:
        raise UserError(
            f"{horizon_text(request, requested)} less than one step of {chosen.batch_tokens} tokens. Raise it, or lower the "
            "batch (recipe.batch_tokens) or the model size."
        )
    train_tokens = steps * chosen.batch_tokens
    budget = request.budget_flops
    seed = settings.seed + request.seed
    if request.cooldown is not None:
        spec = cooldown_spec(settings, request, chosen)
        return spec, remarks_on_run(settings, request, spec, chosen)
    spec = RunSpec(
        sweep=settings.sweep, role=request.role,
        budget_flops=float(budget) if budget is not None else train_flops(per_token, train_tokens),
        shape=shape, data=settings.data,
        schedule=run_schedule(settings, chosen),
        optimizer=chosen.optimizer, batch_tokens=chosen.batch_tokens, train_tokens=train_tokens,
        eval=settings.eval, seed_init=seed, seed_data=seed,
        dtype=settings.dtype, convention=settings.convention,
        parametrization=settings.parametrization, noise=settings.noise,
        unique_tokens=None if settings.unique_tokens is None else settings.corpus_tokens(),
    )  # fmt: skip
    return spec, remarks_on_run(settings, request, spec, chosen)


def remarks_on_run(
    settings: SweepSettings, request: RunRequest, spec: RunSpec, chosen: Hyperparameters
) -> RunRemarks:
    """The effect of rounding on a run, and the recipe's notes."""
    rounding: tuple[str, ...] = ()
    off = spec.train_tokens / request.tokens(settings.convention) - 1
    # A trunk's length is its last branch point.
    if abs(off) > ROUNDING_TOLERANCE and request.role != "trunk":
        target = "budget" if request.budget_flops is not None else "horizon"
        rounding = (f"{spec.run_id()}: {spec.steps} whole steps, {off:+.1%} off the {target}.",)
    notes = (*chosen.notes, *schedule_note(settings, chosen), *warmup_note(spec, chosen))
    batch_off = chosen.batch_tokens / (chosen.rule_batch_tokens or chosen.batch_tokens) - 1
    return RunRemarks(rounding, notes, batch_off)


def batch_rounding(off: Sequence[float]) -> tuple[str, ...]:
    """How far the rounded batches differ from the recipe's rule."""
    if not off or max(map(abs, off)) <= ROUNDING_TOLERANCE:
        return ()
    return (
        f"batches are rounded to whole sequences with four significant bits: {min(off):+.1%} to {max(off):+.1%} from the "
        "recipe's rule.",
    )


def run_schedule(settings: SweepSettings, chosen: Hyperparameters) -> Any:
    """The recipe's own schedule, or the sweep's with the recipe's warmup and, if it is the default cosine, its final LR."""
    schedule = chosen.schedule or settings.schedule
    if chosen.final_fraction is not None and schedule == Cosine():
        schedule = replace(schedule, final_fraction=chosen.final_fraction)
    return replace(schedule, warmup_fraction=chosen.warmup_fraction)


def schedule_note(settings: SweepSettings, chosen: Hyperparameters) -> tuple[str, ...]:
    """A note if the design's or the recipe's schedule overrides the user's."""
    if settings.design is not None and settings.design.kind == "trunk_cooldown":
        if chosen.schedule is None and settings.schedule == Cosine():
            return ()
        return (
            "design=trunk_cooldown has its own schedules: neither schedule= nor the recipe's schedule is used.",
        )
    if chosen.schedule is None or settings.schedule == Cosine():
        return ()
    return (
        f"recipe={settings.recipe.kind} has its own schedule ({chosen.schedule.kind}): "
        f"schedule={settings.schedule.kind} is not used.",
    )


def apply_multipliers(chosen: Hyperparameters, request: RunRequest, context: int) -> Hyperparameters:
    """The recipe's choice with the request's multipliers applied."""
    if request.lr_multiplier == 1 and request.batch_multiplier == 1:
        return chosen
    batch = chosen.batch_tokens
    if request.batch_multiplier != 1:
        exact = batch * request.batch_multiplier
        chosen = replace(chosen, rule_batch_tokens=exact)
        batch = round_batch(exact, context)
    optimizer = replace(chosen.optimizer, peak_lr=chosen.optimizer.peak_lr * request.lr_multiplier)
    return replace(chosen, batch_tokens=batch, optimizer=optimizer)


def multipliers_text(request: RunRequest) -> str:
    """The request's multipliers as text."""
    return f"{request.batch_multiplier:g} x batch, {request.lr_multiplier:g} x LR"


def horizon_text(request: RunRequest, tokens: float) -> str:
    """The subject and verb of the error about a horizon shorter than one step."""
    if request.train_tokens is not None:
        option = "train_tokens=" if request.role == "single" else "design.horizons_tokens: "
        return f"{option}{tokens:.0f} is"
    return (
        f"design.budgets_flops: {request.label} pay for only {tokens:.0f} tokens at width {request.shape.width}, depth "
        f"{request.shape.depth},"
    )


def plan_single(settings: SweepSettings, train_tokens: float) -> PlannedRun:
    """One run outside a sweep: the shape from `settings.model` (default depth: the ladder's), the horizon in tokens, rounded
    to whole steps. `single_notes` returns the remarks on it."""
    return _single(settings, train_tokens)[0]


def single_notes(settings: SweepSettings, train_tokens: float) -> tuple[str, ...]:
    """The effect of rounding on the run of `plan_single`, and the recipe's notes."""
    remarks = _single(settings, train_tokens)[1]
    return (*remarks.rounding, *batch_rounding([remarks.batch_off]), *remarks.notes)


def _single(settings: SweepSettings, train_tokens: float) -> tuple[PlannedRun, RunRemarks]:
    model = settings.model
    if model.width is None:
        raise UserError("model.width is missing: a single run needs a width, for example model.width=64.")
    depth = SizeLadder().depth(model.width) if model.depth is None else model.depth
    if not train_tokens > 0:
        raise UserError(f"train_tokens={train_tokens!r} must be positive.")
    check_corpus(settings)
    settings.data.n_tokens("train")  # a run that is trained at once needs its corpus
    shape = model.shape(model.width, depth, settings.vocab_size, settings.execution.device)
    request = RunRequest(shape, train_tokens=float(train_tokens), role="single")
    horizons = SweepHorizons(train_tokens, train_tokens, settings.execution.device)
    spec, remarks = plan_run(settings, request, horizons)
    remarks = replace(remarks, notes=(*settings.recipe.overview([spec]), *remarks.notes))
    if (excess := excess_epochs(settings, spec)) is not None:
        raise UserError(
            f"train_tokens={spec.train_tokens} is too many for data={settings.data.kind}: {excess}."
        )
    return PlannedRun(spec, plan_executions([spec], settings.execution)[0]), remarks


def describe(plan: Plan, corpus_tokens: int | None = None) -> list[GridRow]:
    """The grid as rows, in the plan's order; epochs are NaN if the corpus's size is not given."""
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
