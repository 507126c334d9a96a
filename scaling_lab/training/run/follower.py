"""The processes of a team other than the first: they execute the commands that the first process broadcasts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from scaling_lab.core.errors import EXIT_REQUEUE
from scaling_lab.training.parallel.team import Team, TeamLost
from scaling_lab.training.run.session import Program, open_in_team
from scaling_lab.training.run.stopping import ignore_signals

log = logging.getLogger(__name__)


class Follower:
    """One of those processes, with its part of the current program."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._program: Program | None = None

    def serve(self) -> int:
        """Execute commands until the first process ends; returns its exit status."""
        ignore_signals()  # the first process handles them
        while True:
            try:
                command, arguments = self._team.receive_command()
                if command == "end":
                    return int(arguments[0])
                self._execute(command, arguments)
            except TeamLost as error:
                log.warning("process %d: %s.", self._team.world.rank, error)
                return EXIT_REQUEUE

    def _execute(self, command: str, arguments: Sequence[Any]) -> None:
        """Execute one command. The processes share their errors, and the first one raises them."""
        if command == "open":
            self._program = None  # frees the previous program before the next one is built
            with suppress(Exception):
                self._program = open_in_team(self._team, *arguments)
            return
        assert self._program is not None
        with suppress(Exception):
            self._execute_in(self._program, command, arguments)

    def _execute_in(self, program: Program, command: str, arguments: Sequence[Any]) -> None:
        if command == "load":
            program.sessions[0].feed.starts(*arguments)
        elif command == "window_losses":
            slot, name = arguments
            program.sessions[slot].window_losses(self._team, name)
        else:
            getattr(program.step, command)(*arguments)
