"""Owns what a command can be told: its options with type, default and meaning, taken from the settings dataclasses.

A `Form` answers three questions: is this key known (and which is nearest), what type does its value have, and what
does help print. The same dataclasses are built from the composed config by `build`, so that help, checks and the typed
edge cannot disagree.
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
    wanted: Any
    """The type of its value."""
    default: Any = REQUIRED
    meaning: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        return choices_of(self.wanted)

    @property
    def has_default(self) -> bool:
        return self.default is not REQUIRED


@dataclass(frozen=True)
class GroupOption:
    """A config group of a command, as help shows it."""

    key: str
    """What the user writes: `model=gpt2`."""
    chosen: str | None
    choices: tuple[str, ...]
    meaning: str = ""


@dataclass(frozen=True)
class Form:
    """Everything that a command can be told."""

    options: Mapping[str, Option]
    groups: tuple[GroupOption, ...] = ()
    free: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Prefixes under which any key goes (`where.`, `columns.`), with their meaning."""
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Keys that somebody might well try, and what to do instead."""

    def known(self, key: str) -> bool:
        return key in self.options or any(g.key == key for g in self.groups) or self.is_free(key)

    def is_free(self, key: str) -> bool:
        return any(key.startswith(prefix) and len(key) > len(prefix) for prefix in self.free)

    def check(self, key: str) -> None:
        """Raise `UserError` naming the nearest key and the choices where `key` is not known."""
        if self.known(key):
            return
        if key in self.elsewhere:
            raise UserError(f"{key} cannot be given here: {self.elsewhere[key]}")
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
        """The value of a free key: text as it stands, but an option of an algorithm is the simplest thing it is."""
        return read_value(key, raw, Any) if key.startswith("approach.") else unquoted(raw)

    def read(self, key: str, raw: Any) -> Any:
        """The value of an option from its text."""
        return read_value(key, raw, self.options[key].wanted)


@cache
def type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def field_meanings(cls: type) -> dict[str, str]:
    """Field -> the first sentence of the docstring below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # no source at hand (a frozen application): help goes without
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
    """The first sentence of a docstring, on one line, without its full stop."""
    line = " ".join(text.split())
    ends = [m.start() for m in re.finditer(r"(?<! al)(?<!e\.g)\. (?=[A-Z`])", line)]
    return (line[: ends[0]] if ends else line).rstrip(".")


def is_mapping(wanted: Any) -> bool:
    """Whether a field's type is a mapping of free keys."""
    return typing.get_origin(wanted) is not None and issubclass_of(typing.get_origin(wanted), Mapping)


def issubclass_of(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; REQUIRED where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def options_of(
    cls: type, prefix: str = "", *, words: Mapping[str, str] | None = None, skip: Sequence[str] = ()
) -> dict[str, Option]:
    """The options that fill the dataclass `cls`, nested dataclasses as dotted keys; `words` are meanings that go before
    the docstrings."""
    found: dict[str, Option] = {}
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or not field.init:
            continue
        key, wanted = prefix + field.name, hints[field.name]
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            found |= options_of(wanted, f"{key}.", words=words)
            continue
        if is_mapping(wanted):
            continue  # any key goes below it: see Form.free
        meaning = (words or {}).get(key) or field_meanings(cls).get(field.name, "")
        found[key] = Option(key, wanted, default_of(field), meaning)
    return found


def build(
    cls: type,
    node: Any,
    prefix: str = "",
    *,
    given: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> Any:
    """An instance of the dataclass `cls` from a plain config node. Config ends here.

    Args:
        node: key -> plain value; `kind` is allowed and ignored.
        prefix: of the keys in messages (`model.`).
        given: fields that are already built.
        skip: keys of the node that belong to somebody else.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={node!r} is not understood: wanted a group of options.")
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
        wanted = hints[key]
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            values[key] = build(wanted, raw, f"{prefix}{key}.")
        else:
            values[key] = read_value(prefix + key, raw, wanted)
    missing = [n for n, f in fields.items() if n not in values and default_of(f) is REQUIRED]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing: give {prefix}{missing[0]}=VALUE.")
    return cls(**values)
