"""What a study is given, and what a study's module must have.

    # scaling_lab/analysis/studies/my_study.py
    QUESTION = "Does the loss depend on the depth?"
    NEEDS = "completed runs of at least two depths"

    def find(given: StudyInput) -> Finding | None: ...

`find` returns None where its data are not there, and a `Finding` whose status and reason say why where they are there but
give no answer. It raises `UserError` for options that ask for something impossible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.sweep_records import SweepRecords
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.finding import Finding
from scaling_lab.analysis.inference.bands import Band
from scaling_lab.analysis.settings import AnalysisSettings


@dataclass(frozen=True)
class LawAnalysis:
    """The three approaches on one set of observations, as a study may use them."""

    observations: Observations
    """Every row."""
    points: Observations
    """Those that IsoFLOP and the parametric fit used."""
    weights: Array | None
    """(points,) of the fits; None: equal."""
    mean_compute_flops: float
    """Geometric mean of the points' training FLOPs."""
    estimates: tuple[Estimate, ...]
    """envelope, isoflop, parametric."""
    bands: tuple[Band, ...]
    """One for each estimate."""


@dataclass(frozen=True)
class StudyInput:
    """Everything that a study may look at."""

    settings: AnalysisSettings
    records: SweepRecords = field(default_factory=SweepRecords)
    """Run records of the sweep, of any status, with their curves; none for a table."""
    laws: LawAnalysis | None = None
    """None where no law can be fitted to the records (`records` alone are there)."""


class Study(Protocol):
    """A module of `scaling_lab.analysis.studies`."""

    QUESTION: str
    """What it answers, in one sentence."""
    NEEDS: str
    """What must be there for an answer; follows "it needs"."""
    find: Callable[[StudyInput], Finding | None]
