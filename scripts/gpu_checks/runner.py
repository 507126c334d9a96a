"""Running one part in a child process with a time limit; its JSON file is written atomically, also while it runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling_lab.core.storage.files import write_atomic

# The script; a part is started as `gpu_check --part '{...}'`.
SCRIPT = Path(__file__).resolve().parent.parent / "gpu_check"
ROOT = SCRIPT.parent.parent
PARENT_POLL_S = 0.5
DONE, RUNNING, FAILED, TIMED_OUT, SKIPPED = "done", "running", "failed", "timed out", "skipped"


class Skipped(Exception):
    """The part cannot run here; the message says why."""


@dataclass(frozen=True)
class Part:
    """One part: a module with `run(context)`."""

    name: str
    title: str
    limit_s: dict[str, float]
    """By size: full and tiny."""
    module: str | None = None
    """None: gpu_checks.<name>."""


@dataclass
class Context:
    """What a part is given: where and what to measure, and where to write what it found."""

    name: str
    device: str
    size: str
    folder: Path
    limit_s: float
    began: float = field(default_factory=time.monotonic)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def left_s(self) -> float:
        """Seconds until the part is ended."""
        return self.limit_s - (time.monotonic() - self.began)

    def write(self, **found: Any) -> None:
        """Keep what was found so far: it is on disk if the part is ended in the next moment."""
        self.result.update(found)
        write_part(self.folder, self.name, RUNNING, result=self.result)

    def say(self, line: str) -> None:
        print(line, flush=True)


def part_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def read_part(folder: Path, name: str) -> dict[str, Any]:
    """What a part wrote; {} if it wrote nothing."""
    try:
        found: dict[str, Any] = json.loads(part_path(folder, name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def write_part(folder: Path, name: str, status: str, **fields: Any) -> dict[str, Any]:
    """Replace a part's file; returns its content. Values that JSON lacks (NaN, paths) are an error here, not in a reader."""
    content = {"part": name, "status": status, **fields}
    write_atomic(part_path(folder, name), json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def run_part(part: Part, device: str, size: str, folder: Path) -> dict[str, Any]:
    """Run a part to its end or its limit; returns what its file says. The next part may begin."""
    limit_s = part.limit_s[size]
    task = {
        "module": part.module or f"gpu_checks.{part.name}",
        "context": {"name": part.name, "device": device, "size": size, "limit_s": limit_s},
        "folder": str(folder),
    }
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_part(folder, part.name, RUNNING, result={})
    began = time.monotonic()
    log = folder / "logs" / f"{part.name}.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--part", json.dumps(task)],
            # Workers are started as modules of the package, which need not be installed.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait()
            ended, reason = TIMED_OUT, f"ended after its limit of {limit_s:.0f} s"
        except BaseException:
            kill_tree(process.pid)
            raise
        else:
            kill_tree(process.pid)  # what a failed part may have left
            ended, reason = FAILED, f"exit status {process.returncode}: see {log.relative_to(folder)}"
    found = read_part(folder, part.name)
    if found.get("status") in (DONE, SKIPPED) or (found.get("status") == FAILED and ended == FAILED):
        ended, reason = found["status"], found.get("reason")
    seconds = round(time.monotonic() - began, 1)
    result = found.get("result", {})
    return write_part(
        folder, part.name, ended, reason=reason, seconds=seconds, limit_s=limit_s, result=result
    )


def child(task: dict[str, Any]) -> int:
    """A part's process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    context = Context(folder=Path(task["folder"]), **task["context"])
    try:
        importlib.import_module(task["module"]).run(context)
    except Skipped as why:
        write_part(context.folder, context.name, SKIPPED, reason=str(why), result=context.result)
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        write_part(context.folder, context.name, FAILED, reason=reason, result=context.result)
        return 1
    else:
        write_part(context.folder, context.name, DONE, reason=None, result=context.result)
    return 0


def _end_with_parent() -> None:
    """A part must not go on, and hold the GPU, after the script was killed."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    kill_tree(os.getpid())


def kill_tree(pid: int) -> None:
    """SIGKILL a process that leads a group, its group, and on Linux its descendants in groups of their own."""
    others = descendants(pid)
    for kill, number in [(os.kill, each) for each in others] + [(os.killpg, pid)]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(number, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`; without /proc none."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
