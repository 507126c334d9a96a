"""Requests to checkpoint or stop, from signals, a launcher or another thread.

    SIGTERM, SIGINT, SIGUSR1   the run checkpoints after the current block of steps and stops; a worker exits with status 75
    an existing handler for one of these or SIGUSR2 (submitit's, which requeues the job through its launcher's `checkpoint`
        hook) is kept: the run checkpoints first, then that handler is called in the main thread
    request_checkpoint()       the run checkpoints and continues

While there is nothing to save (the data are read, the step is compiled) requests are handled at once.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scaling_lab.core.errors import Interrupted

log = logging.getLogger(__name__)

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# SIGUSR2 is submitit's signal for preemption and timeout, unless SUBMITIT_PREEMPT_SIGNAL names another; it is only forwarded.
FORWARDED_SIGNALS = (*STOP_SIGNALS, "SIGUSR2")


class Requests:
    """Pending requests to this process. The training loop handles them between two blocks of steps."""

    def __init__(self) -> None:
        self._stop, self._checkpoint = threading.Event(), threading.Event()
        self._written = threading.Condition()
        self._checkpoints = 0
        self._forwarded: list[Callable[[], Any]] = []
        self._immediate = self._by_person = False

    @property
    def stop(self) -> bool:
        """Whether to stop after the next checkpoint."""
        return self._stop.is_set()

    @property
    def checkpoint(self) -> bool:
        """Whether a checkpoint is requested."""
        return self._stop.is_set() or self._checkpoint.is_set() or bool(self._forwarded)

    @contextmanager
    def handled_at_once(self, enabled: bool = True) -> Iterator[None]:
        """For code with nothing to save: requests do not wait for it, as compiling may outlast a scheduler's grace period."""
        before, self._immediate = self._immediate, enabled
        try:
            if enabled:
                self.handle()
            yield
        finally:
            self._immediate = before

    def notify_saved(self) -> None:
        """A checkpoint is on disk: wake up the threads that wait for it."""
        self._checkpoint.clear()
        with self._written:
            self._checkpoints += 1
            self._written.notify_all()

    def handle(self) -> None:
        """To be called when everything is saved: forward the signals to their handlers, then stop if requested.

        Raises `Interrupted`, and whatever a handler raises: submitit's ends the process with SystemExit.
        """
        while self._forwarded:
            self._forwarded.pop(0)()
        if self.stop:
            raise Interrupted(self._by_person)

    def request(self, *, stop: bool = False) -> None:
        """Request a checkpoint, or a checkpoint and a stop; from any thread."""
        (self._stop if stop else self._checkpoint).set()

    def wait_for_checkpoint(self, timeout_s: float) -> bool:
        """Request a checkpoint and wait for it; returns whether it came in time. Not for the training thread."""
        with self._written:
            before = self._checkpoints
            self._checkpoint.set()
            return self._written.wait_for(lambda: self._checkpoints > before, timeout_s)

    def on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler that requests a stop."""
        repeated = self.stop and number == signal.SIGINT
        self._by_person = number == signal.SIGINT
        self._stop.set()
        if self._immediate or repeated:
            self.handle()

    def forwarding(self, owner: Callable[[int, FrameType | None], Any]) -> Callable[..., None]:
        """A signal handler that calls `owner` once a checkpoint is written."""

        def handler(number: int, frame: FrameType | None) -> None:
            log.warning("%s: its handler is called after a checkpoint.", signal.Signals(number).name)
            self._forwarded.append(lambda: owner(number, frame))
            if self._immediate:
                self.handle()

        return handler


_listening: list[Requests] = []


@contextmanager
def listen() -> Iterator[Requests]:
    """Turns signals into requests. Nested calls share one `Requests`: a worker also listens between its runs.

    Outside the main thread signals are left alone; `request_checkpoint` and `request_stop` work there too.
    """
    if _listening:
        yield _listening[-1]
        return
    requests = Requests()
    _listening.append(requests)
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before = _install(requests)
        yield requests
    finally:
        _listening.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For processes that follow another one, which alone handles signals."""
    for name in FORWARDED_SIGNALS:
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


def request_checkpoint(timeout_s: float | None = None) -> bool:
    """Request a checkpoint of the run that this process trains: for a launcher's hook, or any other thread.

    With `timeout_s`, wait until the checkpoint is on disk. Returns whether one was requested (or came in time); False if no
    run is being trained.
    """
    if not _listening:
        return False
    if timeout_s is not None:
        return _listening[-1].wait_for_checkpoint(timeout_s)
    _listening[-1].request()
    return True


def request_stop() -> bool:
    """Ask the run that this process trains to checkpoint and stop; False if none is being trained."""
    if _listening:
        _listening[-1].request(stop=True)
    return bool(_listening)


def _install(requests: Requests) -> dict[int, Any]:
    """Install our handlers; returns the previous ones by signal."""
    before: dict[int, Any] = {}
    for name in FORWARDED_SIGNALS:
        number = getattr(signal, name, None)
        if number is None:
            continue
        owner = signal.getsignal(number)
        if owner is None:  # not installed from Python, so it could not be restored
            continue
        if callable(owner) and owner is not signal.default_int_handler:
            handler: Any = requests.forwarding(owner)
        elif name in STOP_SIGNALS:
            handler = requests.on_stop_signal
        else:
            continue
        before[number] = signal.signal(number, handler)
    return before
