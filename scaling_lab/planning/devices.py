"""GPUs by name: peaks, memory, and an assumed share of the peak by model size, for times and costs shown before a launch.

Only shown times and job limits come from here; compilation, stacks, threads and run ids never do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from scaling_lab.core.errors import unknown
from scaling_lab.core.spec import PlannedRun
from scaling_lab.planning.execution import COMPILE_S, cuda_program_key


@dataclass(frozen=True)
class Device:
    """One kind of GPU; peaks are dense, without sparsity."""

    name: str
    label: str
    bf16_flops_per_s: float | None
    """Matrix multiplication in bfloat16 with float32 accumulation; None: no bfloat16."""
    tf32_flops_per_s: float | None
    """The same in TF32; None: no TF32."""
    fp32_flops_per_s: float
    """Outside the tensor cores."""
    memory_gb: float
    bandwidth_bytes_per_s: float
    source: str

    def peak_flops_per_s(self, dtype: str) -> float | None:
        """The peak for a run's `dtype` (float32, bfloat16, tf32); None if the GPU lacks it."""
        return {
            "bfloat16": self.bf16_flops_per_s,
            "tf32": self.tf32_flops_per_s,
            "float32": self.fp32_flops_per_s,
        }[dtype]


# NVIDIA's data sheets: H100 SXM, H200 SXM, B200 (HGX), A100 80GB SXM, L40S, T4; Ada and Ampere GA102 white papers for the
# RTX 4090 and 3090. Throughput with sparsity is halved where a sheet prints that.
DEVICES = {
    device.name: device
    for device in (
        Device("b200", "NVIDIA B200", 2250e12, 1125e12, 75e12, 180, 7.7e12, "data sheet of HGX B200, per GPU"),
        Device("h200", "NVIDIA H200", 989e12, 494e12, 67e12, 141, 4.8e12, "data sheet of H200 SXM"),
        Device("h100", "NVIDIA H100 80GB", 989e12, 494e12, 67e12, 80, 3.35e12, "data sheet of H100 SXM"),
        Device("a100", "NVIDIA A100 80GB", 312e12, 156e12, 19.5e12, 80, 2.04e12, "data sheet of A100 80GB SXM"),
        Device("l40s", "NVIDIA L40S", 362e12, 183e12, 91.6e12, 48, 0.864e12, "data sheet of L40S"),
        Device("rtx4090", "NVIDIA RTX 4090", 165e12, 82.6e12, 82.6e12, 24, 1.01e12, "Ada white paper, table 2"),
        Device("rtx3090", "NVIDIA RTX 3090", 71e12, 35.6e12, 35.6e12, 24, 0.936e12, "GA102 white paper, table 3"),
        Device("t4", "NVIDIA T4", None, None, 8.1e12, 16, 0.32e12, "data sheet of T4"),
    )
}  # fmt: skip
# Words in a label that mark variants of a card with lower or higher peaks; the A100 on PCIe has the peaks of the SXM card.
OTHER_PEAKS = frozenset({"pcie", "nvl", "laptop", "max", "d", "ti", "super"})
SAME_PEAKS = {"a100": frozenset({"pcie"})}
# Share of the peak by parameters, interpolated in ln N: assumed, not measured here. At 1e8 and 1e9 what public compiled
# bfloat16 loops report at context 1,024; below, matrices are too small to fill a GPU.
MFU = ((1e5, 0.002), (1e6, 0.02), (1e7, 0.12), (1e8, 0.35), (1e9, 0.42))
# Launching one step's kernels, a CUDA graph or a compiled program: assumed.
STEP_OVERHEAD_S = 100e-6
# Starting a worker: assumed.
START_S = 15.0
# The names that `gpu=` takes besides the devices.
AUTO = "auto"


def get_device(name: str) -> Device:
    """The device called `name`. Raises `UserError` naming the choices."""
    if name not in DEVICES:
        raise unknown("gpu", name, (AUTO, *DEVICES))
    return DEVICES[name]


def device_of_label(label: str) -> Device | None:
    """The device whose name a driver reports ("NVIDIA H100 80GB HBM3"); None if the table has none.

    Variants with other peaks than the table's ("H100 PCIe", "RTX 3090 Ti", "RTX 4090 Laptop GPU") are not in it.
    """
    words = re.findall(r"[a-z0-9]+", label.lower().replace("rtx ", "rtx"))
    device = next((d for d in DEVICES.values() if d.name in words), None)
    if device is None or OTHER_PEAKS.intersection(words) - SAME_PEAKS.get(device.name, frozenset()):
        return None
    return device


def peak_of_label(label: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of the device with this label for a run's `dtype`; None where the table has none."""
    device = device_of_label(label)
    return None if device is None else device.peak_flops_per_s(dtype)


def mfu(n_params: float) -> float:
    """Assumed share of the peak for a model of `n_params` parameters."""
    points = [(math.log(n), share) for n, share in MFU]
    x = min(max(math.log(n_params), points[0][0]), points[-1][0])
    for (low, share), (high, next_share) in pairwise(points):
        if x <= high:
            return math.exp(
                math.log(share) + (x - low) / (high - low) * (math.log(next_share) - math.log(share))
            )
    return points[-1][1]


def run_seconds(run: PlannedRun, device: Device) -> float | None:
    """Seconds of one run on one GPU, its share of a stack's where it is in one; None if the GPU lacks the run's dtype."""
    spec = run.spec
    peak = device.peak_flops_per_s(spec.dtype)
    if peak is None:
        return None
    # A stack fills the GPU as a model of its members' size together would.
    members = max(1, run.execution.stack_size)
    flops_per_s = peak * mfu(spec.n_params() * members)
    steps = spec.steps - spec.parent_step
    return spec.own_train_flops() / flops_per_s + steps * STEP_OVERHEAD_S / members


@dataclass(frozen=True)
class GpuCost:
    """Time and money of a plan on GPUs, a guess."""

    device: Device
    count: int
    gpu_seconds: float
    """Busy time, summed over GPUs, compilation included."""
    seconds: float
    """Until the last run ends."""
    price: float | None = None
    """In the currency of the price per hour; all GPUs are paid for until the end."""


def gpu_cost(
    runs: Iterable[PlannedRun],
    device: Device,
    count: int = 1,
    price_per_hour: float | None = None,
    seconds_of: Callable[[PlannedRun], float | None] | None = None,
) -> GpuCost | None:
    """What `runs` take on `count` GPUs, one run (or stack) at a time on each; None if the GPU lacks a run's dtype.

    `seconds_of`: the seconds of one run; None: by the table.
    """
    runs = list(runs)
    seconds = [run_seconds(run, device) if seconds_of is None else seconds_of(run) for run in runs]
    known = [s for s in seconds if s is not None]
    if len(known) < len(seconds):
        return None
    programs = {cuda_program_key(r.spec, r.execution) for r in runs if r.execution.compile}
    busy = sum(known) + COMPILE_S * len(programs)
    elapsed = START_S + max(busy / count, max(known, default=0.0))
    price = None if price_per_hour is None else price_per_hour * count * elapsed / 3600
    return GpuCost(device, count, busy, elapsed, price)
