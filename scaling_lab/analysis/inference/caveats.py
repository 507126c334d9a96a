"""Owns the sentences about intervals that are not known to cover: what scripts/calibrate.py measured to fail, or never
measured. They stand among an estimate's diagnostics, beside the numbers; results/benchmarks/calibration.txt has the evidence.
"""

from __future__ import annotations

from scaling_lab.analysis.estimate import Estimate
from scaling_lab.analysis.inference.bands import Band

_EVIDENCE = "results/benchmarks/calibration.txt"
# Predictions are calibrated at ten times the largest observed compute.
CALIBRATED_EXTRAPOLATION = 10.0


def caveats(estimate: Estimate, band: Band, default_unit: str, farthest: float = 1.0) -> tuple[str, ...]:
    """What is to be said of an estimate's intervals; nothing where it has none, or where they are calibrated.

    Args:
        default_unit: the approach's own unit for these observations; only that one is calibrated.
        farthest: the largest compute that is predicted at, in multiples of the largest observed.
    """
    if not band.samples:
        return ()
    found = []
    if band.unit != default_unit:
        text = f"bootstrap.unit={band.unit} is not the default here ({default_unit}), which alone is calibrated ({_EVIDENCE})"
        if default_unit == "residual":
            text += ": drawing few runs anew, with repeats, leaves flanks and whole budgets out and gives intervals that are too wide"
        found.append(f"{text}.")
    if estimate.approach == "envelope" and band.unit == "run":
        found.append(
            "Leaving runs out takes whole sizes from the envelope, and its bias is in every resample alike (where every size has three"
            " horizons or more, method=ends has neither fault): 90% intervals are"
            " too wide for N_opt and the loss (they held the truth in all simulated studies), and may be too narrow for the"
            " exponents (93% of studies of a Chinchilla-like law, 32% of a Kaplan-like one, where valleys are shallow;"
            f" {_EVIDENCE})."
        )
    if "E" in band.samples:
        at_zero = float((band.samples["E"] <= 0).mean())
        if at_zero > (1 - band.level) / 2:
            found.append(
                f"E is 0 in {at_zero:.0%} of the resamples: the loss shows no sure floor within these data. Its interval is that of"
                " a quantity that cannot be below 0 (Feldman & Cousins 1998)."
            )
    if farthest > CALIBRATED_EXTRAPOLATION * 1.01:
        found.append(
            f"Predictions reach {farthest:.3g} times beyond the largest observed compute; their intervals are calibrated to ten times, and"
            " beyond hold only if the same law goes on."
        )
    return tuple(found)
