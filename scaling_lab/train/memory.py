"""Owns what memory running out looks like in torch, and giving back what can be given back."""

from __future__ import annotations

import gc

import torch

# Of the CPU's allocator, of CUDA and cuBLAS, of MPS, and of compiled C++.
SAYINGS = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed", "bad_alloc")


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
