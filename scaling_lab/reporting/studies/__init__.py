"""Figures of single studies: `NAME.py` has `draw(finding, axes)` for the study of that name.

A study without such a file is drawn by the kinds of its series (`finding_figures.draw_by_kind`). `axes` are one for each
panel of the finding's chart; everything drawn comes from the finding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, cast

from scaling_lab.analysis.finding import Finding

Drawing = Callable[[Finding, Sequence[Any]], None]


def own_drawing(study: str) -> Drawing | None:
    """The `draw` of a study's own file; None where it has none."""
    name = f"{__name__}.{study}"
    if not study.isidentifier() or find_spec(name) is None:
        return None
    return cast("Drawing", importlib.import_module(name).draw)
