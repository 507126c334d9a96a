"""Lenient parsing of option values, from the command line or from YAML, to a field's type.

`1e9`, `2.5B`, `200_000` and `64` are integers; `30m`, `1.5h` and `1h30m` are times; paths need no quotes.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from scaling_lab.core.errors import UserError, unknown

NUMBER = re.compile(
    r"([+-]?)(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE]([+-]?\d{1,4}))?\s*([kKmMbBgGtT]?)", re.ASCII
)
SUFFIXES = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
TIME_PART = re.compile(r"(\d[\d_]*\.?\d*|\.\d+)\s*([a-z]*)", re.ASCII)
SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
LARGEST_INT = 2**63 - 1
# What must be quoted to be read back as the same text.
_SPECIAL = re.compile(r"[,'\"\[\](){}]|^\s|\s$|^$")
_INVALID = object()


def read_value(key: str, raw: Any, expected: Any) -> Any:
    """`raw` (text, or a plain YAML value) as the type `expected`. Raises `UserError` naming key, value and expected type."""
    value = _read(key, raw, expected)
    if value is _INVALID:
        raise UserError(f"{key}={show(raw)} is invalid: expected {describe(expected, key)}.")
    return value


def unquoted(text: str) -> str:
    """The text without a pair of quotes around all of it, as Hydra users write them."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def show(raw: Any) -> str:
    """A value as the user wrote it, shortened for an error message."""
    text = raw if isinstance(raw, str) else repr(raw)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def split_list(text: str) -> list[str]:
    """The parts of `a,b,c`; commas inside brackets and quotes do not split."""
    parts, depth, quote, current = [], 0, "", ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth <= 0:
            parts.append(current)
            current = ""
            continue
        current += c
    return [*parts, current]


def choices_of(expected: Any) -> tuple[str, ...]:
    """The values of an enum or Literal, also inside an optional; empty for types without fixed choices."""
    origin = get_origin(expected)
    if origin is Literal:
        return tuple(str(a) for a in get_args(expected))
    if origin in (Union, types.UnionType):
        return tuple(c for arg in get_args(expected) for c in choices_of(arg))
    if isinstance(expected, type) and issubclass(expected, Enum):
        return tuple(str(member.value) for member in expected)
    return ()


def describe(expected: Any, key: str = "") -> str:
    """A description of a type's values for an error message."""
    origin, args = get_origin(expected), get_args(expected)
    if choices_of(expected):
        return "one of " + ", ".join(choices_of(expected))
    if origin in (Union, types.UnionType):
        parts = ["null" if a is type(None) else describe(a, key) for a in args]
        return " or ".join(sorted(parts, key=lambda p: p == "null"))
    if expected is bool:
        return "true or false"
    if expected in (int, float) and time_unit(key):
        return "a time such as 30m, 1.5h or 2d"
    if expected is int:
        return "an integer such as 64, 200_000, 1e9 or 2.5B"
    if expected is float:
        return "a number such as 0.1, 1e9 or 2.5B"
    if _is_list(expected):
        inner = args[0] if args else Any
        return f"a list such as [A,B], each {describe(inner, key)}"
    if origin in (dict, Mapping) or expected in (dict, Mapping):
        return "a group of options"
    return "text"


def time_unit(key: str) -> float | None:
    """Seconds per unit of a time field, derived from the unit in its name; None for other fields."""
    name = key.rpartition(".")[2]
    if "_per_" in name:  # a rate: price_per_hour
        return None
    if re.search(r"(^|_)hours?$", name):
        return 3600.0
    if re.search(r"(^|_)minutes?$", name):
        return 60.0
    if re.search(r"(^|_)seconds?$|_time_s$", name):
        return 1.0
    return None


def _read(key: str, raw: Any, expected: Any) -> Any:
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _read_union(key, raw, args)
    if origin is Literal:
        text = _text(raw)
        found = [a for a in args if str(a) == text or str(a).lower() == text.lower()]
        if not found:
            raise unknown(key, text, [str(a) for a in args])
        return found[0]
    if isinstance(expected, type) and issubclass(expected, Enum):
        text = _text(raw).lower()
        found = [m for m in expected if text in (str(m.value).lower(), m.name.lower())]
        if not found:
            raise unknown(key, _text(raw), [m.value for m in expected])
        return found[0]
    if expected is bool:
        return _read_bool(raw)
    if expected is int:
        return _read_int(key, raw)
    if expected is float:
        return _read_float(key, raw)
    if expected is str:
        return unquoted(raw) if isinstance(raw, str) else str(raw) if _is_number(raw) else _INVALID
    if expected is Path:
        return Path(unquoted(raw)).expanduser() if isinstance(raw, str) else _INVALID
    if _is_list(expected):
        return _read_list(key, raw, args[0] if args else Any)
    if origin in (dict, Mapping) or expected in (dict, Mapping):
        return dict(raw) if isinstance(raw, Mapping) else _INVALID
    return _plain(raw)


