"""The common form of what a study finds: plain values that the report, analysis.json, the terminal and W&B show alike.

A `Finding` holds everything that is shown of it: sentences, numbers, tables, and the values of its figure. A report made
from analysis.json alone is therefore the same as one made in the process that did the analysis.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from scaling_lab.analysis.text import NOTHING, format_range, number_format
from scaling_lab.core.storage.serialization import NEWER, to_dict

Range = tuple[float | None, float | None]
"""Low and high end of an interval; None where there is no bound on that side."""
Cell = str | float | int | bool | None | tuple[float | None, float | None, float | None]
"""One cell of a table. A tuple is an estimate with the two ends of its interval."""
SeriesKind = Literal["points", "line", "marked_line", "band"]


class FindingStatus(StrEnum):
    """Whether a study answered its question."""

    ANSWERED = "answered"
    TOO_SMALL = "too_small"
    """The effect is smaller than these runs can show; `reason` says what would be enough."""
    NOT_ANSWERED = "not_answered"
    """The data are there and give no answer; `reason` says why."""
    FAILED = "failed"
    """The study raised an error that is a bug; `reason` is the error."""


@dataclass(frozen=True)
class PublishedValue:
    """What a paper gives for the same quantity."""

    value: float
    source: str
    """Authors, year, and where in the paper: "Kaplan et al. 2020, eq. 1.1"."""
    interval: Range | None = None


@dataclass(frozen=True)
class KeyQuantity:
    """One number of the answer."""

    name: str
    estimate: float | None
    interval: Range | None = None
    unit: str = ""
    form: str = "sig3"
    """How it is written: see `analysis.text.number_format`."""
    published: tuple[PublishedValue, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column of a table. With a `form` its numbers are set flush right and written so; without, they are text."""

    heading: str
    form: str = ""
    unit: str = ""

    @property
    def title(self) -> str:
        """The heading with its unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    def text(self, cell: Cell) -> str:
        """A cell as this column writes it."""
        if cell is None:
            return NOTHING
        if isinstance(cell, str):
            return cell
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        form = self.form or "sig3"
        return format_range(cell[0], cell[1:], form) if isinstance(cell, tuple) else number_format(form)(cell)


@dataclass(frozen=True)
class FindingTable:
    """A table of a finding."""

    name: str
    """Short, for programs: "cells"."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    warnings: tuple[int, ...] = ()
    """Rows that need attention, by their index."""
    note: str = ""
    in_terminal: bool = True
    """Whether the summary in the terminal shows it too."""


@dataclass(frozen=True)
class Axis:
    """An axis of a panel. Limits are found from the values where `low` and `high` are None."""

    label: str
    log: bool = False
    form: str = "sig3"
    """How its ticks are written."""
    low: float | None = None
    high: float | None = None
    categories: tuple[str, ...] = ()
    """Names at 0, 1, 2, ... instead of numbers; of a y-axis from the top down."""


