"""`scaling-lab worker FOLDER`: train the pending runs of a sweep in this process."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.compose import read_command
from scaling_lab.cli.options.forms import Form, build, options_of
from scaling_lab.core.errors import Interrupted, UserError
from scaling_lab.core.installation import require


@dataclass(frozen=True)
class WorkerCommand:
    """Options of `worker`."""

    folder: str
    """The sweep's folder, with its plan.json"""
    run_ids: tuple[str, ...] | None = None
    """Train only these runs"""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """Under torchrun or srun: how the processes share each run"""
    tracker: str | None = None
    """Where else to report runs, as JSON: {"kind": "wandb", "project": "P"}"""


def form(arguments: Arguments) -> Form:
    return Form(options_of(WorkerCommand))


def run(arguments: Arguments) -> int:
    """Under torchrun every process comes here: the first leads, the others follow."""
    command = read_command(arguments, None, lambda tree: form(arguments))
    given: WorkerCommand = build(WorkerCommand, command.tree)
    tracker = None if given.tracker is None else _tracker(given.tracker)
    require("torch", "training")
    from scaling_lab.launching.worker import WorkerOptions, run_worker

    level = logging.WARNING if "quiet" in arguments.flags else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        return run_worker(
            WorkerOptions(Path(given.folder).expanduser(), given.run_ids, tracker, given.parallel)
        )
    except Interrupted as stop:
        raise stop.with_hint("unfinished runs have a checkpoint; the same command resumes them.") from None


def _tracker(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f'tracker={text!r} is not a JSON object such as {{"kind": "wandb"}}.')
    return options
