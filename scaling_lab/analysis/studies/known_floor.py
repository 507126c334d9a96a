"""Study: the true irreducible loss of a corpus of known entropy next to the fitted one, and the reducible loss itself.

The floor is the mean true -ln p of the very validation windows, so L - floor is measured and not fitted. Where it is a
straight line on log axes, the loss is a power law of compute; how straight it is, is measured too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches.parametric import Parametric
from scaling_lab.analysis.data.observations import FLOOR, Observations
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.finding import Axis, Chart, Finding, KeyQuantity, Panel, Series, values
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.json_parts import number
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.analysis.studies.shared.floor_error import floor_errors

QUESTION = "Is the fitted irreducible loss the true one, and is the loss above it a power law of compute?"
NEEDS = "a corpus whose entropy is known, the same validation set in every run: data=context_tree, zipf_facts or mixture"

# A range counts as straight if no point is further than this from its line, in ln(L - floor).
STRAIGHT_WITHIN = 0.03
# A line needs at least so many points.
MIN_POINTS = 3
# Neighbors in ln C closer than this belong to one budget.
SAME_BUDGET = 0.05


@dataclass(frozen=True)
class KnownFloor:
    """The true floor, the fitted one, and the reducible loss of the best models at each compute."""

    floor_nats: float
    fitted_nats: float | None
    """E of the parametric fit; None where it has none."""
    interval: tuple[float, float] | None
    standard_error_nats: float | None
    """Of the fitted E about the true one, on the side where the fitted one lies."""
    compute_flops: Array
    """(points,) ascending: the frontier of the runs' ends, each point the lowest loss up to there."""
    reducible_nats: Array
    """(points,) loss less the floor."""
    line: ReducibleLine | None
    """The straight part; None with too few points."""
    error_simulated: bool = False
    """The standard error is that of fits to sweeps simulated at the true E (`floor_error`), for which z is calibrated;
    otherwise the spread of the resamples."""

    @property
    def z(self) -> float | None:
        """How many standard errors the fitted E lies from the true one: (fitted - true) / standard error."""
        if self.fitted_nats is None or not self.standard_error_nats:
            return None
        return (self.fitted_nats - self.floor_nats) / self.standard_error_nats


@dataclass(frozen=True)
class ReducibleLine:
    """ln(L - floor) = intercept - exponent ln C over the longest straight range, and how it bends over the whole."""

    exponent: float
    intercept: float
    compute_range_flops: tuple[float, float]
    n_points: int
    largest_deviation: float
    """In ln(L - floor), within the range."""
    curvature_per_decade: float | None
    """How much the local exponent grows for each factor of 10 in C, over all points: 0 for a power law."""
    local_exponents: tuple[float, float] | None
    """At the smallest and the largest compute, from the same parabola."""

    def __call__(self, compute_flops: Array) -> Array:
        """Reducible loss on the line, nats."""
        return np.asarray(np.exp(self.intercept - self.exponent * np.log(compute_flops)))


def find(given: StudyInput) -> Finding | None:
    if given.laws is None:
        return None
    laws = given.laws
    approach = Parametric(given.settings.approach.parametric)
    known = known_floor(laws.points, approach, laws.estimates[2], laws.bands[2], laws.weights)
    return None if known is None else as_finding(known, laws.bands[2].level)


def as_finding(known: KnownFloor, level: float) -> Finding:
    """The floors, and the line of the reducible loss, with their figure."""
    line = known.line
    quantities = [
        KeyQuantity("true irreducible loss", known.floor_nats, None, "nats", ".4f"),
        KeyQuantity("fitted E", known.fitted_nats, known.interval, "nats", ".4f"),
        KeyQuantity("z, fitted less true E", known.z, None, "standard errors", "+.2f"),
    ]
    if line is not None:
        quantities.append(KeyQuantity("exponent of the reducible loss", line.exponent, form=".3f"))
        quantities.append(
            KeyQuantity(
                "growth of the local exponent",
                line.curvature_per_decade,
                None,
                "per decade of compute",
                "+.3f",
            )
        )
    return Finding(
        name="known_floor",
        title="The true irreducible loss",
        question=QUESTION,
        answer=_answer(known),
        level=level,
        quantities=tuple(quantities),
        caveats=_notes(known),
        chart=_chart(known) if known.compute_flops.size > 1 else None,
        documented={"known_floor": _documented(known)},
    )


