"""Diagnostics about intervals whose coverage is not calibrated: scripts/calibrate.py found that they fail, or did not test
them. The evidence is in results/benchmarks/calibration.txt.
"""

from __future__ import annotations

from scaling_lab.analysis.estimate import Estimate
from scaling_lab.analysis.inference.bands import Band

_EVIDENCE = "results/benchmarks/calibration.txt"
# Predictions are calibrated up to ten times the largest observed compute.
CALIBRATED_FACTOR = 10.0


def interval_caveats(
    estimate: Estimate, band: Band, default_unit: str, extrapolation_factor: float = 1.0
) -> tuple[str, ...]:
    """Caveats about the intervals of an estimate; empty if it has none, or if they are calibrated.

    Args:
        default_unit: the default unit of the approach for these observations, the only one that is calibrated.
        extrapolation_factor: the largest compute of a prediction over the largest observed compute.
    """
    if not band.samples:
        return ()
    found = []
    if band.unit != default_unit:
        text = f"bootstrap.unit={band.unit} is not the default here ({default_unit}); only the default is calibrated ({_EVIDENCE})"
        if default_unit == "residual":
            text += ": resampling few runs with replacement leaves out flanks and whole budgets, so the intervals are too wide"
        found.append(f"{text}.")
    if estimate.approach == "envelope" and band.unit == "run":
        found.append(
            "Resampling runs removes whole sizes from the envelope, and all resamples share its bias (method=ends avoids both, if"
            " every size has at least three horizons). 90% intervals are too wide for N_opt and the loss (they covered the"
            " truth in all simulated studies) and may be too narrow for the exponents (they covered it in 93% of studies of"
            f" a Chinchilla-like law, and in 32% of a Kaplan-like one, whose valleys are shallow; {_EVIDENCE})."
        )
    if "E" in band.samples:
        at_zero = float((band.samples["E"] <= 0).mean())
        if at_zero > (1 - band.level) / 2:
            found.append(
                f"E is 0 in {at_zero:.0%} of the resamples: these data do not clearly show an irreducible loss. The interval of E is"
                " for a quantity that cannot be below 0 (Feldman & Cousins 1998)."
            )
    if extrapolation_factor > CALIBRATED_FACTOR * 1.01:
        found.append(
            f"Predictions reach {extrapolation_factor:.3g} times beyond the largest observed compute; their intervals are"
            " calibrated up to ten times, and hold beyond that only if the same law does."
        )
    return tuple(found)
