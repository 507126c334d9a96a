"""The device of a run, its settings, and the environment that goes into the run's record."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from functools import cache
from pathlib import Path

import torch

import scaling_lab
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.record import Environment
from scaling_lab.core.spec import Execution
from scaling_lab.planning.devices import peak_of_label
from scaling_lab.planning.probe import processor_name

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str) -> str:
    """`auto` is CUDA if available, else MPS, else the CPU. Raises `UserError` for a device that is not available."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if name not in available:
        raise unknown("device", name, DEVICES)
    if not available[name]:
        usable = [device for device, present in available.items() if present]
        raise UserError(
            f"device={name} is not available on this machine. Choices: auto, {', '.join(usable)}."
        )
    return name


def apply_execution(execution: Execution, dtype: str = "float32") -> torch.device:
    """Set threads, determinism and precision for this process and return the device. A process computes one run, or one
    stack, at a time. Raises `UserError` for dtype=tf32 on a device without it."""
    if dtype == "tf32" and execution.device != "cuda":
        raise UserError(
            f"dtype=tf32 requires device=cuda, not {execution.device}. Choices: float32, bfloat16."
        )
    torch.set_num_threads(execution.threads)
    if execution.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        set_deterministic(execution.deterministic)
    return torch.device(execution.device)


def set_deterministic(on: bool) -> None:
    """Make repetitions on one kind of GPU identical bit for bit; an operation that cannot be deterministic raises.

    Raising, not warning: under warn_only, memory-efficient attention would keep its backward pass with atomic additions.
    """
    if on:
        # cuBLAS is reproducible only if this is set before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The documentation of cuDNN's attention promises no determinism; flash and memory-efficient attention do.
    torch.backends.cuda.enable_cudnn_sdp(not on)
    torch.use_deterministic_algorithms(on)
    # Deterministic mode would also fill uninitialized memory. That takes time and affects no result here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def cuda_memory_gb() -> float | None:
    """Memory of the first GPU, rounded down to whole GB so that cards of one model get the same plan; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return float(int(torch.cuda.get_device_properties(0).total_memory // 1e9))


def cuda_has_bfloat16() -> bool | None:
    """Whether the first GPU computes in bfloat16 itself; None without a GPU."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else None


def cuda_name() -> str | None:
    """Name of the first GPU; None without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def device_name(device: torch.device) -> str:
    """Name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def peak_flops_per_s(device: torch.device, dtype: str) -> float | None:
    """Dense peak of all devices that train a run together; None where the table of devices has none (any CPU)."""
    if device.type != "cuda":
        return None
    peak = peak_of_label(torch.cuda.get_device_name(device), dtype)
    return None if peak is None else peak * _world_size()


def _world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


@cache
def git_revision() -> str | None:
    """Revision of the checkout that this code runs from, with a + if it has local changes; None for a wheel."""
    folder = Path(scaling_lab.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")


def run_environment(
    device: torch.device | None, data_fingerprint: str, planned_device: str = ""
) -> Environment:
    """The environment for a run's record; `device` is None if the run failed before it reached its device."""
    return Environment(
        scaling_lab=scaling_lab.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        git_revision=git_revision(),
        device=device.type if device else planned_device,
        device_name=device_name(device) if device else "unknown",
        host=socket.gethostname(),
        platform=platform.platform(),
        data_fingerprint=data_fingerprint,
        processes=_world_size(),
    )
