"""Starting programs of tests/helpers in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def with_helpers() -> dict[str, str]:
    """The environment in which a started Python finds the package `helpers`."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def start_helper(module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m helpers.MODULE ARGUMENTS`, with its output kept."""
    return subprocess.Popen(
        [sys.executable, "-m", f"helpers.{module}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=with_helpers(),
    )  # fmt: skip


def run_helper(
    module: str, *arguments: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start_helper(module, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(*arguments: str, port: int) -> subprocess.Popen[str]:
    """Two processes of one node; `arguments` name the program, as torchrun takes it."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(port), *arguments
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**with_helpers(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
