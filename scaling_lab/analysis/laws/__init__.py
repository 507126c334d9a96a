"""Loss laws, one per file, found by scanning the modules of this package: there is no list to edit."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache
from typing import Any

from scaling_lab.analysis.laws.base import ComputeOptimum, LawInputs, LossLaw
from scaling_lab.core.errors import UserError, unknown

__all__ = ["ComputeOptimum", "LawInputs", "LossLaw", "get_law", "law_names"]


@cache
def _laws() -> dict[str, type[LossLaw]]:
    found: dict[str, type[LossLaw]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, LossLaw) and value.name:
                if found.get(value.name, value) is not value:
                    raise RuntimeError(f"two laws are named {value.name!r}")
                found[value.name] = value
    return dict(sorted(found.items()))


def law_names() -> tuple[str, ...]:
    """Names of all laws, in alphabetical order."""
    return tuple(_laws())


def get_law(name: str, **options: Any) -> LossLaw:
    """The law `name` with its options.

    Raises:
        UserError: an unknown name or option.
    """
    laws = _laws()
    if name not in laws:
        raise unknown("law", name, laws)
    fields = {f.name for f in dataclasses.fields(laws[name])}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            if not fields:
                raise UserError(f"law {name!r} has no options, got {option!r}.")
            raise unknown(f"option of law {name!r}", option, fields)
    return laws[name](**options)
