"""`Observations` from the run records of a sweep: N and C under any convention, and curves for the envelope."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from scaling_lab.analysis.data.ledger import curve_columns
from scaling_lab.analysis.data.observations import FLOOR, Curves, Dropped, Observations
from scaling_lab.analysis.data.record_losses import LOSS, check_losses, with_loss
from scaling_lab.analysis.data.tables.rows import LR_HORIZON
from scaling_lab.analysis.estimate import Array
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.record import RunRecord, RunStatus

CurveKind = Literal["auto", "validation", "train"]
CURVE_KINDS = ("auto", "validation", "train")

# Hoffmann et al. 2022 smooth the training loss with a Gaussian "with a window length of 10 steps" without further detail.
# Here the window is taken to be two standard deviations to either side.
SMOOTHING_WINDOW_STEPS = 10.0
_SIGMAS_PER_WINDOW = 4.0
# A validation curve needs at least this many points.
_MIN_VALIDATION_POINTS = 4


def observations_from_records(
    records: Iterable[RunRecord],
    convention: Convention | None = None,
    curve: CurveKind = "auto",
    metric: str | None = None,
    metrics: Sequence[str] = (),
) -> Observations:
    """One point per completed run (its final validation loss), and the curves of the runs.

    Args:
        convention: what N and C count; None uses that of the plan. The budgets are always those of the plan.
        curve: the curves for the envelope. "train" is the training loss smoothed over 10 steps, as in the paper; on
            repeated data it falls below the validation loss. "validation" is the loss on the fixed validation set,
            comparable between runs but sparse. "auto" uses validation if runs have at least four such points.
        metric: another loss of the records (`eval.NAME`) to use instead of the validation loss; its curve has a point at
            each evaluation.
        metrics: other losses, each a column of `extra` with its own curves; NaN if a record has none.

    Raises:
        UserError: no completed run, an unknown `curve`, or a metric that is not a loss of these records.
    """
    if curve not in CURVE_KINDS:
        raise unknown("approach.envelope.curve", curve, CURVE_KINDS)
    chosen = LOSS if metric is None else metric
    all_records = _with_chosen_loss(list(records), chosen, metrics, curve)
    if chosen != LOSS:
        curve = "validation"
    usable, dropped = _usable_records(all_records, "final validation loss" if chosen == LOSS else chosen)
    planned = {r.spec.convention for r in usable}
    if convention is None:
        if len(planned) > 1:
            raise UserError(
                f"the runs were planned under different conventions ({', '.join(sorted(planned))}): choose one with convention=."
            )
        convention = next(iter(planned))
    counts = [r.count() for r in usable]
    n = np.array([c.n_params(convention) for c in counts])
    per_token = np.array([c.flops_per_token(convention) for c in counts])
    tokens = np.array([float(r.spec.train_tokens) for r in usable])
    kind = _curve_kind(usable, curve)
    return Observations(
        run_names=np.array([r.run_id for r in usable], dtype=object),
        run_index=np.arange(len(usable), dtype=np.int64),
        n_params=n,
        n_tokens=tokens,
        compute_flops=per_token * tokens,
        budget_flops=np.array([r.spec.budget_flops for r in usable]),
        loss_nats=np.array([float(r.final_val_loss_nats or np.nan) for r in usable]),
        loss_sem_nats=np.array([_or_nan(r.final_val_loss_sem_nats) for r in usable]),
        seed=np.array([float(r.spec.seed_init) for r in usable]),
        convention=convention.value,
        dropped=tuple(dropped),
        warnings=tuple(_warnings(usable)),
        extra=_extra_columns(usable, metrics),
        separate_curves=_curves(usable, n, per_token, kind),
        alternatives={
            c.value: (
                np.array([m.n_params(c) for m in counts]),
                np.array([m.flops_per_token(c) for m in counts]),
            )
            for c in Convention
        },
        budgets_match_convention=planned == {convention},
        column_curves=_column_curves(usable, metrics, n, per_token),
    )


def _usable_records(records: Sequence[RunRecord], loss_name: str) -> tuple[list[RunRecord], list[Dropped]]:
    """The completed runs with a loss, and why the others are dropped; raises `UserError` if none is usable."""
    usable, dropped = [], []
    for record in records:
        reason = _why_unusable(record, loss_name)
        if reason is None:
            usable.append(record)
        else:
            dropped.append(Dropped(record.run_id, None, reason))
    if not usable:
        first = f" First reason: {dropped[0].run_id}: {dropped[0].reason}." if dropped else ""
        raise UserError(f"none of the {len(records)} run records is a completed run with a loss.{first}")
    return usable, dropped


def _with_chosen_loss(
    records: Sequence[RunRecord], chosen: str, metrics: Sequence[str], curve: CurveKind
) -> list[RunRecord]:
    """The records with the chosen loss as validation loss; raises `UserError` if a chosen loss is not available."""
    check_losses(records, "metrics", metrics)
    check_losses(records, "metric", [chosen])
    if chosen != LOSS and LOSS in metrics:
        raise UserError(
            f"metrics={LOSS} is not possible with metric={chosen}, which replaces that loss. Choices: metrics without it, or no metric."
        )
    if chosen != LOSS and curve == "train":
        raise UserError(
            f"approach.envelope.curve=train is the training loss, but metric={chosen} is not. Choices: auto, validation."
        )
    return [with_loss(r, chosen) for r in records]


def smooth(values: Array, steps: Array, window_steps: float = SMOOTHING_WINDOW_STEPS) -> Array:
    """(points,) Gaussian smoothing of the curve of one run over steps, with the kernel renormalized at the ends."""
    sigma = window_steps / _SIGMAS_PER_WINDOW
    total, weight = values.copy(), np.ones_like(values)
    # Neighbors k points away, as long as any of them is within the window.
    for k in range(1, values.size):
        gap = steps[k:] - steps[:-k]
        if gap.min() > window_steps / 2:
            break
        w = np.where(gap <= window_steps / 2, np.exp(-0.5 * (gap / sigma) ** 2), 0.0)
        total[k:] += w * values[:-k]
        weight[k:] += w
        total[:-k] += w * values[k:]
        weight[:-k] += w
    return total / weight


def _extra_columns(records: Sequence[RunRecord], metrics: Sequence[str]) -> dict[str, Array]:
    """Columns for laws that need them, and a column for each other loss."""
    return {
        "width": np.array([float(r.spec.shape.width) for r in records]),
        "depth": np.array([float(r.spec.shape.depth) for r in records]),
        "n_steps": np.array([float(r.spec.steps) for r in records]),
        "batch_tokens": np.array([float(r.spec.batch_tokens) for r in records]),
        LR_HORIZON: np.array([_lr_horizon(r) for r in records]),
        **_optional_columns(records),
        **{name: _loss_column(records, name) for name in metrics if name != LOSS},
    }


def _optional_columns(records: Sequence[RunRecord]) -> dict[str, Array]:
    """Columns that only some sweeps have: the floor of the validation set, and unique tokens if tokens were repeated."""
    columns = {}
    floors = np.array([_or_nan(r.val_floor_nats) for r in records])
    if np.isfinite(floors).all():
        columns[FLOOR] = floors
    if any(r.spec.unique_tokens is not None for r in records):
        columns["unique_tokens"] = np.array(
            [float(r.spec.unique_tokens or r.spec.train_tokens) for r in records]
        )
    return columns


def _loss_column(records: Sequence[RunRecord], name: str) -> Array:
    """(runs,) the final value of another loss; NaN if a record has none."""
    return np.array([_or_nan(r.metrics.get(name)) for r in records])


def _column_curves(
    records: Sequence[RunRecord], names: Sequence[str], n: Array, per_token: Array
) -> dict[str, Curves]:
    """The curves of other losses that were evaluated during training."""
    by_name = {
        name: _curves([with_loss(r, name) for r in records], n, per_token, "validation")
        for name in names
        if name != LOSS
    }
    return {name: curves for name, curves in by_name.items() if curves is not None}


def _lr_horizon(record: RunRecord) -> float:
    """Length of the LR schedule divided by the length of the run; infinite if the LR ends at its peak."""
    schedule = record.spec.schedule
    if schedule.multiplier(1.0) > 0.999:
        return float("inf")
    return float(getattr(schedule, "horizon_fraction", 1.0))


def _why_unusable(record: RunRecord, loss_name: str) -> str | None:
    if record.status is not RunStatus.COMPLETED:
        return record.status.value + (f": {record.reason}" if record.reason else "")
    if record.spec.role == "trunk":
        return "a trunk run: its learning rate does not decay; its branches are analyzed instead"
    loss = record.final_val_loss_nats
    if loss is None:
        return f"no {loss_name}"
    if not (np.isfinite(loss) and loss > 0):
        return f"{loss_name} is {loss}"
    return None


def _warnings(records: Sequence[RunRecord]) -> list[str]:
    out = []
    roles = sorted({r.spec.role for r in records})
    if len({(r.spec.data.kind, r.environment.data_fingerprint) for r in records}) > 1:
        out.append(
            "The runs were trained on different data (their fingerprints differ), so their losses are not comparable."
        )
    if "validation" in roles:
        out.append("The observations include runs with the role 'validation'.")
    return out


def _curve_kind(records: Sequence[RunRecord], curve: CurveKind) -> str:
    if curve != "auto":
        return curve
    visits = [np.count_nonzero(np.isfinite(curve_columns(r.curve)["val_loss_nats"])) for r in records]
    return "validation" if visits and np.median(visits) >= _MIN_VALIDATION_POINTS else "train"


def _curves(records: Sequence[RunRecord], n: Array, per_token: Array, kind: str) -> Curves | None:
    """The curves of this kind; None if no run has such points, so that only final losses are known."""
    index, tokens, losses = [], [], []
    column = "val_loss_nats" if kind == "validation" else "train_loss_nats"
    for i, record in enumerate(records):
        columns = curve_columns(record.curve)
        loss = columns[column]
        good = np.isfinite(loss) & (loss > 0)
        loss = loss[good]
        if kind != "validation":
            loss = smooth(loss, columns["step"][good].astype(np.float64))
        index.append(np.full(loss.size, i, dtype=np.int64))
        tokens.append(columns["tokens"][good].astype(np.float64))
        losses.append(loss)
    run = np.concatenate(index)
    if not run.size:
        return None
    d = np.concatenate(tokens)
    label = "validation points" if kind == "validation" else "training loss smoothed over 10 steps"
    return Curves(run, n[run], d, per_token[run] * d, np.concatenate(losses), label)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else float(value)