def _read_union(key: str, raw: Any, args: Sequence[Any]) -> Any:
    if type(None) in args and (raw is None or (isinstance(raw, str) and raw.strip().lower() == "null")):
        return None
    members = [a for a in args if a is not type(None)]
    # Every text is a valid str, so it is tried last: `auto` or a number.
    for member in sorted(members, key=lambda a: a is str):
        try:
            value = _read(key, raw, member)
        except UserError:
            if len(members) == 1:
                raise
            continue
        if value is not _INVALID:
            return value
    return _INVALID


def _read_bool(raw: Any) -> Any:
    if isinstance(raw, bool):
        return raw
    text = _text(raw).lower()
    return True if text in TRUE else False if text in FALSE else _INVALID


def _read_int(key: str, raw: Any) -> Any:
    exact = _exact(key, raw)
    if exact is None or exact.denominator != 1:
        return _INVALID
    if abs(exact) > LARGEST_INT:
        raise UserError(f"{key}={show(raw)} is too large: the maximum is {LARGEST_INT:.1e}.")
    return int(exact)


def _read_float(key: str, raw: Any) -> Any:
    if isinstance(raw, float) and not isinstance(raw, bool):
        return raw if math.isfinite(raw) else _INVALID
    exact = _exact(key, raw)
    if exact is None:
        return _INVALID
    try:
        return float(exact)
    except OverflowError:
        raise UserError(f"{key}={show(raw)} is too large.") from None


def _exact(key: str, raw: Any) -> Fraction | None:
    """The number in `raw` without rounding (2.5B is exactly 2_500_000_000); times in the unit of the field's name."""
    if _is_number(raw):
        return Fraction(raw) if math.isfinite(raw) else None
    if not isinstance(raw, str):
        return None
    text = unquoted(raw).strip()
    unit_s = time_unit(key)
    if unit_s is not None and (seconds := _seconds(text)) is not None:
        return Fraction(seconds) / Fraction(unit_s)
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    sign, digits, exponent, suffix = match.groups()
    power = int(exponent or 0) + SUFFIXES[suffix.lower()]
    if abs(power) > 400 or len(digits) > 400:
        raise UserError(f"{key}={show(raw)} is too large or too small.")
    value = Fraction(digits.replace("_", "").rstrip(".") or "0") * Fraction(10) ** power
    return -value if sign == "-" else value


def _seconds(text: str) -> float | None:
    """`30m`, `1h30m`, `2 days` in seconds; None if the text is not a time with units."""
    lowered = text.lower().replace("_", "")
    parts = TIME_PART.findall(lowered)
    if not parts or TIME_PART.sub("", lowered).strip() or any(unit not in SECONDS for _, unit in parts):
        return None
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def _read_list(key: str, raw: Any, inner: Any) -> Any:
    if isinstance(raw, str):
        text = raw.strip()
        if text[:1] in "[(" and text[-1:] in "])" and len(text) >= 2:
            text = text[1:-1]
        items: list[Any] = [part.strip() for part in split_list(text)] if text.strip() else []
        if any(not item for item in items):
            return _INVALID
    elif isinstance(raw, (list, tuple)):
        items = list(raw)
    else:
        items = [raw]
    return tuple(read_value(key, item, inner) for item in items)


def _plain(raw: Any) -> Any:
    """A value for a field of any type: text is parsed as null, bool, number, list, group or else text."""
    if not isinstance(raw, str):
        return raw
    text = raw.strip()
    if text.lower() in ("null", "none"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if NUMBER.fullmatch(text):
        for read in (_read_int, _read_float):
            value = read("", text)
            if value is not _INVALID:
                return value
    if text.startswith("[") and text.endswith("]"):
        return [_plain(part.strip()) for part in split_list(text[1:-1]) if part.strip()]
    if text.startswith("{") and text.endswith("}"):
        return _plain_group(raw, text)
    return unquoted(raw)


def _plain_group(raw: str, text: str) -> dict[str, Any]:
    """`{kind: zipf_facts, seed: 3}` as a mapping."""
    found: dict[str, Any] = {}
    for part in split_list(text[1:-1]):
        name, colon, value = part.partition(":")
        if not colon or not name.strip():
            raise UserError(f"{show(raw)} is invalid: expected {{option: value, ...}}.")
        found[unquoted(name.strip())] = _plain(value.strip())
    return found


def _is_list(expected: Any) -> bool:
    return get_origin(expected) in (list, tuple, Sequence) or expected in (list, tuple, Sequence)


def _is_number(raw: Any) -> bool:
    return isinstance(raw, (int, float)) and not isinstance(raw, bool)


def _text(raw: Any) -> str:
    if isinstance(raw, bool):
        return str(raw).lower()
    return unquoted(raw.strip()) if isinstance(raw, str) else str(raw)


def text(value: Any) -> str:
    """A value as it is written on the command line, read back as the same."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(text(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (str, Path)):
        return _quoted(str(value))
    return repr(value)


def _quoted(value: str) -> str:
    if not _SPECIAL.search(value):
        return value
    quote = '"' if "'" in value else "'"
    if quote in value:
        raise UserError(f"{value!r}: a text with both kinds of quotes cannot be an option's value.")
    return f"{quote}{value}{quote}"
