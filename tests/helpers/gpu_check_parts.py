"""Parts for the tests of scripts/gpu_check: one that ends at once, one that hangs with a process of its own, one that fails."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any


def run(context: Any) -> None:
    if context.name == "quick":
        context.write(passed=1, failed=0, skipped=0)
    elif context.name == "hanging":
        # In a session of its own, as workers are.
        below = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        context.write(pid=below.pid)
        time.sleep(600)
    else:
        raise ValueError("it fails")
