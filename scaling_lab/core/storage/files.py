"""Owns writing files so that a crash, a full disk or a second process never leaves half of one."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import time
from pathlib import Path
from typing import TextIO

from scaling_lab.core.errors import DiskError

# What filesystems without hard links answer (exFAT, many FUSE and SMB mounts).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


# What a disk says that cannot be written by anybody now, whatever is asked of it.
DISK_REFUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is read-only",
    errno.EIO: "the disk has an error",
}


def disk_error(error: OSError, folder: Path) -> DiskError | None:
    """The error to raise where writing below a sweep's folder failed for a reason that is not the run's; None for others."""
    why = DISK_REFUSES.get(error.errno or 0)
    below = error.filename is not None and Path(str(error.filename)).absolute().is_relative_to(
        folder.absolute()
    )
    if why is None and isinstance(error, PermissionError) and below:
        why = "permission denied"
    if why is None:
        return None
    where = f" ({error.filename})" if error.filename else ""
    results = folder.parent
    elsewhere = results.absolute() != Path("results").absolute()
    option = f" results_dir={shlex.quote(str(results))}" if elsewhere else ""
    return DiskError(
        f"{folder} cannot be written: {why}{where}. No run is lost: each goes on from its last checkpoint. Make room or "
        f"make it writable, then: scaling-lab sweep sweep={folder.name}{option}"
    )


def temporary_beside(path: Path) -> Path:
    """A name in the same folder (so that a rename is atomic) that no other process or thread uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left. A live one that loses its file sees an OSError."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text` in one step: a reader sees the old or the new file, never a part.

    Raises OSError; `path` is then as it was, and nothing is left beside it.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            write_and_sync(file, text, durable=durable)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_exclusive(path: Path, text: str) -> bool:
    """Create `path` with all of `text` unless it exists; says whether it did.

    Linked into place once complete, so that no reader sees a part. Where the filesystem has no hard links the file is
    created exclusively and then filled: a reader may see it short for a moment, and readers of ours take that as torn.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            write_and_sync(file, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # On NFS a link may succeed and its answer be lost: the repeated request then finds the name taken, by us.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            return _create_by_open(path, text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def filesystem_now(folder: Path) -> float:
    """The time (Unix seconds) by the clock that stamps this folder's files: a shared filesystem's, whatever ours says."""
    probe = temporary_beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def write_and_sync(file: TextIO, text: str, *, durable: bool = True) -> None:
    """Write to an open text file and, if durable, to the disk."""
    file.write(text)
    if durable:
        file.flush()
        os.fsync(file.fileno())


def synced_size(path: Path) -> int | None:
    """Bring a finished file's content to the disk; its size in bytes, None where there is no such file."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None


def _create_by_open(path: Path, text: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            write_and_sync(file, text)
    except FileExistsError:
        return False
    return True
