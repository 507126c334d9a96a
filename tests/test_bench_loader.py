"""The loader benchmark runs and reports every source; its numbers are meant for a quiet machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_loader.py"


@pytest.mark.slow
def test_the_quick_benchmark_reports_every_source(tmp_path):
    out = tmp_path / "bench.txt"
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert done.stdout == text
    for name in (
        "bytes",
        "relative to the speed of tokenizers",
        "pysource",
        "prepared",
        "context_tree",
        "zipf_facts",
        "mixture",
    ):
        assert sum(name in line and ("OK" in line or "MISSED" in line) for line in text.splitlines()) >= 1, (
            name
        )
