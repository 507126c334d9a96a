"""The losses in a sweep's records, and replacing the validation loss with another one.

The `metrics` of a record contain `eval.NAME` for each other evaluation set, named losses with their unit
(`value_loss_nats`), and scores that are not losses in nats (`exact_match`, `bits_per_byte`). Laws are fitted to losses only.
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
"""The name of the validation loss."""
_EVAL_SET = "eval."


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss in nats per token."""
    return metric.startswith(_EVAL_SET) or metric.endswith("_nats")


def loss_names(records: Iterable[RunRecord]) -> tuple[str, ...]:
    """All losses that at least one record has, starting with the validation loss."""
    return (LOSS, *sorted({name for r in records for name in r.metrics if is_loss(name)}))


def check_losses(records: Sequence[RunRecord], option: str, names: Iterable[str]) -> None:
    """Raise `UserError`, with the available losses, for a name that is not a loss of these records."""
    choices = loss_names(records)
    for name in names:
        if name in choices:
            continue
        if any(name in r.metrics for r in records):
            raise UserError(
                f"{option}={name} is a score, not a loss in nats, and laws are fitted to losses. Choices: {', '.join(choices)}."
            )
        raise unknown(option, name, choices)


def with_loss(record: RunRecord, name: str) -> RunRecord:
    """The record with loss `name` as its validation loss, in its curve as well; without a final loss if it has none.

    The training loss is removed, because it does not estimate another loss, and so is the floor of the validation set.
    """
    if name == LOSS:
        return record
    columns = dict(curve_columns(record.curve))
    missing = np.full(columns["step"].size, np.nan)
    columns["val_loss_nats"] = columns.get(EVALS + name.removeprefix(_EVAL_SET), missing)
    columns["val_loss_sem_nats"] = columns["train_loss_nats"] = missing
    return replace(
        record,
        final_val_loss_nats=record.metrics.get(name),
        final_val_loss_sem_nats=None,
        val_floor_nats=None,
        curve=cast("tuple[EvalPoint, ...]", CurveColumns(columns)),
    )
