"""The claim's heartbeat while a run trains."""

from __future__ import annotations

import logging
import threading
import time

from scaling_lab.core.spec import RunSpec
from scaling_lab.core.storage.claims import Claim, ClaimLost

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0


class Heartbeat:
    """Sends the claim's heartbeat from a thread: compiling, evaluating or a slow step must not look like a dead process.

    It releases the claim at the end, however the run ended. `check` raises `ClaimLost` if another process has taken the run
    over.
    """

    def __init__(self, claim: Claim, spec: RunSpec) -> None:
        self._claim, self._spec = claim, spec
        self._stop, self._lost = threading.Event(), threading.Event()
        self._done = self._first_step = 0
        self._loss: float | None = None
        self._mfu: float | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True, name="heartbeat")

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._claim.release()
        except OSError as problem:
            log.warning("the claim could not be released (%s): it ends with this process.", problem)

    def begin(self, step: int) -> None:
        """Training starts after `step`; the speed is measured from here."""
        self._done = self._first_step = step
        self._began = time.monotonic()

    def progress(self, step: int, train_loss_nats: float, mfu: float | None = None) -> None:
        """Report how far the run is. Raises `ClaimLost`."""
        self._done, self._loss, self._mfu = step, train_loss_nats, mfu
        if self._lost.is_set():
            self._claim.check()

    def check(self) -> None:
        self._claim.check()

    def _work(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            elapsed = time.monotonic() - self._began
            speed = (self._done - self._first_step) * self._spec.batch_tokens / elapsed
            try:
                self._claim.heartbeat(self._done, self._spec.steps, speed or None, self._loss, self._mfu)
            except ClaimLost:
                self._lost.set()
                return
            except OSError as problem:
                log.warning("run %s: no heartbeat (%s).", self._spec.run_id(), problem)
