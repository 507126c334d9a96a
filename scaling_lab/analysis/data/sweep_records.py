"""The run records of a sweep, split into runs to fit a scaling law to and runs of a learning-rate sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.spec import RunSpec

LR_SWEEP = "lr_sweep"
"""The role of runs that vary the learning rate; they are not points of a scaling law."""


@dataclass(frozen=True)
class SweepRecords:
    """All records of a sweep, of any status."""

    law: tuple[RunRecord, ...] = ()
    """Runs to fit a law to."""
    lr_sweep: tuple[RunRecord, ...] = ()
    """Runs of a learning-rate sweep, from this sweep and from the one named by `tuning=`."""

    @property
    def all(self) -> tuple[RunRecord, ...]:
        return (*self.law, *self.lr_sweep)

    def require_law(self) -> None:
        """Raise `UserError` if all runs are of a learning-rate sweep."""
        if self.lr_sweep and not self.law:
            name = self.lr_sweep[0].spec.sweep
            raise UserError(
                f"sweep={name!r} contains only runs of a learning-rate sweep, to which no scaling law can be fitted: analyze "
                f"the sweep that they tune, with tuning={name}, or see the best rates of each size: scaling-lab report "
                f"sweep={name}."
            )


def split_by_role(records: Sequence[RunRecord], tuned_elsewhere: Sequence[RunRecord] = ()) -> SweepRecords:
    """Split the records by their purpose.

    Args:
        records: the records of the sweep.
        tuned_elsewhere: the records of another sweep, which varies the learning rate of this one.

    Raises:
        UserError: the learning-rate sweep was trained differently.
    """
    law = [r for r in records if r.spec.role != LR_SWEEP]
    tuned = [*(r for r in records if r.spec.role == LR_SWEEP), *tuned_elsewhere]
    if law and tuned:
        _refuse_other_training(law, tuned)
    return SweepRecords(tuple(law), tuple(tuned))


def _refuse_other_training(law: Sequence[RunRecord], tuned: Sequence[RunRecord]) -> None:
    """Raise `UserError` if learning rates or losses are not comparable: they depend on parametrization, schedule and data."""
    ours, theirs = ([_training(r.spec) for r in part] for part in (law, tuned))
    for what in ours[0]:
        known = {each[what] for each in ours}
        if other := {each[what] for each in theirs} - known:
            raise UserError(
                f"tuning={tuned[0].spec.sweep}: its runs have {what} {min(other)}, those of the sweep have "
                f"{', '.join(sorted(known))}, so their learning rates cannot be compared."
            )


def _training(spec: RunSpec) -> dict[str, str]:
    """What must be equal for learning rates and losses to be comparable. Of the schedule only its kind, since its warm-up may
    depend on the size."""
    return {
        "parametrization": repr(spec.parametrization),
        "schedule": spec.schedule.kind,
        "data": repr(spec.data),
        "dtype": spec.dtype,
    }
