"""The comparison of ways to train in bfloat16: the alternative is what it claims to be, and the script runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.specs import tiny
from scaling_lab.core.spec import Execution
from scaling_lab.training.engine.gradient import make_gradient
from scaling_lab.training.run.session import open_session

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_bf16.py"


def test_the_alternative_is_bfloat16_throughout():
    """Its gradient is that of a module whose parameters are bfloat16: numbers of 8 bits, near float32's."""
    found = importlib.util.spec_from_file_location("bench_bf16", SCRIPT)
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    sys.modules["bench_bf16"] = script  # dataclasses look up their module
    found.loader.exec_module(script)
    session = open_session(tiny(1), Execution())
    step = session.step
    starts = torch.arange(4) * 640
    ours, loss = script.bfloat16_weights_gradient(step.model, step.layout, session.spec, 4)(
        step.flat, starts, step.tokens
    )
    full, full_loss = make_gradient(step.model, step.layout, session.spec, 4)(step.flat, starts, step.tokens)
    assert torch.equal(ours, ours.bfloat16().float())
    assert not torch.equal(full, full.bfloat16().float())
    assert float((ours - full).norm() / full.norm()) < 0.02
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss - full_loss)) < 0.01


@pytest.mark.slow
def test_the_quick_comparison_runs(tmp_path):
    out = tmp_path / "bf16.txt"
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert done.stdout == text
    assert text.count("autocast") == text.count("weights") == 2
    assert "width 32, depth 2, 16 x 64" in text
    # Each way is measured with its own program, not with a library that another one left on disk.
    losses = next(line for line in text.splitlines() if line.split()[0] == "weights")
    assert "+0.0000 +- 0.0000" not in losses