@dataclass(frozen=True)
class Series:
    """Values of a panel that are drawn alike."""

    kind: SeriesKind
    x: tuple[float | None, ...]
    y: tuple[float | None, ...] = ()
    low: tuple[float | None, ...] = ()
    """Lower ends of error bars or of a band; None: no bar."""
    high: tuple[float | None, ...] = ()
    label: str = ""
    """Its name in the legend; empty: not named there."""
    error_axis: Literal["x", "y"] = "y"
    """Along which axis `low` and `high` lie."""
    color: str = ""
    """A role ("envelope", "isoflop", "parametric", "ink", "muted") or the number of an accent ("0", "1", ...); empty: by
    `scale`, else the next accent."""
    scale: float | None = None
    """A positive number (a size, a width) whose place among the panel's is shown as the color."""
    marker: int = 0
    """Number of its marker and line style: 0 is a dot and a solid line."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """The figure of a finding."""

    name: str
    """File name without its ending, and id in the page."""
    title: str
    caption: str
    """How to read it."""
    alt: str
    """The same facts in words, for a reader who cannot see it."""
    panels: tuple[Panel, ...]
    columns: int = 1
    """Panels side by side."""
    height_inches: float = 3.6
    scale_label: str = ""
    """What the colors of series with a `scale` show; with it a color bar is drawn."""
    scale_form: str = "count"
    """How the numbers of that bar are written."""


@dataclass(frozen=True)
class Finding:
    """What one study found. Arrays and NumPy numbers become tuples and floats, and NaN None, when it is made."""

    name: str
    """The study's: `study=NAME`."""
    title: str
    question: str
    answer: str
    """A sentence with numbers; where there is no answer, that there is none."""
    status: FindingStatus = FindingStatus.ANSWERED
    reason: str | None = None
    """Why there is no answer, or how far to trust it."""
    level: float | None = None
    """Of the intervals, .9 for 90%."""
    quantities: tuple[KeyQuantity, ...] = ()
    tables: tuple[FindingTable, ...] = ()
    chart: Chart | None = None
    caveats: tuple[str, ...] = ()
    documented: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Fields of analysis.json as they were documented before there were findings; not part of the finding's own JSON."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.name != "documented":
                object.__setattr__(self, each.name, _plain(getattr(self, each.name)))
        for table in self.tables:
            if any(len(row) != len(table.columns) for row in table.rows):
                raise ValueError(
                    f"study {self.name}: a row of the table {table.name!r} has too many or too few cells"
                )
        for series in (s for panel in (self.chart.panels if self.chart else ()) for s in panel.series):
            lengths = {len(v) for v in (series.x, series.y, series.low, series.high) if v}
            if len(lengths) > 1:
                raise ValueError(
                    f"study {self.name}: the values of the series {series.label!r} differ in number"
                )

    def __repr__(self) -> str:
        return f"Finding({self.name}: {self.answer if self.is_answered else self.status.value})"

    @property
    def is_answered(self) -> bool:
        return self.status is FindingStatus.ANSWERED

    def quantity(self, name: str) -> KeyQuantity:
        """One of `quantities`. Raises KeyError."""
        try:
            return next(q for q in self.quantities if q.name == name)
        except StopIteration:
            raise KeyError(name) from None

    def table(self, name: str) -> FindingTable:
        """One of `tables`. Raises KeyError."""
        try:
            return next(t for t in self.tables if t.name == name)
        except StopIteration:
            raise KeyError(name) from None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps(..., allow_nan=False)`; `from_json` gives an equal finding back."""
        data: dict[str, Any] = to_dict(self)
        del data["documented"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """A finding of analysis.json. Raises ValueError for data that are not one."""
        found: Finding = _read(cls, data)
        return found


def values(numbers: Any) -> tuple[float | None, ...]:
    """An array or sequence as the values of a series."""
    plain: tuple[float | None, ...] = _plain(np.asarray(numbers, dtype=np.float64))
    return plain


def _plain(value: Any) -> Any:
    """`value` with tuples for sequences, Python numbers for NumPy's, and None for what is not finite."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence):
        return tuple(_plain(each) for each in value)
    raise TypeError(f"a finding holds plain values, not {type(value).__name__}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(wanted: Any, data: Any) -> Any:
    """The value of type `wanted` that `to_dict` wrote as `data`."""
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        if not isinstance(data, Mapping):
            raise ValueError(f"{wanted.__name__}: wanted an object, got {data!r}")
        hints = _hints(wanted)
        if extra := set(data) - set(hints):
            raise ValueError(f"{wanted.__name__} has no field {', '.join(sorted(extra))}: {NEWER}")
        try:
            return wanted(**{name: _read(hints[name], value) for name, value in data.items()})
        except TypeError as error:
            raise ValueError(f"{wanted.__name__}: {error}") from None
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        inner = [each for each in get_args(wanted) if each is not type(None)]
        # Of several types (a cell) the data's own form decides.
        return _read(inner[0], data) if len(inner) == 1 else _plain(data)
    if origin is tuple:
        each = get_args(wanted)[0]
        return tuple(_read(each, item) for item in data)
    if isinstance(wanted, type) and issubclass(wanted, StrEnum):
        return wanted(data)
    return data
