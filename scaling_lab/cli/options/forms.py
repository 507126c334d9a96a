"""The options of a command with type, default and meaning, derived from the settings dataclasses.

A `Form` defines which keys are known, the types of their values, and what help prints. `build` constructs the same
dataclasses from the composed config, so that help, checks and typed settings cannot disagree.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from scaling_lab.cli.options.arguments import nearest
from scaling_lab.cli.options.values import choices_of, read_value, unquoted
from scaling_lab.core.errors import UserError

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Option:
    """One key of a command."""

    key: str
    value_type: Any
    """The type of its value."""
    default: Any = REQUIRED
    meaning: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        return choices_of(self.value_type)

    @property
    def has_default(self) -> bool:
        return self.default is not REQUIRED


@dataclass(frozen=True)
class GroupOption:
    """An option that selects a choice of a config group, such as `model=gpt2`."""

    key: str
    """As the user writes it: `model`."""
    chosen: str | None
    choices: tuple[str, ...]
    meaning: str = ""


@dataclass(frozen=True)
class Form:
    """All options of a command."""

    options: Mapping[str, Option]
    groups: tuple[GroupOption, ...] = ()
    free: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Prefixes that accept any key after them (`where.`, `columns.`) -> meaning."""
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Keys that cannot be set here -> what to do instead."""

    def known(self, key: str) -> bool:
        return key in self.options or any(g.key == key for g in self.groups) or self.is_free(key)

    def is_free(self, key: str) -> bool:
        return any(key.startswith(prefix) and len(key) > len(prefix) for prefix in self.free)

    def check(self, key: str) -> None:
        """Raise `UserError` with the closest key and the choices if `key` is not known."""
        if self.known(key):
            return
        if key in self.elsewhere:
            raise UserError(f"{key} cannot be set here: {self.elsewhere[key]}")
        names = [*self.options, *(g.key for g in self.groups), *(f"{p}COLUMN" for p in self.free)]
        near = nearest(key, names)
        prefix = key.rpartition(".")[0]
        same_level = sorted({n for n in names if n.rpartition(".")[0] == prefix})
        tops = {n if "." not in n else f"{n.partition('.')[0]}.*" for n in names}
        choices = same_level if prefix and same_level else sorted(tops)
        hint = f" Did you mean {near}?" if near else ""
        where = f" under {prefix}" if prefix and same_level else ""
        raise UserError(f"there is no option {key!r}.{hint} Choices{where}: {', '.join(choices)}.")

    def read_free(self, key: str, raw: str) -> Any:
        """The value of a free key: text unchanged, except for options of algorithms, which are parsed."""
        return read_value(key, raw, Any) if key.startswith("approach.") else unquoted(raw)

    def read(self, key: str, raw: Any) -> Any:
        """Parse the value of an option."""
        return read_value(key, raw, self.options[key].value_type)


@cache
def type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def field_meanings(cls: type) -> dict[str, str]:
    """Field -> first sentence of the docstring below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # no source available (a frozen application): help omits the meanings
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, doc in itertools.pairwise(statements):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
                and isinstance(doc.value.value, str)
            ):
                found[field.target.id] = first_sentence(doc.value.value)
    return found


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line, without its period."""
    line = " ".join(text.split())
    ends = [m.start() for m in re.finditer(r"(?<! al)(?<!e\.g)\. (?=[A-Z`])", line)]
    return (line[: ends[0]] if ends else line).rstrip(".")


def is_mapping(value_type: Any) -> bool:
    """Whether a field's type is a mapping of free keys."""
    return typing.get_origin(value_type) is not None and issubclass_of(typing.get_origin(value_type), Mapping)


def issubclass_of(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; REQUIRED if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def options_of(
    cls: type, prefix: str = "", *, meanings: Mapping[str, str] | None = None, skip: Sequence[str] = ()
) -> dict[str, Option]:
    """The options of the dataclass `cls`, with dotted keys for nested dataclasses; `meanings` override the docstrings."""
    found: dict[str, Option] = {}
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or not field.init:
            continue
        key, value_type = prefix + field.name, hints[field.name]
        if isinstance(value_type, type) and dataclasses.is_dataclass(value_type):
            found |= options_of(value_type, f"{key}.", meanings=meanings)
            continue
        if is_mapping(value_type):
            continue  # accepts any key: see Form.free
        meaning = (meanings or {}).get(key) or field_meanings(cls).get(field.name, "")
        found[key] = Option(key, value_type, default_of(field), meaning)
    return found


def build(
    cls: type,
    node: Any,
    prefix: str = "",
    *,
    given: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> Any:
    """An instance of the dataclass `cls` from a plain config node.

    Args:
        node: key -> plain value; `kind` is ignored.
        prefix: prefix of the keys in error messages (`model.`).
        given: values of fields that are already built.
        skip: keys of the node to ignore.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={node!r} is invalid: expected a group of options.")
    hints = type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = dict(given or {})
    for key, raw in node.items():
        if key == "kind" or key in skip or key in values:
            continue
        if key not in fields:
            near = nearest(str(key), fields)
            hint = f" Did you mean {prefix}{near}?" if near else ""
            names = sorted(prefix + name for name in fields)
            raise UserError(f"there is no option {prefix + str(key)!r}.{hint} Choices: {', '.join(names)}.")
        value_type = hints[key]
        if isinstance(value_type, type) and dataclasses.is_dataclass(value_type):
            values[key] = build(value_type, raw, f"{prefix}{key}.")
        else:
            values[key] = read_value(prefix + key, raw, value_type)
    missing = [n for n, f in fields.items() if n not in values and default_of(f) is REQUIRED]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing: give {prefix}{missing[0]}=VALUE.")
    return cls(**values)
