"""Device, driver and versions, for environment.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from typing import Any

from scaling_lab.core.spec import DTYPES
from scaling_lab.planning.devices import peak_of_label
from scaling_lab.planning.execution import machine_memory_gb, usable_cores
from scaling_lab.training.engine.devices import device_name, git_revision

PACKAGES = ("torch", "triton", "numpy", "scipy", "pytest")
SMI_FIELDS = "driver_version,name,memory.total,power.limit,clocks.max.sm,compute_mode,pcie.link.gen.current"


def environment(device: str) -> dict[str, Any]:
    """What the results were measured with. Loads CUDA."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": git_revision(),
        "device": device,
        "device_name": device_name(torch.device(device)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cores": usable_cores(),
        "memory_gb": machine_memory_gb(),
    }
    if device == "cuda":
        found["cuda"] = cuda_environment(found["device_name"])
    return found


def cuda_environment(label: str) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "devices": torch.cuda.device_count(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "peak_flops_per_s": {dtype: peak_of_label(label, dtype) for dtype in DTYPES},
        "nvidia_smi": nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str] | None:
    """Driver, limits and modes of the first GPU; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode or not done.stdout.strip():
        return None
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(SMI_FIELDS.split(","), values, strict=False))


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
