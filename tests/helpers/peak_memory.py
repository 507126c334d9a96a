"""Peak resident memory of this process, on Linux."""

from __future__ import annotations

import re
from pathlib import Path


def peak_bytes() -> int:
    """VmHWM (proc(5)): a process inherits the `ru_maxrss` of the one that started it, and a process of tests is large."""
    match = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
