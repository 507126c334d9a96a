"""User-facing exceptions: bad input (exit status 2), a results folder that cannot be written (74), preemption (75)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit status of a process that was asked to stop and can resume later (EX_TEMPFAIL in BSD's sysexits): schedulers requeue it.
EXIT_REQUEUE = 75

STRICT_VARIABLE = "SCALING_LAB_STRICT"
"""Environment variable that lets the error of one figure or study through: tests set it, so that no bug stays unseen."""


class UserError(ValueError):
    """Bad input. The message is one line that names the option, the value and the choices."""


class MissingCorpus(UserError):
    """The files of a corpus are not there (yet)."""


class DiskError(UserError):
    """The sweep's folder cannot be written (full, read-only). No run has failed; all can resume once it is writable.

    Exit status 74 (EX_IOERR in BSD's sysexits).
    """


class Preempted(KeyboardInterrupt):
    """The machine or its scheduler asked this process to stop (SIGTERM, SIGUSR1); unfinished runs resume later.

    Exit status `EXIT_REQUEUE`, on which a scheduler may requeue the same command.
    """


class Interrupted(KeyboardInterrupt):
    """This process was asked to stop; its run resumes later. Not an `Exception`, so that no library swallows it."""

    def __init__(self, by_person: bool = False) -> None:
        super().__init__("asked to stop")
        self.by_person = by_person

    def with_hint(self, hint: str) -> KeyboardInterrupt:
        """The exception that ends the command: Ctrl-C and preemption have different exit statuses."""
        return KeyboardInterrupt(hint) if self.by_person else Preempted(hint)


class DeviceLost(Interrupted):
    """The accelerator reported an error, after which this process cannot use it: it ends, and its runs go on in another."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.args = (reason,)


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """A `UserError` for a value that is not among `choices`; suggests the closest one."""
    names = sorted(str(c) for c in choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"{what}={value!r} is not known.{hint} Choices: {', '.join(names) or 'none'}.")
