"""Owns what is said, in words, of a corpus whose entropy is known: for the figure's caption and for the console."""

from __future__ import annotations

from scaling_lab.analysis.studies.known_floor import KnownFloor


def floor_words(known: KnownFloor) -> str:
    """The true floor beside the fitted one, and how straight the reducible loss is."""
    said = [floor_line(known)]
    if known.z is not None:
        said.append(_error_sentence(known))
    line = known.line
    if line is None:
        said.append("Too few evaluations lie above the floor for a line.")
        return " ".join(said)
    lo, hi = line.compute_range_flops
    said.append(
        f"Loss less the true floor falls as C^-{line.exponent:.3f} from {lo:.2g} to {hi:.2g} FLOPs ({line.n_points} "
        f"points, none further than {line.largest_deviation:.1%} from the line)."
    )
    if line.curvature_per_decade is not None and line.local_exponents is not None:
        first, last = line.local_exponents
        said.append(
            f"Over all points the local exponent goes from {first:.3f} to {last:.3f}: {line.curvature_per_decade:+.3f} a "
            "decade of compute, where a power law has 0."
        )
    return " ".join(said)


def _error_sentence(known: KnownFloor) -> str:
    """What the standard error of z is."""
    assert known.z is not None
    side = "below" if known.z < 0 else "above"
    if known.error_simulated:
        return (
            f"One standard error, {known.standard_error_nats:.4f} nats, is how far E strays {side} the truth in sweeps "
            "simulated with this very floor and the noise seen here."
        )
    return f"One standard error, {known.standard_error_nats:.4f} nats, is the spread of E over the resamples."


def floor_line(known: KnownFloor) -> str:
    """One sentence: true E, fitted E with its interval, and z, how many standard errors lie between them."""
    true = f"The corpus's true irreducible loss is {known.floor_nats:.4f} nats"
    if known.fitted_nats is None:
        return f"{true}; no law with an E was fitted."
    told = f"{true}; Approach 3 finds E = {known.fitted_nats:.4f}"
    if known.interval is not None:
        told += f" ({known.interval[0]:.4f} to {known.interval[1]:.4f})"
    if known.z is not None:
        told += f", z = {known.z:+.2f} standard errors"
    return told + "."
