"""Owns the exceptions that are no bugs: bad input (one line, exit status 2), and being told to go (exit status 75)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names the option, the value and the choices."""


class DiskError(UserError):
    """The sweep's folder cannot be written (full, read-only): nobody's run failed, and all go on once it can. Exit status 74
    (the BSD sysexits' EX_IOERR)."""


class Preempted(KeyboardInterrupt):
    """The machine or its scheduler wants this process gone (SIGTERM, SIGUSR1); what is not over goes on another time.

    Exit status 75, at which a scheduler may start the same command again (the BSD sysexits' EX_TEMPFAIL).
    """


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """A `UserError` for a value that is not among `choices`, with the nearest one suggested."""
    names = sorted(str(c) for c in choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"{what}={value!r} is not known.{hint} Choices: {', '.join(names) or 'none'}.")
