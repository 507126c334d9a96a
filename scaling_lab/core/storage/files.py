"""Atomic file writes: a crash, a full disk or a concurrent process never leaves a partial file."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import time
from pathlib import Path
from typing import TextIO

from scaling_lab.core.errors import DiskError

# Errors of `os.link` on filesystems without hard links (exFAT, many FUSE and SMB mounts).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


# Write errors that would hit any process writing to this disk.
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is read-only",
    errno.EIO: "the disk has an error",
}


def disk_error(error: OSError, folder: Path) -> DiskError | None:
    """A `DiskError` if writing below a sweep's folder failed for a reason unrelated to the run; None for other errors."""
    why = DISK_ERRORS.get(error.errno or 0)
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
        f"{folder} cannot be written: {why}{where}. No run is lost: each resumes from its last checkpoint. Free up space or "
        f"make it writable, then run: scaling-lab sweep sweep={folder.name}{option}"
    )


def temporary_path(path: Path) -> Path:
    """A unique name in the same folder, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files left by killed processes. A live process that loses its file gets an OSError."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the content of `path` by `text` atomically: a reader sees the old or the new file, never a partial one.

    Raises OSError; then `path` is unchanged and no temporary file remains.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            write_and_sync(file, text, durable=durable)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_exclusive(path: Path, text: str) -> bool:
    """Create `path` with all of `text` unless it exists; returns whether it did.

    The complete file is linked into place, so that no reader sees a partial one. On filesystems without hard links it is
    created exclusively and then written: a reader may briefly see it truncated, which our readers handle.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            write_and_sync(file, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # On NFS a link may succeed but its reply be lost: the retried request then finds our own link in place.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            return _create_by_open(path, text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def filesystem_now(folder: Path) -> float:
    """Unix time by the clock that stamps this folder's files, which on a shared filesystem may differ from ours."""
    probe = temporary_path(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def write_and_sync(file: TextIO, text: str, *, durable: bool = True) -> None:
    """Write to an open text file and, if durable, sync it to disk."""
    file.write(text)
    if durable:
        file.flush()
        os.fsync(file.fileno())


def synced_size(path: Path) -> int | None:
    """Sync a finished file to disk and return its size in bytes; None if there is no such file."""
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
