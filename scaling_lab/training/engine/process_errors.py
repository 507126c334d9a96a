"""Errors after which a process cannot go on but its runs can, in a fresh one; and how often that happened to a run.

<run folder>/process-errors-<rank>.json   the messages, one for each time; read when the run is continued
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import torch

from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.training.engine.memory import is_out_of_memory

# Of CUDA, ROCm and their libraries, where torch raises a plain RuntimeError.
DEVICE_MESSAGES = (
    *("cuda error", "hip error", "cuda driver error", "device-side assert", "illegal memory access"),
    *("unspecified launch failure", "uncorrectable ecc", "misaligned address", "status_execution_failed"),
)
# How often a run is continued in a fresh process; the next time it fails.
MAX_PROCESS_RETRIES = 1
MAX_MESSAGE = 300


class RepeatedProcessError(Exception):
    """The processes of a run ended by such an error more often than it is retried."""


def is_device_error(error: BaseException) -> bool:
    """Whether the accelerator reported an error: afterwards every operation on it fails in this process. Not when memory ran
    out."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, getattr(torch, "AcceleratorError", ())):  # older versions of torch lack it
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in DEVICE_MESSAGES)


def note_process_error(run_folder: Path, error: BaseException, rank: int = 0) -> None:
    """Add an error of the process `rank` to those of a run. A failed write is ignored: the process has to end."""
    path = run_folder / f"process-errors-{rank}.json"
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]
    with suppress(OSError):
        write_atomic(path, dumps([*_messages(path), text]))


def process_errors(run_folder: Path) -> list[str]:
    """The messages of the process that had the most."""
    return max(map(_messages, sorted(run_folder.glob("process-errors-*.json"))), key=len, default=[])


def process_retries(run_folder: Path) -> int:
    """How often a run was continued in a fresh process after such an error."""
    return min(len(process_errors(run_folder)), MAX_PROCESS_RETRIES)


def refuse_repeated_errors(run_folder: Path) -> None:
    """Raise `RepeatedProcessError` if the run was retried often enough."""
    errors = process_errors(run_folder)
    if len(errors) > MAX_PROCESS_RETRIES:
        raise RepeatedProcessError(f"its process ended {len(errors)} times; most recently: {errors[-1]}")


def _messages(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(text) for text in found] if isinstance(found, list) else []
