"""Owns what memory running out looks like in torch, giving back what can be given back, and the note for the next attempt.

<run folder>/micro_batch.json   {"micro_batch_sequences": n}, where a group of processes had to end to compute in smaller
                                parts: read when the run is taken up again, together with what its checkpoints say
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import torch

from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps

# Of the CPU's allocator, of CUDA and cuBLAS, of MPS, and of compiled C++.
SAYINGS = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")


NOTE = "micro_batch.json"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether smaller batches may help."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS)


def release_memory() -> None:
    """Give back what nobody holds any more, compiled programs among it."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def note_smaller_parts(run_folder: Path, micro_sequences: int) -> None:
    """The next attempt at this run computes at most so many sequences at once. Raises OSError."""
    write_atomic(run_folder / NOTE, dumps({"micro_batch_sequences": micro_sequences}))


def noted_parts(run_folder: Path) -> int | None:
    """What an attempt that ran out of memory noted; None where none did, or where the note cannot be read."""
    try:
        noted = json.loads((run_folder / NOTE).read_text(encoding="utf-8"))["micro_batch_sequences"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, int) and noted > 0 else None
