"""Diagnostics about learning-rate schedules for the envelope.

A curve reaches the best loss for its compute only after its LR has decayed, so curves with a constant LR, or with a
horizon other than the length of the run, are reported. The extra column `lr_horizon_fraction` is the length of the LR
schedule divided by the length of the run: 1 is matched, infinite a constant LR, NaN unknown (see data/tables/rows.py and
record_observations.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.tables.rows import LR_HORIZON
from scaling_lab.analysis.estimate import Array

# Hoffmann et al. 2022 (arXiv 2203.15556, figure A1): a horizon more than 25% longer than the run clearly hurts.
MATCHED_WITHIN = 1.25
# Hoffmann et al. 2022: the points of the envelope lie in the last 15% of training.
LAST_PART_OF_TRAINING = 0.85
_MAX_NAMES = 3


def schedule_notes(observations: Observations, with_curve: NDArray[np.bool_]) -> list[str]:
    """Sentences about the LR schedules of the runs that have curves ((runs,) mask)."""
    horizon = _horizon_by_run(observations)
    known = with_curve & ~np.isnan(horizon)
    if not known.any():
        return [
            "The LR schedules are not known (columns lr_schedule or lr_horizon_fraction would give them): curves with a"
            " constant LR, or a horizon longer than the run, would bias the envelope without a warning."
        ]
    constant = known & np.isinf(horizon)
    with np.errstate(invalid="ignore"):
        off = known & ~constant & (np.abs(np.log(horizon)) > np.log(MATCHED_WITHIN) * (1 + 1e-9))
    notes = []
    if constant.any():
        notes.append(
            f"{int(constant.sum())} of {int(with_curve.sum())} curves have a constant LR ({_names(observations, constant)}):"
            " their losses are higher than with a decayed LR at the same compute, so the envelope is too high and its"
            " exponents may be biased."
        )
    if off.any():
        worst = horizon[off][np.argmax(np.abs(np.log(horizon[off])))]
        notes.append(
            f"{int(off.sum())} of {int(with_curve.sum())} curves have an LR horizon that differs from their length by more"
            f" than 25% ({_names(observations, off)}; up to {worst:.3g} times): they end above the loss of a matched horizon,"
            " so the exponents of the envelope may be biased."
        )
    unknown = int((with_curve & ~known).sum())
    if unknown:
        notes.append(f"The LR schedules of {unknown} of {int(with_curve.sum())} curves are not known.")
    return notes


def training_notes(log_c: Array, log_c_end: Array) -> list[str]:
    """How much of the envelope consists of runs near their end, where a matched horizon is optimal.

    Args:
        log_c: (points,) ln C of the envelope's points. log_c_end: (points,) ln C at which the best run there ended.
    """
    share = float((log_c >= log_c_end + np.log(LAST_PART_OF_TRAINING)).mean())
    text = f"{share:.0%} of the envelope's points lie in the last 15% of their run."
    if share < 0.5:
        text += (
            " Elsewhere the learning rate has not decayed, so losses are not the best for their compute: the envelope is too"
            " high there and its exponents may be biased. Resampling runs does not reveal this, so its intervals may miss"
            " the truth."
        )
    return [text]


def _horizon_by_run(observations: Observations) -> Array:
    """(runs,) `lr_horizon_fraction`, NaN where unknown."""
    horizon = np.full(observations.n_runs, np.nan)
    if LR_HORIZON in observations.extra:
        horizon[observations.run_index] = observations.extra[LR_HORIZON]
    return horizon


def _names(observations: Observations, runs: NDArray[np.bool_]) -> str:
    names = [str(n) for n in observations.run_names[runs][:_MAX_NAMES]]
    more = int(runs.sum()) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
