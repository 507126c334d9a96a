"""Out-of-memory errors: recognizing them, freeing memory, and a hint for the next attempt.

<run folder>/micro_batch.json   {"micro_batch_sequences": n}, written when a group of processes had to end in order to go on
                                with smaller micro-batches; read when the run resumes, together with its checkpoints
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps

# From the CPU allocator, CUDA and cuBLAS, MPS, and compiled C++.
OOM_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")
HINT_NAME = "micro_batch.json"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, so that smaller micro-batches may help."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OOM_MESSAGES)


def release_memory() -> None:
    """Free everything that is no longer referenced, compiled programs included."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def garbage_frozen() -> Iterator[None]:
    """For training: what exists already is left out of garbage collections, whose pauses would delay the device."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def collect_garbage(device: str) -> None:
    """Between groups of runs: on a GPU, memory of the last ones must not wait for the next automatic collection."""
    if device != "cpu":
        gc.collect()


def save_micro_batch_hint(run_folder: Path, micro_sequences: int) -> None:
    """Limit the micro-batches of the run's next attempt to so many sequences. Raises OSError."""
    write_atomic(run_folder / HINT_NAME, dumps({"micro_batch_sequences": micro_sequences}))


def load_micro_batch_hint(run_folder: Path) -> int | None:
    """The limit that an earlier attempt saved; None if there is none or it cannot be read."""
    try:
        hint = json.loads((run_folder / HINT_NAME).read_text(encoding="utf-8"))["micro_batch_sequences"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return hint if isinstance(hint, int) and hint > 0 else None
