"""Claims: lock-free mutual exclusion between processes and machines, one owner per run.

A process acquires a claim by exclusively creating claim-<g>.json, with g one more than the last, and keeps it alive by
rewriting it every few seconds. The holder of an older g sees the newer file and stops, so a paused owner cannot undo a
takeover.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

from scaling_lab.core.storage.files import create_exclusive, filesystem_now, write_atomic
from scaling_lab.core.storage.serialization import dumps

# A claim from another machine without a heartbeat for this long is dead. Heartbeats come every 2 s, but a stalled shared
# filesystem or a suspended machine may delay them. A dead process on this machine is detected immediately.
STALE_AFTER_S = 120.0
# Returned by `process_start` for a live process if the kernel reports no start time (macOS).
UNKNOWN_START = "unknown"
READ_ATTEMPTS = 5


class ClaimLost(RuntimeError):
    """Another process took over the run: this one must stop writing."""


@dataclass(frozen=True)
class ClaimInfo:
    """Content of a claim file: who computes a run, and its progress."""

    host: str
    pid: int
    pid_started: str
    """The kernel's start time of the process: distinguishes it from a later process with the same pid."""
    generation: int
    started_unix_s: float
    heartbeat_unix_s: float
    """When the file was last written, by the clock of its filesystem."""
    step: int = 0
    steps: int = 0
    tokens_per_s: float | None = None
    train_loss_nats: float | None = None
    released: bool = False
    mfu: float | None = None
    """Model FLOPs utilization of the run's device, of its whole stack; None where the device's peak is not known."""
    machine: str = ""
    """The boot and pid namespace that the pid belongs to: containers may share a host name."""

    @property
    def is_local(self) -> bool:
        return self.host == socket.gethostname() and self.machine == machine_id()

    def is_live(self, now_unix_s: float, stale_after_s: float = STALE_AFTER_S) -> bool:
        """Whether the owner is still running, as far as this machine can tell.

        `now_unix_s` must come from the clock of the claim's filesystem (see `filesystem_now`).
        """
        if self.released:
            return False
        fresh = now_unix_s - self.heartbeat_unix_s < stale_after_s
        if not self.is_local:
            return fresh
        start = process_start(self.pid)
        # Without start times a reused pid cannot be told apart: then the heartbeat decides.
        return fresh if start == UNKNOWN_START else start is not None and start == self.pid_started


@cache
def machine_id() -> str:
    """Identifies this boot and pid namespace; empty if the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Start time of a local process in the kernel's units; None if there is no such process or only a zombie.
    `UNKNOWN_START` for a live process if /proc is missing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return UNKNOWN_START
    status = stat.rpartition(")")[2].split()
    return None if status[0] in "ZX" else status[19]


class Claim:
    """The exclusive right to compute one run, held by this process until released. Made by `acquire`; thread-safe."""

    def __init__(self, path: Path, info: ClaimInfo) -> None:
        self._path = path
        self._info = info
        self._lock = threading.Lock()

    @property
    def generation(self) -> int:
        return self._info.generation

    def check(self) -> None:
        """Raise `ClaimLost` if another process took over the run."""
        newer = self._path.with_name(f"claim-{self._info.generation + 1}.json")
        if newer.exists() or not self._path.exists():
            raise ClaimLost(f"run {self._path.parent.name} was taken over by another process")

    def heartbeat(
        self,
        step: int = 0,
        steps: int = 0,
        tokens_per_s: float | None = None,
        train_loss_nats: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Record that the owner is alive, and its progress. Raises `ClaimLost`, or OSError if the write fails."""
        with self._lock:
            self.check()
            self._info = replace(
                self._info,
                heartbeat_unix_s=time.time(),
                step=step,
                steps=steps,
                tokens_per_s=tokens_per_s,
                train_loss_nats=train_loss_nats,
                mfu=mfu,
            )
            write_atomic(self._path, dumps(self._info), durable=False)

    def release(self) -> None:
        """Give up the run: any process may claim it immediately."""
        with self._lock:
            self._info = replace(self._info, released=True)
            if self._path.exists():
                write_atomic(self._path, dumps(self._info), durable=False)


def acquire(folder: Path, steps: int) -> Claim | None:
    """The next claim on a run folder; None if a live process holds it or another process was faster."""
    last = last_claim(folder)
    if last is not None and last.is_live(filesystem_now(folder)):
        return None
    now = time.time()
    info = ClaimInfo(
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_started=process_start(os.getpid()) or UNKNOWN_START,
        generation=1 if last is None else last.generation + 1,
        started_unix_s=now,
        heartbeat_unix_s=now,
        steps=steps,
        machine=machine_id(),
    )
    path = folder / f"claim-{info.generation}.json"
    return Claim(path, info) if create_exclusive(path, dumps(info)) else None


def last_claim(folder: Path) -> ClaimInfo | None:
    """The newest claim on a run folder. A claim with truncated content counts as dead; one that cannot be read (on a shared
    filesystem, in the middle of a rename) counts as just refreshed."""
    names = (re.fullmatch(r"claim-(\d+)\.json", path.name) for path in folder.glob("claim-*.json"))
    newest = max((int(match[1]) for match in names if match), default=0)
    if not newest:
        return None
    path = folder / f"claim-{newest}.json"
    refreshed = 0.0
    for attempt in range(READ_ATTEMPTS):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            written = path.stat().st_mtime
            known = {field.name for field in fields(ClaimInfo)}
            return ClaimInfo(**{**{k: v for k, v in data.items() if k in known}, "heartbeat_unix_s": written})
        except (ValueError, TypeError, AttributeError):
            refreshed = 0.0  # truncated; or, without hard links, still being written: try again
        except OSError:
            refreshed = time.time()
        time.sleep(0.02 * (attempt + 1))
    return ClaimInfo("", 0, "", newest, 0.0, refreshed)
