"""`Reporter`: how long-running operations report progress to the command line, a script or a notebook."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives messages. The command line's `Console` is one."""

    def say(self, text: str) -> None:
        """Report progress."""
        ...

    def note(self, text: str) -> None:
        """Report a detail that most users do not need."""
        ...

    def warn(self, text: str) -> None:
        """Report a problem that does not stop the operation."""
        ...
