"""Owns the one exception that means "the user can mend this": one line, exit status 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names the option, the value and the choices."""


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """A `UserError` for a value that is not among `choices`, with the nearest one suggested."""
    names = sorted(str(c) for c in choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"{what}={value!r} is not known.{hint} Choices: {', '.join(names) or 'none'}.")
