"""Files of a sharded checkpoint: each process writes its own shards (torch.distributed.checkpoint), and any run reads them.

step-<n>.dcp/__<rank>_0.distcp, .metadata    counts only once step-<n>.json names its files, with their checksums
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

Named = Sequence[tuple[str, Sequence[int]]]
"""Names and sizes of a model's parameters, in the order of its flat vector."""


def write_shards(folder: Path, state: Mapping[str, Any], group: Any) -> dict[str, str]:
    """In all processes of `group` at once: write the shards of `state`. Returns the names of all files with their SHA-256, in
    the first process; empty in the others. Raises OSError if a file cannot be written, in all processes."""
    rank = dist.get_rank(group)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
    dist.barrier(group)
    with ordinary_errors():
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    own = sha256_of(folder, [path.name for path in folder.glob(f"__{rank}_*")])
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(own, gathered if rank == 0 else None, 0, group)
    if rank:
        return {}
    files = sha256_of(folder, [".metadata"])
    for each in gathered:
        files |= each
    return files


def sha256_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Checksums of files of a folder by name. Raises OSError."""
    found = {}
    for name in sorted(names):
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def load_shards(folder: Path, state: Mapping[str, Any], group: Any) -> None:
    """In all processes of `group` at once: load into the tensors of `state`, in place, each process its own shards."""
    with ordinary_errors():
        dcp.load(dict(state), storage_reader=dcp.FileSystemReader(folder), process_group=group)


def read_whole(folder: Path, kinds: Sequence[str], parameters: Named) -> dict[str, Tensor]:
    """The flat vector of each kind (`flat`, the moments), read by this process alone."""
    state = {f"{kind}.{name}": torch.empty(tuple(size)) for kind in kinds for name, size in parameters}
    alone = {"no_dist": True} if dist.is_initialized() else {}
    with ordinary_errors():
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), **alone)
    return {kind: torch.cat([state[f"{kind}.{name}"].flatten() for name, _ in parameters]) for kind in kinds}


@contextmanager
def ordinary_errors() -> Iterator[None]:
    """torch's CheckpointException, which is no Exception, as OSError if all its causes are, else as RuntimeError."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        kind = OSError if causes and all(isinstance(cause, OSError) for cause in causes) else RuntimeError
        raise kind(f"{causes[0] if causes else error}") from error
