"""Study: profile-likelihood intervals of the fitted law, next to the bootstrap's."""

from __future__ import annotations

from typing import Any

from scaling_lab.analysis.approaches import Parametric
from scaling_lab.analysis.estimate import Estimate
from scaling_lab.analysis.finding import Cell, Column, Finding, FindingStatus, FindingTable, KeyQuantity
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.inference.profiles import Profile, ProfileEnds, profile
from scaling_lab.analysis.json_parts import number
from scaling_lab.analysis.studies.base import StudyInput
from scaling_lab.analysis.text import GREEK, NOTHING, format_range, significant

QUESTION = "Which values of the law's parameters do the data allow, by profile likelihood?"
NEEDS = "a fitted law, and profile=true"

_NAMES = {"params_exponent": "a, the exponent of N", "tokens_exponent": "b, the exponent of D"}

_IN_SENTENCE = {"params_exponent": "the exponent of N"}


def find(given: StudyInput) -> Finding | None:
    if given.laws is None or not given.settings.profile:
        return None
    laws, settings = given.laws, given.settings
    approach = Parametric(settings.approach.parametric)
    estimate, band = laws.estimates[2], laws.bands[2]
    traced = profile(approach, laws.points, estimate, settings.bootstrap.level, laws.weights)
    return as_finding(traced, estimate, band)


def as_finding(traced: Profile, estimate: Estimate, band: Band) -> Finding:
    """The traced intervals next to those of the bootstrap."""
    found = _values(estimate)
    quantities = tuple(
        KeyQuantity(name, found.get(name), (ends.lo, ends.hi), form="sig4")
        for name, ends in traced.intervals.items()
    )
    return Finding(
        name="profile",
        title="Intervals by profile likelihood",
        question=QUESTION,
        answer=_answer(traced, found),
        status=FindingStatus.ANSWERED if traced.intervals else FindingStatus.NOT_ANSWERED,
        reason=traced.message,
        level=traced.level,
        quantities=quantities,
        tables=(_table(traced, found, band),) if traced.intervals else (),
        caveats=tuple(dict.fromkeys(ends.message for ends in traced.intervals.values() if ends.message)),
        documented={"profile": _documented(traced)},
    )


def _values(estimate: Estimate) -> dict[str, float]:
    """The fitted value of each quantity, by its name."""
    values = dict(estimate.fits[0].parameters) if estimate.fits else {}
    if estimate.frontier is not None:
        values["params_exponent"] = estimate.frontier.params.exponent
        values["tokens_exponent"] = estimate.frontier.tokens.exponent
    return values


def _answer(traced: Profile, found: dict[str, float]) -> str:
    if not traced.intervals:
        return "There are no profile-likelihood intervals."
    first = [name for name in ("params_exponent", "E") if name in traced.intervals] or list(traced.intervals)[
        :1
    ]
    told = [
        f"{_IN_SENTENCE.get(name, _name(name))} is {format_range(found.get(name), (ends.lo, ends.hi), 'sig4')}"
        for name in first
        for ends in (traced.intervals[name],)
    ]
    return f"By profile likelihood ({traced.level:.0%}), {' and '.join(told)}."


def _name(quantity: str) -> str:
    return _NAMES.get(quantity, GREEK.get(quantity, quantity))


def _table(traced: Profile, found: dict[str, float], band: Band) -> FindingTable:
    rows: list[tuple[Cell, ...]] = []
    for name, ends in traced.intervals.items():
        boot = band.interval(name)
        rows.append(
            (
                _name(name),
                found.get(name),
                _range_text(ends),
                NOTHING if boot is None else f"{significant(boot.lo, 4)} to {significant(boot.hi, 4)}",
                ends.message or "",
            )
        )
    return FindingTable(
        name="intervals",
        caption="The same parameters by profile likelihood",
        columns=(
            Column(""), Column("value", "sig4"), Column(f"profile, {traced.level:.0%}", "sig4"),
            Column(f"bootstrap, {band.level:.0%}", "sig4"), Column(""),
        ),
        rows=tuple(rows),
        warnings=tuple(i for i, e in enumerate(traced.intervals.values()) if e.lo is None or e.hi is None),
        note="A profile fixes one quantity at each of many values, refits the others, and keeps the values at which the fit "
        "is not yet too bad for the noise of its own residuals. Where it and the bootstrap differ much, the wider is safer.",
        in_terminal=False,
    )  # fmt: skip


def _range_text(ends: ProfileEnds) -> str:
    low, high = ("unbounded" if end is None else significant(end, 4) for end in (ends.lo, ends.hi))
    return f"{low} to {high}"


def _documented(traced: Profile) -> dict[str, Any]:
    """The field `profile` of the parametric estimate in analysis.json."""
    return {
        "method": "profile likelihood",
        "scale": traced.scale,
        "level": traced.level,
        "message": traced.message,
        "intervals": {name: [number(ends.lo), number(ends.hi)] for name, ends in traced.intervals.items()},
        "messages": {name: ends.message for name, ends in traced.intervals.items() if ends.message},
    }
