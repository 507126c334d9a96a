"""Checkpoints: atomic, checksummed, without pickle. On a CPU a resumed run continues bit for bit.

    <run folder>/checkpoint/step-<n>.pt     tensors: parameters and both moments, flat (torch.save, read with weights_only)
                            step-<n>.json   written after it: its sha256, the step, the length of the curve so far
                            kept-<n>.pt, .json  the same, for other runs to continue from (spec.keep_steps); deleted when
                                                these are completed, unless keep=resume
                            step-<n>.dcp/, .json of a sharded run: files that each process writes, named by the .json

A checkpoint without its .json does not count. The last two are kept; if one is damaged, the one before it is used, with a
warning. The data order is a pure function of the step, so there is no other state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from scaling_lab.core.spec import Execution
from scaling_lab.core.storage.files import remove_temporary_files, temporary_path, write_atomic
from scaling_lab.core.storage.serialization import dumps, to_dict

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEPT = 2
# The flat vectors of a checkpoint.
STATE = ("flat", "first_moment", "second_moment")
# Fields of `Checkpoint` that are not in its .json.
NOT_DESCRIBED = ("tensors", "saving", "shards", "parameters")


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps."""

    run_id: str
    step: int
    curve_points: int
    """Number of lines of curve.jsonl up to this step."""
    block_losses_nats: tuple[float, ...]
    """Training losses since the last line of the curve (for runs that record block means)."""
    wall_time_s: float
    execution: Execution
    data_fingerprint: str
    tensors: dict[str, Tensor] = field(repr=False)
    divergence: dict[str, Any] | None = None
    """State of the divergence detector; None in checkpoints of older versions."""
    saving: Future[dict[str, str]] | None = field(default=None, repr=False)
    """Of a sharded run that is being saved: the checksums of the files that all processes write."""
    shards: Path | None = None
    """The folder of a sharded checkpoint; `tensors` is empty then."""
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), repr=False)
    """Names and sizes of a sharded checkpoint's parameters."""

    def whole(self) -> dict[str, Tensor]:
        """The flat vectors, read from the shards if need be."""
        if self.shards is None:
            return self.tensors
        from scaling_lab.training.parallel.shards import read_whole  # torch.distributed takes time to import

        return read_whole(self.shards, STATE, self.parameters)


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, keep: int = KEPT, check: Callable[[], None] | None = None
) -> None:
    """Write durably, then delete all but the last `keep`. Raises OSError (a full disk, say) without deleting any."""
    write_checkpoint(folder / f"step-{checkpoint.step}.pt", checkpoint, check)
    for step in steps_saved(folder)[:-keep]:
        # The .json first: a .pt alone is not a checkpoint, but a .json alone would look like a damaged one.
        (folder / f"step-{step}.json").unlink(missing_ok=True)
        (folder / f"step-{step}.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / f"step-{step}.dcp", ignore_errors=True)


def shards_of(path: Path) -> Path:
    """The folder that holds the tensors of a sharded run in place of `path`."""
    return path.with_suffix(".dcp")


def kept_path(folder: Path, step: int) -> Path:
    """The tensors of a kept checkpoint, which exists once the .json with the same name does."""
    return folder / f"kept-{step}.pt"


class HashedFile:
    """A binary file that computes the SHA-256 of what is written to it, so that no second copy of the data is needed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None
        """The error of a write, which torch replaces by a RuntimeError about positions."""

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(path: Path, checkpoint: Checkpoint, check: Callable[[], None] | None = None) -> None:
    """Write `path`, then the .json that makes it a checkpoint. Raises OSError; existing checkpoints are not affected.

    `check` is called before each file appears under its name: it raises `ClaimLost` if another process has the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    checksums = (
        write_tensors(path, checkpoint, check) if checkpoint.saving is None else shards_written(checkpoint)
    )
    if check is not None:
        check()
    write_atomic(path.with_suffix(".json"), dumps(described(checkpoint) | checksums))


def shards_written(checkpoint: Checkpoint) -> dict[str, Any]:
    """Wait until all processes have written their shards; returns what the .json says of them. Raises OSError."""
    assert checkpoint.saving is not None
    return {"files": checkpoint.saving.result(), "parameters": [list(each) for each in checkpoint.parameters]}


def write_tensors(path: Path, checkpoint: Checkpoint, check: Callable[[], None] | None) -> dict[str, Any]:
    """Write `path`; returns what the .json says of it."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            hashed = HashedFile(file)
            try:
                torch.save(dict(checkpoint.tensors), cast(IO[bytes], hashed))
            except RuntimeError as error:
                raise hashed.error or error from None
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"sha256": hashed.sha256.hexdigest()}


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the .json says of a checkpoint, except for its checksums."""
    meta = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name not in NOT_DESCRIBED}
    return meta | {"execution": to_dict(checkpoint.execution), "format_version": FORMAT_VERSION}


