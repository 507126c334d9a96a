"""`RunSpec`: a run's identity, its parts and its id; `Execution`: how it is computed, never hashed; `Plan`: a sweep's runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

from scaling_lab.core.counts import Convention, ModelCount, train_flops
from scaling_lab.core.errors import MissingCorpus, UserError, unknown
from scaling_lab.core.evaluation import EvalSpec
from scaling_lab.core.parametrization import Standard, parametrization_class
from scaling_lab.core.registry import member
from scaling_lab.core.storage.serialization import build, canonical_json, to_dict

# Part of every run id. Raise it when the meaning of a field changes, not when a field is added.
SPEC_SCHEMA_VERSION = 1
# tf32: float32 whose matrix products are computed by a GPU's tensor cores with a 10-bit mantissa.
DTYPES = ("float32", "bfloat16", "tf32")
# Characters of the hash in an id: 40 bits, so a collision among 10,000 runs has probability 5e-5.
ID_HASH_CHARACTERS = 10


@runtime_checkable
class Shape(Protocol):
    """A model family's shape; counts its parameters and FLOPs without torch."""

    kind: ClassVar[str]

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def count(self) -> ModelCount: ...


@runtime_checkable
class Schedule(Protocol):
    """LR over peak LR as a function of progress in (0, 1]."""

    kind: ClassVar[str]

    def multiplier(self, progress: float) -> float: ...


