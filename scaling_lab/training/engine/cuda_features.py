"""What the first GPU of this machine offers for training: peaks, dtypes, CUDA graphs, compilation, NCCL (for `doctor`)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from scaling_lab.core.spec import DTYPES
from scaling_lab.planning.devices import device_of_label
from scaling_lab.planning.execution import has_compiler
from scaling_lab.training.engine.devices import cuda_has_bfloat16


@dataclass(frozen=True)
class Feature:
    """One line of `doctor`."""

    name: str
    ok: bool
    found: str
    advice: str | None = None


def cuda_features() -> list[Feature]:
    """Empty without CUDA."""
    if not torch.cuda.is_available():
        return []
    return [_peak(), _dtype(), _graph(), _compile(), _nccl()]


def _peak() -> Feature:
    label = torch.cuda.get_device_name(0)
    device = device_of_label(label)
    if device is None:
        return Feature("GPU peak", True, f"{label} is not in the table of devices: no MFU is shown")
    peaks = {dtype: device.peak_flops_per_s(dtype) for dtype in ("bfloat16", "tf32", "float32")}
    known = [f"{peak / 1e12:.4g} TFLOP/s {dtype}" for dtype, peak in peaks.items() if peak is not None]
    return Feature("GPU peak", True, f"{', '.join(known)}, dense ({device.source})")


def _dtype() -> Feature:
    if cuda_has_bfloat16():
        return Feature("GPU dtype", True, f"bfloat16 (dtype=auto takes it); {', '.join(DTYPES)} work")
    return Feature("GPU dtype", True, "no bfloat16: dtype=auto takes float32")


def _graph() -> Feature:
    """Whether a CUDA graph can be captured and replayed, tried on one addition."""
    try:
        total = torch.zeros(1, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            total.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total.add_(1)
        before = total.item()
        graph.replay()
        if total.item() == before + 1:
            return Feature("CUDA graph", True, "captured and replayed")
        why = "a replay changed nothing"
    # Whatever it is, it is a finding.
    except Exception as error:
        why = " ".join(str(error).split())[:200]
    return Feature("CUDA graph", False, why, "steps are launched one by one, which is slow for small models")


def _compile() -> Feature:
    triton, compiler = find_spec("triton") is not None, has_compiler("cc", "gcc", "clang")
    if triton and compiler:
        return Feature("GPU compile", True, "Triton and a C compiler: torch.compile works on the GPU")
    without = " and ".join(
        name
        for name, there in (("Triton", triton), ("a C compiler with Python's headers", compiler))
        if not there
    )
    advice = "steps run eagerly: install gcc and python3-dev, and a CUDA build of torch, which brings Triton"
    return Feature("GPU compile", False, f"without {without}", advice)


def _nccl() -> Feature:
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        return Feature("NCCL", True, ".".join(map(str, torch.cuda.nccl.version())))
    return Feature("NCCL", False, "none", "one run on several GPUs (torchrun) needs a torch with NCCL")
