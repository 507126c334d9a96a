"""Owns claims: the right of one process to compute one run, across processes and machines, without locks.

A claim is taken by creating claim-<g>.json exclusively, g one more than the last, and kept alive by rewriting it every
couple of seconds. Whoever holds an older g sees the newer file and stops: a paused owner cannot undo a takeover.
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

# A claim of another machine without a heartbeat for this long is dead. Heartbeats come every 2 s; a stalled shared
# filesystem or a paused machine may hold them up. A dead process of this machine is seen at once, without waiting.
STALE_AFTER_S = 120.0
# What `process_start` says of a live process where the kernel gives no start time (macOS).
UNKNOWN_START = "unknown"
READ_ATTEMPTS = 5


class ClaimLost(RuntimeError):
    """Another process took the run over: this one must stop writing."""


@dataclass(frozen=True)
class ClaimInfo:
    """What a claim file says: who computes a run, and how far it is."""

    host: str
    pid: int
    pid_started: str
    """The kernel's start time of the process: tells a reused pid from the same process."""
    generation: int
    started_unix_s: float
    heartbeat_unix_s: float
    """When the file was last written, by the clock of its filesystem."""
    step: int = 0
    steps: int = 0
    tokens_per_s: float | None = None
    train_loss_nats: float | None = None
    released: bool = False
    machine: str = ""
    """Which boot and which pid namespace the pid belongs to: containers may share a host's name."""

    @property
    def is_of_this_machine(self) -> bool:
        return self.host == socket.gethostname() and self.machine == this_machine()

    def is_live(self, now_unix_s: float, stale_after_s: float = STALE_AFTER_S) -> bool:
        """Whether its owner is, as far as can be seen from here, still at work.

        `now_unix_s` must be by the clock of the claim's filesystem (see `filesystem_now`).
        """
        if self.released:
            return False
        fresh = now_unix_s - self.heartbeat_unix_s < stale_after_s
        if not self.is_of_this_machine:
            return fresh
        start = process_start(self.pid)
        # Without start times a reused pid looks like its predecessor: then the heartbeat decides.
        return fresh if start == UNKNOWN_START else start is not None and start == self.pid_started


@cache
def this_machine() -> str:
    """Names this boot and pid namespace; empty where the kernel does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Start time of a process of this machine as the kernel counts it; None where there is no such process, or only a
    dead one not yet reaped. `UNKNOWN_START` for a live process where /proc is missing."""
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
    """The right to compute one run, held by this process until released. Made by `take`; safe to use from threads."""

    def __init__(self, path: Path, info: ClaimInfo) -> None:
        self._path = path
        self._info = info
        self._lock = threading.Lock()

    @property
    def generation(self) -> int:
        return self._info.generation

    def check(self) -> None:
        """Raise `ClaimLost` if somebody took the run over."""
        newer = self._path.with_name(f"claim-{self._info.generation + 1}.json")
        if newer.exists() or not self._path.exists():
            raise ClaimLost(f"run {self._path.parent.name} was taken over by another process")

    def heartbeat(
        self,
        step: int = 0,
        steps: int = 0,
        tokens_per_s: float | None = None,
        train_loss_nats: float | None = None,
    ) -> None:
        """Say that the owner is alive and how far it is. Raises `ClaimLost`, or OSError where the disk refuses."""
        with self._lock:
            self.check()
            self._info = replace(
                self._info,
                heartbeat_unix_s=time.time(),
                step=step,
                steps=steps,
                tokens_per_s=tokens_per_s,
                train_loss_nats=train_loss_nats,
            )
            write_atomic(self._path, dumps(self._info), durable=False)

    def release(self) -> None:
        """Give the run back: anybody may claim it at once."""
        with self._lock:
            self._info = replace(self._info, released=True)
            if self._path.exists():
                write_atomic(self._path, dumps(self._info), durable=False)


def take(folder: Path, steps: int) -> Claim | None:
    """The next claim on a run folder, or None: a live process has it, or another one was quicker."""
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
        machine=this_machine(),
    )
    path = folder / f"claim-{info.generation}.json"
    return Claim(path, info) if create_exclusive(path, dumps(info)) else None


def last_claim(folder: Path) -> ClaimInfo | None:
    """The newest claim on a run folder. One whose text is torn is a dead owner's; one that cannot be read (a shared
    filesystem between two renames) counts as just refreshed."""
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
            refreshed = 0.0  # torn; or, without hard links, being written at this moment: look again
        except OSError:
            refreshed = time.time()
        time.sleep(0.02 * (attempt + 1))
    return ClaimInfo("", 0, "", newest, 0.0, refreshed)
