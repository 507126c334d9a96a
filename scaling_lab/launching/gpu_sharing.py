"""How processes share a GPU: NVIDIA's Multi-Process Service (MPS), exclusive mode, and how many workers each GPU gets.

Without MPS the processes on one GPU take turns, so a second one only helps while the first compiles, evaluates or loads
data; with MPS their kernels run at the same time (https://docs.nvidia.com/deploy/mps). A stack needs neither: small runs
are stacked first, when they are planned.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scaling_lab.core.counts import Convention
from scaling_lab.core.spec import PlannedRun
from scaling_lab.planning.execution import STACKED_PARAMS

# With MPS several small models fill a GPU together; without, one computes while another compiles or evaluates.
MAX_WORKERS_WITH_MPS, MAX_WORKERS_TAKING_TURNS = 4, 2
MPS_CONTROL = "nvidia-cuda-mps-control"
COMMAND_TIMEOUT_S = 10.0
START_MPS = f"`{MPS_CONTROL} -d` starts MPS"


@dataclass(frozen=True)
class GpuSharing:
    """What this machine allows."""

    mps: bool
    """Whether NVIDIA's Multi-Process Service is running."""
    exclusive: bool
    """Whether a GPU accepts only one process (compute mode EXCLUSIVE_PROCESS), which with MPS is its server."""

    @property
    def max_workers(self) -> int | None:
        """The most workers that a GPU can have at all; None: no limit."""
        return 1 if self.exclusive and not self.mps else None

    def workers_per_gpu(self, runs: Iterable[PlannedRun]) -> int:
        """How many workers each GPU should get: one unless there are runs (or stacks) too small to fill it."""
        if self.max_workers == 1 or not any(is_small(run) for run in runs):
            return 1
        return MAX_WORKERS_WITH_MPS if self.mps else MAX_WORKERS_TAKING_TURNS

    def describe(self) -> str:
        """One line for `doctor` and the launch."""
        if self.mps:
            return f"MPS is running: up to {MAX_WORKERS_WITH_MPS} small runs at the same time on each GPU"
        if self.exclusive:
            return f"exclusive mode without MPS: one worker per GPU ({START_MPS})"
        return f"no MPS: small runs on one GPU take turns, at most {MAX_WORKERS_TAKING_TURNS} by default ({START_MPS})"


def find_gpu_sharing() -> GpuSharing:
    """How processes share the GPUs of this machine."""
    return GpuSharing(mps_is_running(), "exclusive" in compute_modes().lower())


def is_small(run: PlannedRun) -> bool:
    """Whether the run, or its whole stack, leaves room on a GPU."""
    n_params = run.spec.count().n_params(Convention.SIX_N_WITH_HEAD)
    return n_params * run.execution.stack_size < STACKED_PARAMS


def n_programs(runs: Iterable[PlannedRun]) -> int:
    """The number of runs, counting each stack once."""
    return len({run.execution.stack or run.run_id for run in runs})


def mps_is_running() -> bool:
    """Whether CUDA programs of this process would use MPS: its control daemon answers, or only its socket is visible (in a
    container, without the command)."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    if not (folder / "control").exists():
        return False
    if shutil.which(MPS_CONTROL) is None:
        return True
    # A daemon that was killed leaves its socket.
    return _output([MPS_CONTROL], "get_server_list\n") is not None


def compute_modes() -> str:
    """The compute modes of the visible GPUs, as nvidia-smi prints them; empty if unknown."""
    if shutil.which("nvidia-smi") is None:
        return ""
    return _output(["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]) or ""


def _output(command: list[str], text: str = "") -> str | None:
    """What a command prints; None if it fails."""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