@runtime_checkable
class TokenSource(Protocol):
    """A source of tokens; it also has either `tokens(split)` or `documents(split, indices, length)`."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...
    @property
    def bytes_per_token(self) -> float | None: ...
    def n_tokens(self, split: str) -> int: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled weight decay on matrices only, and gradient clipping by global norm.

    Loshchilov & Hutter 2019 (arXiv 1711.05101). There are three LR groups: `peak_lr` applies to hidden matrices and
    normalization gains; embeddings (tokens and positions) and the head use a multiple of it.
    """

    peak_lr: float
    embedding_lr_ratio: float = 1.0
    head_lr_ratio: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("peak_lr", "embedding_lr_ratio", "head_lr_ratio", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"recipe.{name}={getattr(self, name)!r} must be positive.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"recipe.{name}={getattr(self, name)!r} must be in [0, 1).")
        if self.weight_decay < 0:
            raise UserError(f"recipe.weight_decay={self.weight_decay!r} must not be negative.")


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines a run's results. Same spec, machine and execution: same losses, bit for bit."""

    sweep: str
    """A label, not part of the id."""
    role: str
    """Why the run is in the plan (isoflop, noise, validation, single): a label, not part of the id."""
    budget_flops: float
    """The nominal budget under `convention`; `train_flops()` is what the run actually spends."""
    shape: Shape
    data: Any
    """A `TokenSource`."""
    schedule: Schedule
    optimizer: OptimizerSpec
    batch_tokens: int
    train_tokens: int
    eval: EvalSpec = field(default_factory=EvalSpec)
    seed_init: int = 0
    seed_data: int = 0
    dtype: str = "float32"
    parent: str | None = None
    """The run whose checkpoint this one continues (trunk and cooldown)."""
    parent_step: int = 0
    """The parent's step at that checkpoint; those steps count as this run's own, including in its tokens and FLOPs."""
    keep_steps: tuple[int, ...] = ()
    """Steps after which the run is evaluated and a checkpoint is kept for other runs to continue from."""
    convention: Convention = Convention.SIX_N_WITH_HEAD
    parametrization: Any = field(default_factory=Standard)
    """How init, multipliers and group LRs scale with the shape; `optimizer` holds at its base shape."""
    unique_tokens: int | None = None
    """Train repeatedly on only this many tokens of the corpus; None: on all of it."""
    noise: float = 0.0
    """Fraction of the training tokens that are replaced by random ones; validation is unchanged."""

    def __post_init__(self) -> None:
        self.parametrization.base_shape(
            self.shape
        )  # raises for a base shape that the family does not support
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        # JSON has lists.
        object.__setattr__(self, "keep_steps", tuple(self.keep_steps))
        if self.batch_tokens < self.shape.context or self.batch_tokens % self.shape.context:
            raise UserError(
                f"batch_tokens={self.batch_tokens} must be a positive multiple of model.context={self.shape.context}."
            )
        if self.train_tokens < self.batch_tokens:
            raise UserError(
                f"train_tokens={self.train_tokens} is less than one step of batch_tokens={self.batch_tokens}: "
                "raise the budget, or lower batch_tokens."
            )
        if self.train_tokens % self.batch_tokens:
            raise UserError(
                f"train_tokens={self.train_tokens} is not a whole number of steps of batch_tokens={self.batch_tokens}."
            )
        if (self.parent is None) != (self.parent_step == 0) or not 0 <= self.parent_step < self.steps:
            raise UserError(
                f"parent_step={self.parent_step} of parent={self.parent} must be within the run's {self.steps} steps."
            )
        if any(not 0 < step <= self.steps for step in self.keep_steps):
            raise UserError(
                f"keep_steps={list(self.keep_steps)} must be within the run's {self.steps} steps."
            )
        try:
            vocab_size = self.data.vocab_size
        except MissingCorpus:  # planned before its corpus was prepared, or read on another machine
            vocab_size = 0
        if self.shape.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size={self.shape.vocab_size} is smaller than the data's vocabulary of {vocab_size}."
            )
        for other in self.eval.sets:
            if self.shape.vocab_size < other.source.vocab_size:
                raise UserError(
                    f"eval.sets: {other.name} has a vocabulary of {other.source.vocab_size}, larger than the model's "
                    f"{self.shape.vocab_size}."
                )
        if not 0 <= self.noise <= 1:
            raise UserError(f"data.noise={self.noise!r} must be in [0, 1].")
        if self.unique_tokens is not None and (
            self.unique_tokens < 1 or self.unique_tokens % self.shape.context
        ):
            raise UserError(
                f"data.unique_tokens={self.unique_tokens} must be a positive multiple of model.context={self.shape.context}."
            )

    @property
    def steps(self) -> int:
        return self.train_tokens // self.batch_tokens

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.shape.context

    def count(self) -> ModelCount:
        return self.shape.count()

    def n_params(self) -> float:
        """N under the run's own convention."""
        return self.count().n_params(self.convention)

    def flops_per_token(self) -> float:
        """Training FLOPs per token under the run's own convention."""
        return self.count().flops_per_token(self.convention)

    def train_flops(self) -> float:
        """Training FLOPs of the whole run under its own convention."""
        return train_flops(self.flops_per_token(), self.train_tokens)

    def own_train_flops(self) -> float:
        """Training FLOPs of this run itself, without the steps taken over from its parent."""
        return train_flops(self.flops_per_token(), self.train_tokens - self.parent_step * self.batch_tokens)

    def learning_rate(self, step: int) -> float:
        """LR at `step`, counted from 0, of hidden matrices at the parametrization's base shape."""
        return self.optimizer.peak_lr * self.schedule.multiplier((step + 1) / self.steps)

    def run_id(self) -> str:
        """A readable slug and a hash of everything except the labels `sweep` and `role`."""
        return self._run_id

    @cached_property
    def _run_id(self) -> str:
        identity = replace(self, sweep="", role="")
        text = f"{SPEC_SCHEMA_VERSION}:{canonical_json(identity)}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:ID_HASH_CHARACTERS]
        slug = f"{self.shape.kind}-w{self.shape.width}-d{self.shape.depth}-c{self.budget_flops:.2g}-s{self.seed_init}"
        return f"{slug.replace('+', '')}-{digest}"

    @staticmethod
    def from_dict(data: dict[str, Any], shared: dict[str, Any] | None = None) -> RunSpec:
        """The inverse of `to_dict`. Raises ValueError for fields that this version does not know.

        `shared` caches parts between calls: a plan's many runs have few distinct shapes, sources and schedules.
        """
        parts = dict(data)
        shared = {} if shared is None else shared
        for name, class_of in _PART_CLASSES.items():
            if name not in parts:  # older specs lack it: use its default
                continue
            value = parts[name]
            # Keyed by repr because 1, 1.0 and True compare equal but are different values in a spec.
            key = f"{name} {value!r}"
            if key not in shared:
                shared[key] = build(class_of(value), dict(value))
            parts[name] = shared[key]
        parts["convention"] = Convention(parts["convention"])
        return build(RunSpec, parts)

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)


def shape_class(kind: str) -> Any:
    """The shape of a model family by its short name."""
    return member("scaling_lab.core.shapes", "model", kind)


def source_class(kind: str) -> Any:
    """A token source by its short name."""
    return member("scaling_lab.core.sources", "data", kind)


def schedule_class(kind: str) -> Any:
    """A schedule by its short name."""
    from scaling_lab.core import schedules

    classes = [value for value in vars(schedules).values() if isinstance(value, type)]
    known = {vars(value)["kind"]: value for value in classes if "kind" in vars(value)}
    if kind not in known:
        raise unknown("schedule", kind, known)
    return known[kind]


_PART_CLASSES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda value: shape_class(value["kind"]),
    "data": lambda value: source_class(value["kind"]),
    "schedule": lambda value: schedule_class(value["kind"]),
    "parametrization": lambda value: parametrization_class(value["kind"]),
    "optimizer": lambda _: OptimizerSpec,
    "eval": lambda _: EvalSpec,
}


