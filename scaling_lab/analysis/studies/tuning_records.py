"""Owns the way from run records to the tuning debt: which runs are a sweep's and which belong to its learning-rate sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.record_losses import check_losses, with_loss
from scaling_lab.analysis.estimate import Estimate
from scaling_lab.analysis.inference.bootstrap import Approach
from scaling_lab.analysis.studies.tuning import Trained, Tuning, measure, tuned_exponents
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import RunSpec

LR_SWEEP = "lr_sweep"
"""The role of runs that vary the learning rate: no point of a scaling law."""


@dataclass(frozen=True)
class TunedRecords:
    """The records that measure a sweep's tuning debt."""

    sweep: tuple[RunRecord, ...]
    tuned: tuple[RunRecord, ...]

    def with_loss(self, name: str) -> TunedRecords:
        """The same with another loss in place of the validation loss. Raises `UserError` where no tuned run has it."""
        check_losses(self.tuned, "metric (with tuning)", [name])
        return TunedRecords(*(tuple(with_loss(r, name) for r in part) for part in (self.sweep, self.tuned)))


def split_by_role(
    records: Sequence[RunRecord], tuned_elsewhere: Sequence[RunRecord] = ()
) -> tuple[list[RunRecord], TunedRecords | None]:
    """(the sweep's records, what measures its debt): runs of the role lr_sweep among them, and those of another folder.

    Raises:
        UserError: there are runs of a learning-rate sweep alone, or they are trained otherwise than the sweep.
    """
    own = [r for r in records if r.spec.role != LR_SWEEP]
    tuned = [*(r for r in records if r.spec.role == LR_SWEEP), *tuned_elsewhere]
    if records and not own:
        name = records[0].spec.sweep
        raise UserError(
            f"sweep={name!r} holds runs of a learning-rate sweep alone, which make no scaling law: analyze the sweep that "
            f"they tune, with tuning={name}, or see the best rates of each size: scaling-lab report sweep={name}."
        )
    if own and tuned:
        _refuse_other_training(own, tuned)
    return own, TunedRecords(tuple(own), tuple(tuned)) if tuned else None


def _refuse_other_training(own: Sequence[RunRecord], tuned: Sequence[RunRecord]) -> None:
    """A rate means something else under another parametrisation or schedule, and a loss on other data."""
    ours, theirs = ([_training(r.spec) for r in part] for part in (own, tuned))
    for what in ours[0]:
        known = {each[what] for each in ours}
        if other := {each[what] for each in theirs} - known:
            raise UserError(
                f"tuning={tuned[0].spec.sweep}: its runs have {what} {min(other)}, those of the sweep "
                f"{', '.join(sorted(known))}: the rates say nothing of each other."
            )


def _training(spec: RunSpec) -> dict[str, str]:
    """What must be alike for rates and losses to compare. Of a schedule its kind: its warm-up may follow from the size."""
    return {
        "parametrization": repr(spec.parametrization),
        "schedule": spec.schedule.kind,
        "data": repr(spec.data),
        "dtype": spec.dtype,
    }


def trained(records: Sequence[RunRecord], convention: Convention) -> Trained:
    """The completed runs of `records`, N counted under `convention`."""
    done = [r for r in records if r.status is RunStatus.COMPLETED and r.final_val_loss_nats is not None]
    return Trained(
        names=np.array([r.run_id for r in done], dtype=object),
        n_params=np.array([r.count().n_params(convention) for r in done]),
        budget_flops=np.array([r.spec.budget_flops for r in done]),
        peak_lr=np.array([r.spec.optimizer.peak_lr for r in done]),
        batch_tokens=np.array([float(r.spec.batch_tokens) for r in done]),
        loss_nats=np.array([float(r.final_val_loss_nats or np.nan) for r in done]),
        seed=np.array([float(r.spec.seed_init) for r in done]),
    )


def tuning_of(
    records: TunedRecords,
    points: Observations,
    approaches: Sequence[Approach],
    estimates: Sequence[Estimate],
    level: float,
    seed: int,
) -> Tuning:
    """The debt of every point and the exponents without it; `points` are of the sweep's records, one a run."""
    convention = Convention(points.convention)
    sweep = trained(records.sweep, convention)
    place = {name: i for i, name in enumerate(sweep.names)}
    # In the order of the points, and of no run that is not among them.
    sweep = sweep.at(np.array([place[name] for name in points.run_id], dtype=np.int64))
    tuning, samples = measure(sweep, trained(records.tuned, convention), level=level, seed=seed)
    return tuned_exponents(tuning, samples, points, approaches, estimates)
