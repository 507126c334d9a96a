"""`RunRecord`: a run's result (loss curve, final loss, status) and the environment that produced it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from scaling_lab.core.counts import FlopCount, ModelCount, ParamCount
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.core.storage.serialization import build, to_dict

RECORD_SCHEMA_VERSION = 1


class RunStatus(StrEnum):
    """How a run ended. INTERRUPTED runs can be resumed; the others are finished."""

    COMPLETED = "completed"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True)
class EvalPoint:
    """One line of curve.jsonl. `train_loss_nats` is the mean over the steps since the previous line (one step, except in
    runs longer than `MAX_CURVE_POINTS`); the validation loss is None at steps without an evaluation."""

    step: int
    """Optimizer steps done, from 1."""
    tokens: int
    train_flops: float
    """Under the run's own convention."""
    lr: float
    """Of the hidden matrices, at this step."""
    train_loss_nats: float | None = None
    val_loss_nats: float | None = None
    val_loss_sem_nats: float | None = None
    evals: dict[str, float] | None = None
    """Loss on other evaluation sets by name, nats per token, and scores on the validation set (`exact_match`, ...)."""
    wall_time_s: float = 0.0
    """Training time since the run began, over all attempts, including evaluation and compilation."""
    noise_scale_tokens: float | None = None
    """Gradient noise scale B_simple if it was measured (McCandlish et al. 2018); single measurements are noisy."""


# Runs of up to this many steps record every step's training loss; longer runs record means over equal blocks of
# steps, so that a curve has at most this many training points.
MAX_CURVE_POINTS = 4096


def curve_block_steps(steps: int) -> int:
    """Steps per training point of the curve: 1 for runs of up to `MAX_CURVE_POINTS` steps."""
    return -(-steps // MAX_CURVE_POINTS)


@dataclass(frozen=True)
class Environment:
    """Software, hardware and data that a run was computed with."""

    scaling_lab: str
    python: str
    torch: str
    git_revision: str | None
    device: str
    device_name: str
    host: str
    platform: str
    data_fingerprint: str
    processes: int = 1
    """Number of processes that trained the run together when it ended, one per device."""


@dataclass(frozen=True)
class RunRecord:
    """Written last, and atomically, as record.json: if the file exists, the run is finished."""

    run_id: str
    spec: RunSpec
    execution: Execution
    params: ParamCount
    flops: FlopCount
    status: RunStatus
    reason: str | None
    """Why the status is not completed: one line."""
    final_val_loss_nats: float | None
    final_val_loss_sem_nats: float | None
    wall_time_s: float
    environment: Environment
    curve_points: int
    """Lines of curve.jsonl that belong to the run: a shorter file is truncated."""
    curve_bytes: int | None = field(default=None, compare=False)
    """Size of curve.jsonl when the record was written; None in older records. Set by the store."""
    curve: tuple[EvalPoint, ...] = field(default=(), repr=False)
    """Stored in curve.jsonl, next to record.json."""
    schema_version: int = RECORD_SCHEMA_VERSION
    val_floor_nats: float | None = None
    """Mean true -ln p per token of the validation windows, a lower bound on any model's loss; None if unknown."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further scores of the final model: `eval.NAME` in nats per token, `bits_per_byte`, `exact_match`, ..."""
    mfu: float | None = None
    """Model FLOPs utilization of the device in the last attempt, of the run's whole stack; None in older records, on devices
    whose peak is not known (any CPU), and for a run of one block of steps."""
    process_retries: int = 0
    """How often the run was continued in a fresh process after an error of the device, or in one of several processes."""

    def count(self) -> ModelCount:
        """N and FLOPs per token under any convention, from the counts that the run recorded."""
        return ModelCount(self.params, self.flops)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the curve."""
        out = to_dict(self)
        del out["curve"]
        return out

    @staticmethod
    def from_dict(
        data: dict[str, Any], curve: tuple[EvalPoint, ...] = (), shared: dict[str, Any] | None = None
    ) -> RunRecord:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for data that this version cannot read.

        `shared` is a cache of parts, as in `RunSpec.from_dict`.
        """
        parts = dict(data)
        parts["spec"] = RunSpec.from_dict(parts["spec"], shared)
        parts["execution"] = build(Execution, parts["execution"])
        parts["params"] = build(ParamCount, parts["params"])
        parts["flops"] = build(FlopCount, parts["flops"])
        parts["status"] = RunStatus(parts["status"])
        parts["environment"] = build(Environment, parts["environment"])
        parts["curve"] = curve
        return build(RunRecord, parts)