# What a completed run leaves behind: its weights, nothing but curve and record, or a checkpoint with the optimizer's state.
KEEP = ("weights", "none", "resume")


@dataclass(frozen=True)
class Execution:
    """How a run is computed. Not part of its identity, but fixed at plan time and kept by every resume and takeover:
    compiled and eager runs differ by about 1e-6, and so do runs with different numbers of threads."""

    device: str = "cpu"
    """cpu, cuda or mps."""
    compile: bool = False
    """Whether the whole step (forward, backward, clip, optimizer) is compiled."""
    threads: int = 1
    deterministic: bool = True
    micro_batch_sequences: int | None = None
    """Sequences per micro-batch, with gradients accumulated over the batch; None: the whole batch at once."""
    stack: str | None = None
    """Runs with the same stack name train together as one program, each with its own data, LR and end; None: alone."""
    stack_size: int = 1
    """Number of runs in the stack. The program keeps this size when members are finished or claimed elsewhere, so that a
    member's arithmetic does not depend on which other members are present."""
    keep: str = "resume"
    """What is left of a completed run, one of `KEEP`. It may change: nothing that is computed depends on it."""

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise unknown("keep", self.keep, KEEP)
        if self.micro_batch_sequences is not None and self.micro_batch_sequences < 1:
            raise UserError(f"micro_batch_sequences={self.micro_batch_sequences!r} must be at least 1.")
        if self.device not in ("cpu", "cuda", "mps"):
            raise unknown("device", self.device, ("auto", "cpu", "cuda", "mps"))
        if self.threads < 1:
            raise UserError(f"threads={self.threads!r} must be at least 1.")

    def continues(self, planned: Execution) -> bool:
        """Whether a run computed like this so far may continue under the plan's execution: equal except for a micro-batch
        that was reduced to fit memory, which it keeps, and for what is left of it in the end."""
        mine, theirs = self.micro_batch_sequences, planned.micro_batch_sequences
        smaller = mine == theirs or (mine is not None and (theirs is None or mine < theirs))
        return smaller and replace(self, micro_batch_sequences=theirs, keep=planned.keep) == planned


@dataclass(frozen=True)
class PlannedRun:
    """A run and how it will be computed."""

    spec: RunSpec
    execution: Execution

    @property
    def run_id(self) -> str:
        return self.spec.run_id()


@dataclass(frozen=True)
class Plan:
    """A sweep before any training. Lists every rounding and every run that was left out."""

    sweep: str
    runs: tuple[PlannedRun, ...]
    convention: Convention
    data_fingerprint: str
    rounding: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """The options that the plan was made from, for readers of plan.json."""
    given: tuple[str, ...] | None = None
    """Keys of the options that the user gave, the others are defaults of that day; None: by a version that did not record it."""
    schema_version: int = SPEC_SCHEMA_VERSION

    def __post_init__(self) -> None:
        ids = [run.run_id for run in self.runs]
        repeated = {i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else set()
        if repeated:
            raise UserError(f"the plan contains the same run twice: {', '.join(sorted(repeated))}.")

    @property
    def total_flops(self) -> float:
        return float(sum(run.spec.own_train_flops() for run in self.runs))

    @property
    def budgets_flops(self) -> tuple[float, ...]:
        return tuple(sorted({run.spec.budget_flops for run in self.runs}))

    def to_dict(self) -> dict[str, Any]:
        out = {**to_dict(replace(self, runs=())), "total_flops": self.total_flops}
        out["runs"] = [
            {"run_id": r.run_id, "spec": r.spec.to_dict(), "execution": to_dict(r.execution)}
            for r in self.runs
        ]
        return out

    def to_json(self) -> str:
        """plan.json: readable, one line per run."""
        data = self.to_dict()
        lines = [json.dumps(run, allow_nan=False) for run in data["runs"]]
        head, mark, tail = json.dumps({**data, "runs": []}, indent=1, allow_nan=False).partition('"runs": [')
        return "".join((head, mark, "\n", ",\n".join(lines), "\n ", tail, "\n"))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        shared: dict[str, Any] = {}
        runs = tuple(
            PlannedRun(RunSpec.from_dict(r["spec"], shared), build(Execution, r["execution"]))
            for r in data["runs"]
        )
        return Plan(
            sweep=data["sweep"],
            runs=runs,
            convention=Convention(data["convention"]),
            data_fingerprint=data["data_fingerprint"],
            rounding=tuple(data["rounding"]),
            notes=tuple(data["notes"]),
            settings=data.get("settings", {}),
            given=None if data.get("given") is None else tuple(data["given"]),
            schema_version=data["schema_version"],
        )