def known_floor(
    observations: Observations,
    approach: Parametric,
    parametric: Estimate,
    band: Band,
    weights: Array | None = None,
) -> KnownFloor | None:
    """None where the floor is not known, or the observations have different ones (different validation sets).

    Args:
        approach: what made `parametric` from the observations and `weights`, and `band` from their resamples.
    """
    column = observations.extra.get(FLOOR)
    if column is None or not np.isfinite(column).all() or np.ptp(column) > 1e-9:
        return None
    floor = float(column[0])
    fit = parametric.fits[0] if parametric.fits else None
    interval = band.interval("E")
    # Where the resamples give no error of E (none were asked for, it is not identified), neither would a simulation.
    error, simulated = band.standard_error("E"), None
    if fit is not None and error is not None:
        errors = floor_errors(observations, approach, fit, floor, band.requested, band.seed, weights)
        simulated = None if errors is None else errors.standard_error(fit.parameters["E"] - floor)
    compute, loss = loss_frontier(observations)
    above = loss > floor
    compute, reducible = compute[above], loss[above] - floor
    return KnownFloor(
        floor_nats=floor,
        fitted_nats=None if fit is None else fit.parameters.get("E"),
        interval=None if interval is None else (interval.lo, interval.hi),
        standard_error_nats=error if simulated is None else simulated,
        compute_flops=compute,
        reducible_nats=reducible,
        line=straight_line(compute, reducible),
        error_simulated=simulated is not None,
    )


def loss_frontier(observations: Observations) -> tuple[Array, Array]:
    """(C, L) of every run's end that no run's end at less compute beats, ascending in C.

    Points inside a run are left out: there the learning rate has not decayed, and the loss is not the best that C can buy.
    """
    order = np.lexsort((observations.loss_nats, observations.compute_flops))
    flops, nats = observations.compute_flops[order], observations.loss_nats[order]
    # Runs of one budget differ by rounding in their FLOPs: the best of those within 5% represents them.
    group = np.concatenate([[0], np.cumsum(np.diff(np.log(flops)) > SAME_BUDGET)])
    best = [np.flatnonzero(group == g)[nats[group == g].argmin()] for g in range(int(group[-1]) + 1)]
    flops, nats = flops[best], nats[best]
    before = np.concatenate([[np.inf], np.minimum.accumulate(nats)[:-1]])
    return flops[nats < before], nats[nats < before]


def straight_line(compute_flops: Array, reducible_nats: Array) -> ReducibleLine | None:
    """The longest range in ln C whose points all lie within `STRAIGHT_WITHIN` of its least-squares line."""
    x, y = np.log(compute_flops), np.log(reducible_nats)
    if x.size < MIN_POINTS:
        return None
    best: tuple[float, int, int] | None = None
    for first in range(x.size - MIN_POINTS + 1):
        for last in range(x.size, first + MIN_POINTS - 1, -1):
            length = float(x[last - 1] - x[first])
            if best is not None and length <= best[0]:
                break
            if _deviation(x[first:last], y[first:last]) <= STRAIGHT_WITHIN:
                best = (length, first, last)
                break
    # Noise may leave no range straight: then the line goes through all points, and its deviation shows it.
    first, last = best[1:] if best else (0, x.size)
    slope, intercept = np.polyfit(x[first:last], y[first:last], 1)
    bend = _parabola(x, y)
    return ReducibleLine(
        exponent=-float(slope),
        intercept=float(intercept),
        compute_range_flops=(float(compute_flops[first]), float(compute_flops[last - 1])),
        n_points=last - first,
        largest_deviation=_deviation(x[first:last], y[first:last]),
        curvature_per_decade=bend[0] if bend else None,
        local_exponents=bend[1] if bend else None,
    )


def _deviation(x: Array, y: Array) -> float:
    slope, intercept = np.polyfit(x, y, 1)
    return float(np.abs(y - slope * x - intercept).max())


def _parabola(x: Array, y: Array) -> tuple[float, tuple[float, float]] | None:
    """(growth of the local exponent per decade, local exponents at both ends) of a parabola through all points."""
    if x.size < MIN_POINTS + 1:
        return None
    center = x.mean()
    a, b, _ = np.polyfit(x - center, y, 2)
    ends: NDArray[np.float64] = -(2 * a * (x[[0, -1]] - center) + b)
    return float(-2 * a * np.log(10)), (float(ends[0]), float(ends[1]))


# -- as a finding


