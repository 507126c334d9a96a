"""JSON serialization of frozen dataclasses, the same in spec.json, plan.json, checkpoints and the run id.

A member of a scanned package (shape, source, schedule) includes its `kind`. The canonical form omits fields that have
their default value, so that adding a field with a default keeps all existing run ids.
"""

from __future__ import annotations

import dataclasses
import json
import math
from enum import Enum
from functools import cache
from typing import Any

# Marks errors about fields that this version does not know.
NEWER = "written by a newer version?"
# Types that need no conversion. Not float, which may be NaN; compared by exact type because an enum may be a str.
_PLAIN = frozenset({str, int, bool})


@cache
def _parts(cls: type) -> tuple[str | None, tuple[dataclasses.Field[Any], ...]] | None:
    """(`kind`, fields) of a dataclass; None for other types. Cached: a plan of 10,000 runs needs it 600,000 times."""
    if not dataclasses.is_dataclass(cls):
        return None
    kind = getattr(cls, "kind", None)
    return (kind if isinstance(kind, str) else None), dataclasses.fields(cls)


def to_dict(value: Any, *, canonical: bool = False) -> Any:
    """A JSON-ready form of a dataclass, enum, tuple, dict or scalar; `canonical` omits fields at their default."""
    if value is None or type(value) in _PLAIN:
        return value
    parts = _parts(type(value))  # type: ignore[arg-type]  # mypy: are types hashable?
    if parts is not None:
        kind, fields = parts
        out: dict[str, Any] = {} if kind is None else {"kind": kind}
        for field in fields:
            item = getattr(value, field.name)
            if canonical and _is_default(field, item):
                continue
            out[field.name] = to_dict(item, canonical=canonical)
        return out
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_dict(item, canonical=canonical) for item in value]
    if isinstance(value, dict):
        return {str(key): to_dict(item, canonical=canonical) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN; missing is null
    return value


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(field.default == value)
    if field.default_factory is not dataclasses.MISSING:
        return bool(field.default_factory() == value)
    return False


def canonical_json(value: Any) -> str:
    """A unique text for each value: sorted keys, no spaces, shortest round-trip floats."""
    return json.dumps(to_dict(value, canonical=True), sort_keys=True, separators=(",", ":"), allow_nan=False)


def dumps(value: Any) -> str:
    """Readable JSON of a dataclass or plain value, without NaN."""
    return json.dumps(to_dict(value), indent=1, allow_nan=False) + "\n"


def build(cls: type, data: dict[str, Any]) -> Any:
    """`cls(**data)` for a flat dataclass, ignoring `kind`. Raises ValueError for fields that this version does not know."""
    names = _names(cls)
    extra = set(data) - names - {"kind"}
    if extra:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(extra))}: {NEWER}")
    return cls(**{key: value for key, value in data.items() if key in names})


@cache
def _names(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(cls))
