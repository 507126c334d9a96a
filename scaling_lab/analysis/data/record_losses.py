"""Owns which losses a sweep's records have beside the validation loss, and records in which another one takes its place.

A record's `metrics` hold `eval.NAME` for each other evaluation set, losses by name with their unit (`value_loss_nats`), and
what is no loss in nats (`exact_match`, `bits_per_byte`): laws are fitted to losses only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from scaling_lab.analysis.data.ledger import EVALS, CurveColumns, curve_columns
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.record import EvalPoint, RunRecord

LOSS = "loss"
"""The name of the validation loss itself."""
_EVAL_SET = "eval."


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss in nats per token."""
    return metric.startswith(_EVAL_SET) or metric.endswith("_nats")


def loss_names(records: Iterable[RunRecord]) -> tuple[str, ...]:
    """Every loss that at least one record has, the validation loss first."""
    return (LOSS, *sorted({name for r in records for name in r.metrics if is_loss(name)}))


def check_losses(records: Sequence[RunRecord], option: str, names: Iterable[str]) -> None:
    """Raises `UserError` for a name that is no loss of these records, with the losses that there are."""
    choices = loss_names(records)
    for name in names:
        if name in choices:
            continue
        if any(name in r.metrics for r in records):
            raise UserError(
                f"{option}={name} is a score and no loss in nats, and laws are of losses. Choices: {', '.join(choices)}."
            )
        raise unknown(option, name, choices)


def with_loss(record: RunRecord, name: str) -> RunRecord:
    """The record as if loss `name` were its validation loss, in its curve too; without a final loss where it has none.

    The training loss is left out, being no estimate of another one, and so is the floor, being that of the validation set.
    """
    if name == LOSS:
        return record
    columns = dict(curve_columns(record.curve))
    nothing = np.full(columns["step"].size, np.nan)
    columns["val_loss_nats"] = columns.get(EVALS + name.removeprefix(_EVAL_SET), nothing)
    columns["val_loss_sem_nats"] = columns["train_loss_nats"] = nothing
    return replace(
        record,
        final_val_loss_nats=record.metrics.get(name),
        final_val_loss_sem_nats=None,
        val_floor_nats=None,
        curve=cast("tuple[EvalPoint, ...]", CurveColumns(columns)),
    )
