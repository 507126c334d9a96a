"""What a finished run leaves behind, and loading it.

    <run folder>/weights.safetensors    the parameters in float32; shape and parametrization are in its header
                 tokenizer.json         of a corpus that has one

The format (https://github.com/huggingface/safetensors#format) is the length of a JSON header, the header, and the tensors' bytes:
written and read here, because it takes fewer lines than a dependency and `import scaling_lab` stays light.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaling_lab.core.errors import UserError
from scaling_lab.core.parametrization import parametrization_class
from scaling_lab.core.spec import RunSpec, shape_class
from scaling_lab.core.storage.files import temporary_path
from scaling_lab.core.storage.serialization import build, to_dict
from scaling_lab.training.engine.optimizer import FlatLayout
from scaling_lab.training.models import build_model
from scaling_lab.training.run.checkpoint import read_checkpoint

WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
ALIGNMENT = 8


def write_weights(run_folder: Path, spec: RunSpec, parameters: Mapping[str, Tensor]) -> None:
    """Write a run's parameters, and a copy of its corpus's tokenizer. Raises OSError; then no part of a file remains."""
    about = {
        "run_id": spec.run_id(),
        "shape": json.dumps(to_dict(spec.shape)),
        "parametrization": json.dumps(to_dict(spec.parametrization)),
    }
    write_safetensors(run_folder / WEIGHTS, parameters, about)
    tokenizer: Path | None = getattr(spec.data, "tokenizer_file", None)
    if tokenizer is not None:
        with suppress(FileNotFoundError):  # a corpus of bytes
            shutil.copyfile(tokenizer, run_folder / TOKENIZER)


def load_model(folder: Path, device: str = "cpu") -> nn.Module:
    """The model of a run folder (its last checkpoint, if it kept that instead of weights) or of a weights file, in evaluation
    mode. Raises `UserError` if there are no weights or they cannot be read."""
    path = folder / WEIGHTS if folder.is_dir() else folder
    try:
        if path.is_file():
            tensors, about = read_safetensors(path)
            shape, parametrization = (json.loads(about[name]) for name in ("shape", "parametrization"))
        else:
            path = folder / "spec.json"
            spec = RunSpec.from_dict(json.loads(path.read_text(encoding="utf-8")))
            path = folder / "checkpoint" / f"step-{spec.steps}.pt"
            flat = read_checkpoint(path, spec.run_id()).tensors["flat"]
            model = build_model(spec.shape, spec.parametrization)
            tensors = FlatLayout.of(model).views(flat)
            shape, parametrization = to_dict(spec.shape), to_dict(spec.parametrization)
        model = build_model(
            build(shape_class(shape["kind"]), shape),
            build(parametrization_class(parametrization["kind"]), parametrization),
        )
        # A tied head is one parameter, stored once under the name of the embedding.
        missing, unknown = model.load_state_dict(tensors, strict=False)
        lacking = set(missing) & {name for name, _ in model.named_parameters()}
        if lacking or unknown:
            raise ValueError(f"missing {sorted(lacking)}, unknown {sorted(unknown)}")
    except FileNotFoundError:
        raise UserError(
            f"folder={str(folder)!r} has no {WEIGHTS}: it is written when a run ends that was planned with keep=weights."
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    return model.to(device).eval()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write float32 tensors on the CPU atomically and durably, by name, as the safetensors library does."""
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in sorted(tensors):
                file.write(tensors[name].detach().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The float32 tensors of a file, and its metadata. Raises ValueError for a truncated file or another type."""
    data = bytearray(path.stat().st_size)
    with open(path, "rb") as file:
        file.readinto(data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header.pop("__metadata__", {})
    tensors = {}
    for name, found in header.items():
        start, end = found["data_offsets"]
        if found["dtype"] != "F32":
            raise ValueError(f"{name} is {found['dtype']}, expected F32")
        if 8 + length + end > len(data):
            raise ValueError("the file is truncated")
        flat = torch.frombuffer(
            data, dtype=torch.float32, count=(end - start) // 4, offset=8 + length + start
        )
        tensors[name] = flat.view(found["shape"])
    return tensors, about
