"""Owns what a run *is*: `RunSpec`, its parts, and its id. How it ran (`Execution`) is kept apart and never hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

from scaling_lab.core.counts import Convention, ModelCount, train_flops
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.evaluation import EvalSpec
from scaling_lab.core.parametrization import Standard, parametrization_class
from scaling_lab.core.registry import member
from scaling_lab.core.storage.serialization import build, canonical_json, to_dict

# Part of every run id: a change of what a field means, not of which fields there are, raises it.
SPEC_SCHEMA_VERSION = 1
# tf32: float32 whose matrix products a GPU's tensor cores compute from 10 bits of mantissa.
DTYPES = ("float32", "bfloat16", "tf32")
# How many characters of the hash an id carries: 40 bits, a collision among 10,000 runs has probability 5e-5.
ID_HASH_CHARACTERS = 10


@runtime_checkable
class Shape(Protocol):
    """A model family's shape: counts itself without torch."""

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
    """Learning rate over peak learning rate as a function of progress in (0, 1]."""

    kind: ClassVar[str]

    def multiplier(self, progress: float) -> float: ...


@runtime_checkable
class TokenSource(Protocol):
    """Where tokens come from: what it is, not how it is read."""

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

    Loshchilov & Hutter 2019 (arXiv 1711.05101). Each of the three groups has its own LR: `peak_lr` is the hidden
    matrices' and the normalisation gains'; embeddings (tokens and positions) and the head take a multiple of it.
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
    """Everything that decides a run's numbers. Same spec, same machine, same execution: same losses, bit for bit."""

    sweep: str
    """A label: in no id."""
    role: str
    """Why the run is in the plan (isoflop, noise, validation, single): a label, in no id."""
    budget_flops: float
    """The budget that the run belongs to, under `convention`; what it spends exactly is `train_flops`."""
    shape: Any
    data: Any
    schedule: Any
    optimizer: OptimizerSpec
    batch_tokens: int
    train_tokens: int
    eval: EvalSpec = field(default_factory=EvalSpec)
    seed_init: int = 0
    seed_data: int = 0
    dtype: str = "float32"
    parent: str | None = None
    """Run whose checkpoint this one continues (trunk and cooldown)."""
    parent_step: int = 0
    """Steps that the parent had done there; they count as this run's own first steps, in its tokens and FLOPs too."""
    keep_steps: tuple[int, ...] = ()
    """Steps after which a checkpoint is kept for other runs to continue from, and validation is visited."""
    convention: Convention = Convention.SIX_N_WITH_HEAD
    parametrization: Any = field(default_factory=Standard)
    """How init, multipliers and group LRs follow from the shape; `optimizer` is what holds at its base shape."""
    unique_tokens: int | None = None
    """Train on this many tokens of the corpus, again and again; None: on all of it."""
    noise: float = 0.0
    """Share of the training tokens that are replaced by random ones; validation stays as it is."""

    def __post_init__(self) -> None:
        self.parametrization.base_shape(self.shape)  # refuses a base shape that the family cannot have
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        # From JSON it comes as a list.
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
                f"parent_step={self.parent_step} of parent={self.parent} must lie within the run's {self.steps} steps."
            )
        if any(not 0 < step <= self.steps for step in self.keep_steps):
            raise UserError(
                f"keep_steps={list(self.keep_steps)} must lie within the run's {self.steps} steps."
            )
        if self.shape.vocab_size < self.data.vocab_size:
            raise UserError(
                f"model.vocab_size={self.shape.vocab_size} is smaller than the data's vocabulary of {self.data.vocab_size}."
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
        """What this run itself spends: all of it, or from where it left its parent."""
        return train_flops(self.flops_per_token(), self.train_tokens - self.parent_step * self.batch_tokens)

    def learning_rate(self, step: int) -> float:
        """LR at `step`, counted from 0, of hidden matrices of the parametrisation's base shape."""
        return self.optimizer.peak_lr * self.schedule.multiplier((step + 1) / self.steps)

    def run_id(self) -> str:
        """A readable slug and a hash of everything but the labels `sweep` and `role`."""
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
        """The inverse of `serial.to_dict`. Raises ValueError for fields that this version does not know.

        `shared` remembers parts between calls: the runs of a plan have few different shapes, sources and schedules.
        """
        parts = dict(data)
        shared = {} if shared is None else shared
        for name, class_of in _PART_CLASSES.items():
            if name not in parts:  # a part that older specs do not have yet: its default
                continue
            value = parts[name]
            # Not the value itself: 1, 1.0 and True are equal, and different values of a spec.
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


@dataclass(frozen=True)
class Execution:
    """How a run is computed. Not part of its identity, but fixed at plan time and kept by every resume and takeover:
    compiled and eager differ by about 1e-6, and so do numbers of threads."""

    device: str = "cpu"
    """cpu, cuda or mps."""
    compile: bool = False
    """Whether the whole step (forward, backward, clip, optimiser) is compiled."""
    threads: int = 1
    deterministic: bool = True
    micro_batch_sequences: int | None = None
    """Sequences of a batch that are computed at once, their gradients added up; None: the whole batch."""
    stack: str | None = None
    """Runs of one name are trained together as one program, each with its own data, LR and end; None: alone."""
    stack_size: int = 1
    """How many runs have that name: the program keeps this size while members are over or elsewhere, so that a
    member's arithmetic does not depend on which others are there."""

    def __post_init__(self) -> None:
        if self.micro_batch_sequences is not None and self.micro_batch_sequences < 1:
            raise UserError(f"micro_batch_sequences={self.micro_batch_sequences!r} must be at least 1.")
        if self.device not in ("cpu", "cuda", "mps"):
            raise unknown("device", self.device, ("auto", "cpu", "cuda", "mps"))
        if self.threads < 1:
            raise UserError(f"threads={self.threads!r} must be at least 1.")

    def continues(self, planned: Execution) -> bool:
        """Whether a run computed so far like this goes on under the plan's execution: the same but for a micro-batch that
        memory may have made smaller, which it keeps."""
        mine, theirs = self.micro_batch_sequences, planned.micro_batch_sequences
        smaller = mine == theirs or (mine is not None and (theirs is None or mine < theirs))
        return smaller and replace(self, micro_batch_sequences=theirs) == planned


@dataclass(frozen=True)
class PlannedRun:
    """A run with the way in which it is to be computed."""

    spec: RunSpec
    execution: Execution

    @property
    def run_id(self) -> str:
        return self.spec.run_id()


@dataclass(frozen=True)
class Plan:
    """A sweep before it is paid for. Every rounding it made and every run it left out is listed."""

    sweep: str
    runs: tuple[PlannedRun, ...]
    convention: Convention
    data_fingerprint: str
    rounding: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """The options that made the plan, for the reader of plan.json."""
    schema_version: int = SPEC_SCHEMA_VERSION

    def __post_init__(self) -> None:
        ids = [run.run_id for run in self.runs]
        repeated = {i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else set()
        if repeated:
            raise UserError(f"the plan holds the same run twice: {', '.join(sorted(repeated))}.")

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
        """plan.json: readable, one line a run."""
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
            schema_version=data["schema_version"],
        )
