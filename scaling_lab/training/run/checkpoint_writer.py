"""The thread that writes checkpoints while training continues, and the rule for how often they are written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

# Checkpoints take at most this share of the time, from the copy to the host until the last file is on disk.
MAX_TIME_SHARE = 0.05
# Assumed until the first checkpoint is measured: hashing and writing to an ordinary disk (assumed, low).
ASSUMED_BYTES_PER_S = 300e6


class CheckpointWriter:
    """Writes the checkpoints of one program's runs one after the other, from copies that the next steps do not change.

    A save of all runs starts with `begin` and ends with the last of its writes. Leaving the context waits for them.
    """

    def __init__(self, every_s: float, state_bytes: float = 0.0) -> None:
        """`every_s`: the shortest interval, from the end of one save to the beginning of the next; 0: after each block,
        whatever it costs. `state_bytes`: what one save writes, for the first interval."""
        self._every_s = every_s
        self._cost_s = state_bytes / ASSUMED_BYTES_PER_S
        self._ended = time.monotonic()
        self._last: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._threaded = True
        try:
            self._pool.submit(int)  # starts the thread
        except RuntimeError as error:
            log.warning("no thread for checkpoints (%s): training waits for them.", error)
            self._threaded = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)

    def is_due(self) -> bool:
        """Whether the next save may begin, given what the last one cost."""
        if not self._every_s:
            return True
        if self._last is not None and not self._last.done():
            return False
        idle_s = max(self._every_s, self._cost_s * (1 / MAX_TIME_SHARE - 1))
        return time.monotonic() - self._ended >= idle_s

    def begin(self) -> None:
        """A save begins: wait for the previous one, so that the host holds one copy of the state."""
        self.wait()
        self._cost_s = 0.0

    def submit(self, copy: Callable[[], T], write: Callable[[T], None]) -> Future[None]:
        """Make the copy now, and write it in the thread; the result has the error of the writing, if any."""
        began = time.monotonic()
        copied = copy()
        copy_s = time.monotonic() - began
        if self._threaded:
            self._last = self._pool.submit(self._write, copied, write, copy_s)
        else:
            self._last = Future()
            try:
                self._write(copied, write, copy_s)
                self._last.set_result(None)
            except Exception as error:
                self._last.set_exception(error)
        return self._last

    def wait(self) -> None:
        """Until every submitted write has ended."""
        if self._last is not None:
            self._last.exception()

    def _write(self, copied: T, write: Callable[[T], None], copy_s: float) -> None:
        began = time.monotonic()
        try:
            write(copied)
        finally:
            self._ended = time.monotonic()
            self._cost_s += copy_s + self._ended - began
