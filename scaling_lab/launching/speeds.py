"""Which speeds the times of a plan, and the limits of its jobs, are taken from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaling_lab.core.installation import is_installed
from scaling_lab.planning.cost import Speeds
from scaling_lab.planning.devices import AUTO, Device, device_of_label, get_device
from scaling_lab.planning.execution import accelerator_is_possible
from scaling_lab.planning.probe import load_probe, probe_of, processor_name

# Options of a Slurm job whose values may name its GPUs: gres=gpu:a100:1, constraint=h100.
NAMING_OPTIONS = ("gres", "gpus_per_node", "gpus_per_task", "constraint", "partition")


def speeds_for(device: str, gpu: str | None = None) -> Speeds:
    """The speeds known for a plan's device; `gpu` as in `gpu=NAME`. Raises `UserError` for an unknown name."""
    if device == "cpu":
        return Speeds(probe=load_probe(processor_name()))
    if device != "cuda":
        return Speeds(probe=load_probe(f"{processor_name()} ({device})"))
    if gpu not in (None, AUTO):
        chosen = get_device(str(gpu))
        return Speeds(chosen, probe_of(chosen))
    label = local_gpu()
    if label is None:
        return Speeds()
    return Speeds(device_of_label(label), load_probe(label))


def local_gpu() -> str | None:
    """Name of the first GPU of this machine; None without one."""
    if not (accelerator_is_possible() and is_installed("torch")):
        return None
    from scaling_lab.training.engine.devices import cuda_name

    return cuda_name()


def gpu_of_job(options: Mapping[str, Any]) -> Device | None:
    """The kind of GPU that a Slurm job's options name; None if they name none that is in the table."""
    texts = [str(options.get(name) or "") for name in NAMING_OPTIONS]
    return next((found for text in texts if (found := device_of_label(text))), None)


def gpus_of_job(options: Mapping[str, Any]) -> int:
    """How many GPUs a Slurm job's options ask for; 1 if they do not say."""
    for name in ("gpus_per_node", "gres", "gpus_per_task"):
        last = str(options.get(name) or "").rpartition(":")[2]
        if last.isdecimal() and int(last) > 0:
            return int(last)
    return 1
