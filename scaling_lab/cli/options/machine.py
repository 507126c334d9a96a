"""What a plan is made for: its device and precision, from the options or from the machine at hand.

torch is imported only where there may be a GPU.
"""

from __future__ import annotations

from scaling_lab.core.errors import UserError
from scaling_lab.core.installation import is_installed
from scaling_lab.planning.devices import AUTO, get_device
from scaling_lab.planning.execution import accelerator_is_possible

ASSUMED_BFLOAT16 = (
    "dtype=auto: bfloat16, because neither gpu= nor this machine says which GPU will train; without bfloat16 (T4, V100) plan "
    "with dtype=float32."
)


def resolve_device(name: str, gpu: str | None = None) -> str:
    """The device for `device=auto`: CUDA if `gpu=NAME` is given, else what this machine has; other names are unchanged.

    A named device need not exist here, since a login node may plan for its cluster's GPUs; training checks it. Raises
    `UserError` for `gpu=auto` where there is none.
    """
    if name != AUTO:
        return name
    if gpu not in (None, AUTO):
        return "cuda"
    found = "cpu"
    if torch_may_find_a_gpu():
        from scaling_lab.training.engine.devices import resolve_device as resolve

        found = resolve(name)
    if gpu == AUTO and found == "cpu":
        raise UserError(
            "gpu=auto: this machine has no GPU that torch can use; name the GPU to plan for: gpu=h100."
        )
    return found


def resolve_dtype(dtype: str, device: str, gpu: str | None = None) -> str:
    """The precision for `dtype=auto`: on CUDA bfloat16 unless the GPU lacks it, elsewhere float32."""
    if dtype != AUTO:
        return dtype
    return "bfloat16" if device == "cuda" and has_bfloat16(gpu) is not False else "float32"


def has_bfloat16(gpu: str | None) -> bool | None:
    """Whether the GPU that is planned for computes in bfloat16; None if neither `gpu=` nor this machine says which it is."""
    if gpu not in (None, AUTO):
        return get_device(str(gpu)).bf16_flops_per_s is not None
    if not torch_may_find_a_gpu():
        return None
    from scaling_lab.training.engine.devices import cuda_has_bfloat16

    return cuda_has_bfloat16()


def torch_may_find_a_gpu() -> bool:
    """Whether torch is installed and a driver of a GPU could be loaded; does not import torch."""
    return accelerator_is_possible() and is_installed("torch")