def _answer(known: KnownFloor) -> str:
    line = known.line
    if line is None:
        return f"{_floors_sentence(known)} Too few evaluations lie above the floor for a line."
    lo, hi = line.compute_range_flops
    return (
        f"{_floors_sentence(known)} Loss less the true floor falls as C^-{line.exponent:.3f} from {lo:.2g} to {hi:.2g} FLOPs "
        f"({line.n_points} points, none further than {line.largest_deviation:.1%} from the line)."
    )


def _notes(known: KnownFloor) -> tuple[str, ...]:
    """What the standard error is, and how the line bends."""
    said = [] if known.z is None else [_error_sentence(known)]
    line = known.line
    if line is not None and line.curvature_per_decade is not None and line.local_exponents is not None:
        first, last = line.local_exponents
        said.append(
            f"Over all points the local exponent goes from {first:.3f} to {last:.3f}: {line.curvature_per_decade:+.3f} a "
            "decade of compute, where a power law has 0."
        )
    return tuple(said)


def _floors_sentence(known: KnownFloor) -> str:
    """True E, fitted E with its interval, and z, how many standard errors lie between them."""
    true = f"The corpus's true irreducible loss is {known.floor_nats:.4f} nats"
    if known.fitted_nats is None:
        return f"{true}; no law with an E was fitted."
    found = f"{true}; Approach 3 finds E = {known.fitted_nats:.4f}"
    if known.interval is not None:
        found += f" ({known.interval[0]:.4f} to {known.interval[1]:.4f})"
    if known.z is not None:
        found += f", z = {known.z:+.2f} standard errors"
    return found + "."


def _error_sentence(known: KnownFloor) -> str:
    """What the standard error of z is."""
    assert known.z is not None
    if known.error_simulated:
        side = "below" if known.z < 0 else "above"
        return (
            f"One standard error, {known.standard_error_nats:.4f} nats, is the root mean square error of E {side} the "
            "truth in sweeps simulated with this floor and the noise seen here."
        )
    return f"One standard error, {known.standard_error_nats:.4f} nats, is the spread of E over the resamples."


def _chart(known: KnownFloor) -> Chart:
    """Loss less the true floor at each compute, the line where it is straight, and the same with the fitted floor."""
    compute, reducible = known.compute_flops, known.reducible_nats
    series = [
        Series("points", values(compute), values(reducible), label="loss less the true floor", color="ink")
    ]
    if known.fitted_nats is not None:
        fitted = reducible + known.floor_nats - known.fitted_nats
        above = fitted > 0
        label = "loss less the fitted E"
        series.append(
            Series("line", values(compute[above]), values(fitted[above]), label=label, color="parametric")
        )
    if known.line is not None:
        inside = np.geomspace(*known.line.compute_range_flops, 50)
        beyond = np.geomspace(float(compute.min()), float(compute.max()), 100)
        label = f"C^-{known.line.exponent:.3f}"
        series.append(Series("line", values(inside), values(known.line(inside)), label=label, color="muted"))
        series.append(Series("line", values(beyond), values(known.line(beyond)), color="muted", marker=2))
    return Chart(
        name="reducible_loss",
        title="Loss above the true floor",
        caption="Each dot is the lowest loss that the runs reach at its compute, less the corpus's true entropy. A power law "
        "is a straight line here: the gray one is fitted where the dots are straight, and dotted beyond. The green line is "
        "the same loss less the fitted E, which bends where that E is wrong.",
        alt=f"Loss above its true floor of {known.floor_nats:.4f} nats against training FLOPs.",
        panels=(
            Panel(
                Axis("training FLOPs", log=True, form="flops"),
                Axis("reducible loss (nats)", log=True, form=".3f"),
                tuple(series),
            ),
        ),
    )


def _documented(known: KnownFloor) -> dict[str, Any]:
    """The field `known_floor` of analysis.json."""
    line = known.line
    return {
        "floor_nats": known.floor_nats,
        "fitted_nats": number(known.fitted_nats),
        "interval": None if known.interval is None else [number(end) for end in known.interval],
        "standard_error_nats": number(known.standard_error_nats),
        "standard_error_simulated": known.error_simulated,
        "z": number(known.z),
        "reducible": [
            {"compute_flops": c, "loss_nats": r}
            for c, r in zip(known.compute_flops.tolist(), known.reducible_nats.tolist())
        ],
        "line": None
        if line is None
        else {
            "exponent": line.exponent,
            "compute_range_flops": list(line.compute_range_flops),
            "n_points": line.n_points,
            "largest_deviation": line.largest_deviation,
            "curvature_per_decade": number(line.curvature_per_decade),
            "local_exponents": None if line.local_exponents is None else list(line.local_exponents),
        },
    }
