"""Owns how a process that trains is told to checkpoint or to stop: by signals, by a launcher, by another thread.

    SIGTERM, SIGINT, SIGUSR1   the run checkpoints after the block of steps in progress and stops; a worker exits with 75
    a handler of somebody else's for one of these or SIGUSR2 (submitit's, which requeues the job through its launcher's
        `checkpoint` hook) is kept: the run checkpoints first, then that handler is called, in the main thread
    request_checkpoint()       the run checkpoints and goes on

While there is nothing to save (data are read, the step is compiled) the answer does not wait.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scaling_lab.core.errors import Preempted

log = logging.getLogger(__name__)

# Exit status of a worker that was told to stop and can go on later (the BSD sysexits' EX_TEMPFAIL, used for requeueing).
EXIT_REQUEUE = 75
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# submitit's signal of preemption and timeout, unless SUBMITIT_PREEMPT_SIGNAL names another: only ever handed on.
HANDED_ON_SIGNALS = (*STOP_SIGNALS, "SIGUSR2")


class Interrupted(KeyboardInterrupt):
    """The process was told to stop: the run goes on another time. No `Exception`, so that no library swallows it."""

    def __init__(self, by_person: bool = False) -> None:
        super().__init__("told to stop")
        self.by_person = by_person

    def saying(self, hint: str) -> KeyboardInterrupt:
        """What a command ends with: Ctrl-C and preemption have their own exit statuses."""
        return KeyboardInterrupt(hint) if self.by_person else Preempted(hint)


class Requests:
    """What this process was asked for. The training loop looks between two blocks of steps and answers."""

    def __init__(self) -> None:
        self._stop, self._checkpoint = threading.Event(), threading.Event()
        self._written = threading.Condition()
        self._checkpoints = 0
        self._handed_on: list[Callable[[], Any]] = []
        self._at_once = self._by_person = False

    @property
    def stop(self) -> bool:
        """Whether to stop after the next checkpoint."""
        return self._stop.is_set()

    def __call__(self) -> bool:
        """Whether a checkpoint is asked for."""
        return self._stop.is_set() or self._checkpoint.is_set() or bool(self._handed_on)

    @contextmanager
    def nothing_to_save(self, so: bool = True) -> Iterator[None]:
        """Within it (if `so`) a request is answered when it comes: compiling may take longer than the time of grace."""
        before, self._at_once = self._at_once, so
        try:
            if so:
                self.answer()
            yield
        finally:
            self._at_once = before

    def saved(self) -> None:
        """A checkpoint is on the disk: tells those who wait for one."""
        self._checkpoint.clear()
        with self._written:
            self._checkpoints += 1
            self._written.notify_all()

    def answer(self) -> None:
        """Whatever could be saved is saved: hand the signals on to their owners, then stop if told to.

        Raises `Interrupted`, and what an owner raises: submitit's handler ends the process by SystemExit.
        """
        while self._handed_on:
            self._handed_on.pop(0)()
        if self.stop:
            raise Interrupted(self._by_person)

    def ask(self, *, stop: bool = False) -> None:
        """Ask for a checkpoint, or for one and a stop; from any thread."""
        (self._stop if stop else self._checkpoint).set()

    def wait_for_checkpoint(self, timeout_s: float) -> bool:
        """Ask for a checkpoint and wait for it; says whether it came in time. Not from the training thread."""
        with self._written:
            before = self._checkpoints
            self._checkpoint.set()
            return self._written.wait_for(lambda: self._checkpoints > before, timeout_s)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handler of a signal that means: stop."""
        again = self.stop and number == signal.SIGINT
        self._by_person = number == signal.SIGINT
        self._stop.set()
        if self._at_once or again:
            self.answer()

    def handing_on(self, owner: Callable[[int, FrameType | None], Any]) -> Callable[..., None]:
        """A handler that passes the signal to `owner` once a checkpoint is written."""

        def handler(number: int, frame: FrameType | None) -> None:
            log.warning("%s: a checkpoint first, then its handler.", signal.Signals(number).name)
            self._handed_on.append(lambda: owner(number, frame))
            if self._at_once:
                self.answer()

        return handler


_listening: list[Requests] = []


@contextmanager
def listen() -> Iterator[Requests]:
    """Within it signals become requests. Inside another `listen` it is the same one: a worker listens between runs too.

    In another thread than the main one signals stay whose they are; `request_checkpoint` and `request_stop` reach it.
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


def request_checkpoint(timeout_s: float | None = None) -> bool:
    """Ask the run that this process trains for a checkpoint: for a launcher's hook, or any other thread.

    With `timeout_s` it waits until the checkpoint is on the disk. Returns whether one was asked for (or came in time):
    False where no run is being trained.
    """
    if not _listening:
        return False
    if timeout_s is not None:
        return _listening[-1].wait_for_checkpoint(timeout_s)
    _listening[-1].ask()
    return True


def request_stop() -> bool:
    """Ask the run that this process trains to checkpoint and stop; False where none is being trained."""
    if _listening:
        _listening[-1].ask(stop=True)
    return bool(_listening)


def _install(requests: Requests) -> dict[int, Any]:
    """Put our handlers in place; returns those that were there, by signal."""
    before: dict[int, Any] = {}
    for name in HANDED_ON_SIGNALS:
        number = getattr(signal, name, None)
        if number is None:
            continue
        owner = signal.getsignal(number)
        if owner is None:  # not installed from Python: it could not be put back
            continue
        if callable(owner) and owner is not signal.default_int_handler:
            handler: Any = requests.handing_on(owner)
        elif name in STOP_SIGNALS:
            handler = requests.on_signal
        else:
            continue
        before[number] = signal.signal(number, handler)
    return before
