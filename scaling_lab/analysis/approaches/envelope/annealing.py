"""Owns what the envelope must know of learning rates: a curve is at its compute's best loss only where its LR has come
down, so curves under a constant LR or another horizon than their own are named.

Observations say it in the column `lr_horizon_fraction`: the length of the run's LR schedule over the run's own length;
1 is matched, infinite a constant LR, missing unknown (table_rows.py, record_observations.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.table_rows import LR_HORIZON
from scaling_lab.analysis.estimate import Array

# Hoffmann et al. 2022 (arXiv 2203.15556, figure A1): a horizon over the run's length by more than 25% clearly hurts.
MATCHED_WITHIN = 1.25
# Hoffmann et al. 2022: the envelope's points lie in the last 15% of training.
LAST_PART_OF_TRAINING = 0.85
_NAMED = 3


def schedule_notes(observations: Observations, with_curve: NDArray[np.bool_]) -> list[str]:
    """Sentences on the schedules of the runs that have curves ((runs,) mask)."""
    horizon = _horizon_by_run(observations)
    known = with_curve & ~np.isnan(horizon)
    if not known.any():
        return [
            "The LR schedules are not known (a column lr_schedule or lr_horizon_fraction would say them): curves under a"
            " constant LR or a horizon longer than the run would bias the envelope unseen."
        ]
    constant = known & np.isinf(horizon)
    with np.errstate(invalid="ignore"):
        off = known & ~constant & (np.abs(np.log(horizon)) > np.log(MATCHED_WITHIN) * (1 + 1e-9))
    notes = []
    if constant.any():
        notes.append(
            f"{int(constant.sum())} of {int(with_curve.sum())} curves have a constant LR ({_names(observations, constant)}):"
            " nowhere along them is the loss what their compute can buy with a decayed LR, so the envelope lies too high"
            " and its exponents may be biased."
        )
    if off.any():
        worst = horizon[off][np.argmax(np.abs(np.log(horizon[off])))]
        notes.append(
            f"{int(off.sum())} of {int(with_curve.sum())} curves have an LR horizon that is more than 25% off their length"
            f" ({_names(observations, off)}; up to {worst:.3g} times): they end above the loss of a matched horizon, so the"
            " envelope's exponents may be biased."
        )
    unknown = int((with_curve & ~known).sum())
    if unknown:
        notes.append(f"The LR schedules of {unknown} of {int(with_curve.sum())} curves are not known.")
    return notes


def training_notes(log_c: Array, log_c_end: Array) -> list[str]:
    """Whether the envelope is made of runs near their end, where a matched horizon makes them optimal.

    Args:
        log_c: (points,) ln C of the envelope's points. log_c_end: (points,) ln C at which the best run there ended.
    """
    share = float((log_c >= log_c_end + np.log(LAST_PART_OF_TRAINING)).mean())
    text = f"{share:.0%} of the envelope's points lie in the last 15% of their run."
    if share < 0.5:
        text += (
            " Elsewhere a run whose learning rate still falls (or never does) is not at the loss that its compute can buy,"
            " so the envelope is too high there and its exponents may be biased; no resampling of runs shows that, so that"
            " its intervals may miss the truth."
        )
    return [text]


def _horizon_by_run(observations: Observations) -> Array:
    """(runs,) NaN where unknown."""
    horizon = np.full(observations.n_runs, np.nan)
    if LR_HORIZON in observations.extra:
        horizon[observations.run_index] = observations.extra[LR_HORIZON]
    return horizon


def _names(observations: Observations, runs: NDArray[np.bool_]) -> str:
    names = [str(n) for n in observations.run_names[runs][:_NAMED]]
    more = int(runs.sum()) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
