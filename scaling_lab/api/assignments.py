"""Keyword options of a study as the command line's assignments: `design={"budgets_flops": [1e9]}` is design.budgets_flops=[1e9].

What an option means, and which there are, is decided where the command line decides it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling_lab.api.options import plain
from scaling_lab.cli.options.arguments import Arguments, Assignment
from scaling_lab.core.errors import UserError

# Characters that mean something in a list or a group of options.
_SPECIAL = re.compile(r"[,'\"\[\](){}]|^\s|\s$|^$")


def arguments(command: str, options: Mapping[str, Any]) -> Arguments:
    """The command line of `options`, nested groups as dotted keys. Raises `UserError` for a key given twice."""
    found: dict[str, Assignment] = {}
    for key, value in options.items():
        for assignment in _assignments(key, plain(value)):
            if assignment.key in found:
                raise UserError(f"{assignment.key} is given twice: give it once.")
            found[assignment.key] = assignment
    return Arguments(command, frozenset(), tuple(found.values()))


def _assignments(key: str, value: Any) -> Iterator[Assignment]:
    """One for a plain value; of a group its choice (`kind`) and each of its options."""
    if not isinstance(value, Mapping):
        yield Assignment(key, text(value))
        return
    for name, item in value.items():
        if name == "kind":
            yield Assignment(key, text(item))
        else:
            yield from _assignments(f"{key}.{name}", item)


def text(value: Any) -> str:
    """A value as it is written on the command line, read back as the same."""
    if value is None:
        return "null"
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
