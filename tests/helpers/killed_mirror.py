"""Mirrors 30 points of a run to W&B in the given folder, waits, and kills itself, as if its node were lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from scaling_lab.core.record import EvalPoint
from scaling_lab.core.spec import Execution, PlannedRun, RunSpec
from scaling_lab.tracking.sink import trackers

POINTS = 30
handed_over: list[int] = []
log_point = trackers.log_point


def counted(run: Any, point: EvalPoint) -> None:
    log_point(run, point)
    handed_over.append(point.step)


def main(spec_json: str, folder: Path, wait_s: float) -> None:
    trackers.log_point = counted
    spec = RunSpec.from_dict(json.loads(spec_json))
    tracker = trackers.make_tracker({"kind": "wandb"}, folder)
    tracker.start(PlannedRun(spec, Execution()), "abc")
    for step in range(1, POINTS + 1):
        tracker.log(EvalPoint(step, 256 * step, 1e6 * step, 0.1, 5.0))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and len(handed_over) < POINTS:
        time.sleep(0.05)
    time.sleep(wait_s)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
