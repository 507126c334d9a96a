"""Checkpoints: atomic, checksummed, without pickle. On a CPU a resumed run continues bit for bit.

    <run folder>/checkpoint/step-<n>.pt     tensors: parameters and both moments, flat (torch.save, read with weights_only)
                            step-<n>.json   written after it: its sha256, the step, the length of the curve so far
                            kept-<n>.pt, .json  the same, for other runs to continue from (spec.keep_steps); never deleted

A checkpoint without its .json does not count. The last two are kept; if one is damaged, the one before it is used, with a
warning. The data order is a pure function of the step, so there is no other state.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaling_lab.core.spec import Execution
from scaling_lab.core.storage.files import remove_temporary_files, temporary_path, write_atomic
from scaling_lab.core.storage.serialization import dumps, to_dict

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEPT = 2


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


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = KEPT) -> None:
    """Write durably, then delete all but the last `keep`. Raises OSError (a full disk, say) without deleting any."""
    write_checkpoint(folder / f"step-{checkpoint.step}.pt", checkpoint)
    for step in steps_saved(folder)[:-keep]:
        # The .json first: a .pt alone is not a checkpoint, but a .json alone would look like a damaged one.
        (folder / f"step-{step}.json").unlink(missing_ok=True)
        (folder / f"step-{step}.pt").unlink(missing_ok=True)


def kept_path(folder: Path, step: int) -> Path:
    """The tensors of a kept checkpoint, which exists once the .json with the same name does."""
    return folder / f"kept-{step}.pt"


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `path`, then the .json that makes it a checkpoint. Raises OSError; existing checkpoints are not affected."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in checkpoint.tensors.items()}, buffer)
    data = buffer.getvalue()
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    meta = {k: v for k, v in asdict(checkpoint).items() if k not in ("tensors", "execution")}
    meta |= {
        "execution": to_dict(checkpoint.execution),
        "sha256": hashlib.sha256(data).hexdigest(),
        "format_version": FORMAT_VERSION,
    }
    write_atomic(path.with_suffix(".json"), dumps(meta))


def clean(folder: Path) -> None:
    """Delete what a killed process left behind: temporary files, and tensors whose .json was never written."""
    if not folder.is_dir():
        return
    remove_temporary_files(folder)
    complete = {f"step-{step}.pt" for step in steps_saved(folder)}
    for path in folder.glob("step-*.pt"):
        if path.name not in complete:
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
            return read_checkpoint(path, run_id, execution, fingerprint)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("checkpoint %s is skipped (%s); trying the one before it.", path, error)
    return None


def read_checkpoint(
    path: Path, run_id: str, execution: Execution | None = None, fingerprint: str | None = None
) -> Checkpoint:
    """Read one checkpoint. Raises ValueError or OSError with the reason if it cannot be used."""
    meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    data = path.read_bytes()
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format version is {meta['format_version']}, expected {FORMAT_VERSION}")
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise ValueError("its checksum is wrong")
    if meta["run_id"] != run_id:
        raise ValueError(f"it belongs to run {meta['run_id']}")
    written_under = Execution(**meta["execution"])
    if execution is not None and not written_under.continues(execution):
        raise ValueError(f"it was computed with {written_under}, the plan says {execution}")
    if fingerprint is not None and meta["data_fingerprint"] != fingerprint:
        raise ValueError(f"it was trained on different data, content {meta['data_fingerprint'][:12]}")
    return Checkpoint(
        run_id=run_id,
        step=meta["step"],
        curve_points=meta["curve_points"],
        block_losses_nats=tuple(meta["block_losses_nats"]),
        wall_time_s=meta["wall_time_s"],
        execution=written_under,
        data_fingerprint=meta["data_fingerprint"],
        tensors=torch.load(io.BytesIO(data), map_location="cpu", weights_only=True),
        divergence=meta.get("divergence"),
    )
