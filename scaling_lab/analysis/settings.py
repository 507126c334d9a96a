"""The options of an analysis: one frozen tree whose field names are the option names of `scaling-lab analyze`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scaling_lab.analysis.approaches import (
    Envelope,
    EnvelopeSettings,
    IsoFlop,
    IsoFlopSettings,
    Parametric,
    ParametricSettings,
)
from scaling_lab.analysis.data.observations import CONVENTIONS
from scaling_lab.analysis.data.tables.cells import DECIMALS
from scaling_lab.analysis.data.tables.units import read_units
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.laws import law_names
from scaling_lab.core.errors import UserError, unknown

POINTS = ("final", "all")
WEIGHTS = ("loss_sem",)
ALL_LAWS = "all"


@dataclass(frozen=True)
class ApproachSettings:
    """Options `approach.*`: one field per approach."""

    envelope: EnvelopeSettings = field(default_factory=EnvelopeSettings)
    isoflop: IsoFlopSettings = field(default_factory=IsoFlopSettings)
    parametric: ParametricSettings = field(default_factory=ParametricSettings)

    def all(self) -> tuple[Envelope, IsoFlop, Parametric]:
        """The three approaches, in the order of analysis.json."""
        return Envelope(self.envelope), IsoFlop(self.isoflop), Parametric(self.parametric)


@dataclass(frozen=True)
class AnalysisSettings:
    """Everything that determines an analysis, apart from its observations."""

    points: Literal["final", "all"] = "final"
    """One point per run (its last by tokens), or every row. The envelope always uses every row."""
    metric: str | None = None
    """Column to analyze in place of the loss."""
    metrics: tuple[str, ...] = ()
    """Further loss columns, such as [eval.code,eval.facts]: the optimum of each, and whether they differ."""
    compare_laws: tuple[str, ...] = ()
    """Laws to compare with approach.parametric.law by their error on points that they were not fitted to; [all] takes
    every law."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """COLUMN, COLUMN.min or COLUMN.max -> value."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name -> the table's."""
    units: Mapping[str, Any] = field(default_factory=dict)
    """Column -> its unit in the table: a number, K, M, B or T (FLOPs: PF-days too); nats or bits per token for losses. `where`
    compares the numbers as they stand in the table."""
    best_of: str | None = None
    """A table's column of a hyperparameter (lr): of the runs of equal N and D only the best is analyzed."""
    pool: bool = False
    """Whether one law is fitted to a table whose runs of equal N and D differ by more than seeds do."""
    convention: str | None = None
    """What N and C count; null: as_given for a table, the plan's convention for a sweep."""
    decimal: str | None = None
    """The decimal mark of numbers in text cells: point or comma; null decides by each column."""
    weights: str | None = None
    """loss_sem weights each point by 1 / loss_sem^2; null weights all points equally."""
    strict: bool = False
    """Every bad row is an error."""
    seed: int = 0
    """Seed of the resampling: the same seed gives the same intervals."""
    approach: ApproachSettings = field(default_factory=ApproachSettings)
    bootstrap: BootstrapSettings = field(default_factory=BootstrapSettings)
    predict_flops: tuple[float, ...] = ()
    """Further budgets (FLOPs) to predict the optimum at, in addition to ten times the largest observed."""
    sensitivity: bool = True
    """Whether to repeat the analysis under other choices."""
    backtest: bool = True
    """Whether to predict the largest budget from the others."""
    profile: bool = True
    """Whether to trace profile-likelihood intervals of the parametric fit, in addition to the bootstrap's."""
    study: str | None = None
    """One study by name, or none; default: every study whose data are there."""

    def __post_init__(self) -> None:
        if self.points not in POINTS:
            raise unknown("points", self.points, POINTS)
        if self.weights is not None and self.weights not in WEIGHTS:
            raise unknown("weights", self.weights, WEIGHTS)
        if self.decimal is not None and self.decimal not in DECIMALS:
            raise unknown("decimal", self.decimal, DECIMALS)
        if self.convention is not None and self.convention not in CONVENTIONS:
            raise unknown("convention", self.convention, CONVENTIONS)
        read_units(self.units, self.loss_columns)
        for law in self.compare_laws:
            if law != ALL_LAWS and law not in law_names():
                raise unknown("compare_laws", law, (ALL_LAWS, *law_names()))
        for flops in self.predict_flops:
            if not flops > 0:
                raise UserError(f"compute_flops={flops} must be positive.")

    @property
    def loss_columns(self) -> tuple[str, ...]:
        """The columns of `metric` and `metrics`."""
        return (*(() if self.metric is None else (self.metric,)), *self.metrics)