def remove_checkpoints(folder: Path, pattern: str = "step-*") -> None:
    """Delete the checkpoints from which a run would resume, or those kept for other runs (kept-*)."""
    for path in sorted(folder.glob(pattern), key=lambda path: path.suffix != ".json"):  # the .json first
        remove(path)
    with suppress(OSError):  # it holds others, or does not exist
        folder.rmdir()


def clean(folder: Path) -> None:
    """Delete what a killed process left behind: temporary files, and tensors whose .json was never written."""
    if not folder.is_dir():
        return
    remove_temporary_files(folder)
    complete = {f"step-{step}" for step in steps_saved(folder)}
    for path in folder.glob("step-*"):
        if path.stem not in complete:
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or folder of a checkpoint, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def steps_saved(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending, including damaged ones."""
    found = (re.fullmatch(r"step-(\d+)\.json", path.name) for path in folder.glob("step-*.json"))
    return sorted(int(match[1]) for match in found if match)


def load_latest(folder: Path, run_id: str, execution: Execution, fingerprint: str) -> Checkpoint | None:
    """The newest intact checkpoint of this run, execution and data, on the CPU; None if there is none."""
    for step in reversed(steps_saved(folder)):
        path = folder / f"step-{step}.pt"
        try:
            return read_checkpoint(path, run_id, execution, fingerprint, whole=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("checkpoint %s is skipped (%s); trying the one before it.", path, error)
    return None


def read_checkpoint(
    path: Path,
    run_id: str,
    execution: Execution | None = None,
    fingerprint: str | None = None,
    *,
    whole: bool = True,
) -> Checkpoint:
    """Read one checkpoint, of whichever kind of run. Raises ValueError or OSError with the reason if it cannot be used.

    Without `whole`, the tensors of a sharded checkpoint stay in its files, for each process to read its own.
    """
    meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format version is {meta['format_version']}, expected {FORMAT_VERSION}")
    shards = shards_of(path) if "files" in meta else None
    files = meta.get("files") or {path.name: meta["sha256"]}
    if {name: sha256_of(path.parent if shards is None else shards, name) for name in files} != files:
        raise ValueError("its checksum is wrong")
    if meta["run_id"] != run_id:
        raise ValueError(f"it belongs to run {meta['run_id']}")
    written_under = Execution(**meta["execution"])
    if execution is not None and not written_under.continues(execution):
        raise ValueError(f"it was computed with {written_under}, the plan says {execution}")
    if fingerprint is not None and meta["data_fingerprint"] != fingerprint:
        raise ValueError(f"it was trained on different data, content {meta['data_fingerprint'][:12]}")
    found = Checkpoint(
        run_id=run_id,
        step=meta["step"],
        curve_points=meta["curve_points"],
        block_losses_nats=tuple(meta["block_losses_nats"]),
        wall_time_s=meta["wall_time_s"],
        execution=written_under,
        data_fingerprint=meta["data_fingerprint"],
        tensors={} if shards else torch.load(path, map_location="cpu", weights_only=True),
        divergence=meta.get("divergence"),
        shards=shards,
        parameters=tuple((name, tuple(size)) for name, size in meta.get("parameters", ())),
    )
    return replace(found, tensors=found.whole()) if whole else found


def sha256_of(folder: Path, name: str) -> str:
    """The checksum of a file. Raises OSError."""
    with open(folder / name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
