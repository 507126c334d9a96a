"""User-facing exceptions: bad input (exit status 2), a results folder that cannot be written (74), preemption (75)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names the option, the value and the choices."""


class DiskError(UserError):
    """The sweep's folder cannot be written (full, read-only). No run has failed; all can resume once it is writable.

    Exit status 74 (EX_IOERR in BSD's sysexits).
    """


class Preempted(KeyboardInterrupt):
    """The machine or its scheduler asked this process to stop (SIGTERM, SIGUSR1); unfinished runs resume later.

    Exit status 75 (EX_TEMPFAIL in BSD's sysexits), on which a scheduler may requeue the same command.
    """


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """A `UserError` for a value that is not among `choices`; suggests the closest one."""
    names = sorted(str(c) for c in choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"{what}={value!r} is not known.{hint} Choices: {', '.join(names) or 'none'}.")
