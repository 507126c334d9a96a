"""One measurement of scripts/bench_train.py in its own process: prepared at any time, timed when told to."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

import bench_train


class Measurement:
    """One process of bench_train: it prepares, says `ready`, and measures when told to."""

    def __init__(self, task: dict[str, Any], log: Any, threads: int = 1) -> None:
        self.ready, self.found = threading.Event(), {"error": "ended without a result"}
        self.began = time.monotonic()
        self.prepared_s: float | None = None
        env = bench_train.child_environment(threads, None)
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # several compile at once
        self.process = subprocess.Popen(
            [sys.executable, bench_train.__file__, "--child", json.dumps({**task, "wait": True})],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "ready":
                self.prepared_s = round(time.monotonic() - self.began, 1)
                self.ready.set()
            elif line.startswith("{"):
                self.found = json.loads(line)
        if self.process.wait():
            self.found = {"error": f"exit status {self.process.returncode}"}

    @property
    def ended(self) -> bool:
        return not self._reader.is_alive()

    def wait_until_ready(self) -> None:
        """Until it is, or has failed."""
        while not self.ready.is_set() and not self.ended:
            time.sleep(0.05)

    def measure(self, limit_s: float) -> dict[str, Any]:
        """Tell it to measure, and wait for the result."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except OSError:  # it has ended
            pass
        self._reader.join(max(0.0, limit_s))
        if not self.ended:
            self.stop()
            return {"error": f"no result within {limit_s:.0f} s"}
        return {**self.found, "prepared_s": self.prepared_s}

    def stop(self) -> None:
        self.process.kill()
        self._reader.join()
