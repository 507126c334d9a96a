"""Reader for W&B run files (`run-ID.wandb`), as written by offline runs; needs neither a server nor wandb's client.

A file is a 7-byte header (":W&B", magic, version) followed by LevelDB log blocks of 32 KiB. Each block contains fragments:
crc32 (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last) and payload; up to 6 bytes at the end of a block
are padding. The joined payloads are protobuf records in wandb's schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.tracking.wandb.mapping import ExternalRun

HEADER = b":W&B"
HEADER_BYTES, BLOCK_BYTES, FRAGMENT_BYTES = 7, 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class RunFile:
    """Content of one run file."""

    path: Path
    run_id: str = ""
    project: str = ""
    entity: str = ""
    group: str | None = None
    job_type: str | None = None
    display_name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    """None if the run did not end or its file is truncated."""

    @property
    def state(self) -> str:
        return "crashed" if self.exit_code is None else "finished" if self.exit_code == 0 else "failed"


def find_run_files(folder: Path) -> list[Path]:
    """All run files below `folder` (or the file itself), oldest run first. Raises `UserError` if there is none."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"path={folder}: there is no such folder.")
    # latest-run is a symlink to one of them.
    found = {path.resolve(): path for path in sorted(folder.rglob("*.wandb"), reverse=True)}
    if not found:
        raise UserError(f"path={folder}: there is no W&B run file (run-ID.wandb) in it or its subfolders.")
    return sorted(found.values(), key=lambda path: path.parent.name.removeprefix("offline-"))


def read_run_file(path: Path) -> RunFile:
    """Read a run file, up to where it is truncated. Raises `UserError` if it is not a run file."""
    run = RunFile(path)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project, run.entity = record.run.run_id, record.run.project, record.run.entity
            run.group, run.job_type = record.run.run_group or None, record.run.job_type or None
            run.display_name, run.tags = record.run.display_name, list(record.run.tags)
            _update(run.config, record.run.config)
            _update(run.summary, record.run.summary)
        elif kind == "config":
            _update(run.config, record.config)
        elif kind == "summary":
            _update(run.summary, record.summary)
        elif kind == "history":
            row = {".".join(item.nested_key) or item.key: _value(item) for item in record.history.item}
            row.setdefault("_step", int(record.history.step.num))
            run.history.append(row)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    run.config.pop("_wandb", None)
    return run


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a file, up to where it is truncated or damaged."""
    from google.protobuf.message import DecodeError

    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    data = path.read_bytes()
    if data[: len(HEADER)] != HEADER:
        raise UserError(f"{path} is not a W&B run file: it does not start with {HEADER.decode()!r}.")
    for payload in payloads(data):
        try:
            yield messages.Record.FromString(payload)
        except DecodeError:
            return


def payloads(data: bytes) -> Iterator[bytes]:
    """The joined fragments of a log, up to the first incomplete fragment."""
    at, parts = HEADER_BYTES, b""
    while at + FRAGMENT_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < FRAGMENT_BYTES:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        payload = data[at + FRAGMENT_BYTES : at + FRAGMENT_BYTES + length]
        if len(payload) < length or kind not in (WHOLE, FIRST, MIDDLE, LAST):
            return
        parts = payload if kind in (WHOLE, FIRST) else parts + payload
        if kind in (WHOLE, LAST):
            yield parts
        at += FRAGMENT_BYTES + length


def merge_attempts(attempts: list[RunFile]) -> ExternalRun:
    """One run from the files of its attempts, oldest first; later attempts override earlier ones at the same step."""
    last = attempts[-1]
    rows: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for attempt in attempts:
        config |= attempt.config
        summary |= attempt.summary
        for row in attempt.history:
            rows[row["_step"]] = rows.get(row["_step"], {}) | row
    history = [rows[step] for step in sorted(rows)]
    counts: dict[str, int] = {}
    for row in history:
        for key in row:
            counts[key] = counts.get(key, 0) + 1
    return ExternalRun(
        run_id=last.run_id,
        name=last.display_name or last.run_id,
        config=config,
        summary=summary,
        history_keys=counts,
        read_history=lambda keys: [row for row in history if all(key in row for key in keys)],
        group=last.group,
        job_type=last.job_type,
        state=last.state,
        tags=last.tags,
    )


def _update(tree: dict[str, Any], record: Any) -> None:
    for item in record.update:
        _place(tree, list(item.nested_key) or [item.key], _decoded(item.value_json))
    for item in record.remove:
        tree.pop(item.key, None)


def _place(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            below = tree[key] = {}
        tree = below
    old = tree.get(keys[-1])
    tree[keys[-1]] = old | value if isinstance(old, dict) and isinstance(value, dict) else value


def _value(item: Any) -> Any:
    """A history item, in either of wandb's encodings."""
    if item.value_json:
        return _decoded(item.value_json)
    for name in ("boolean", "integer", "number", "text", "json"):
        if name in item.DESCRIPTOR.fields_by_name and item.HasField(name):
            return _decoded(item.json) if name == "json" else getattr(item, name)
    return None


def _decoded(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
