"""Compiled steps of small models as shared libraries on disk: one library per shape serves every batch size, seed, horizon
and process, whereas `torch.compile` traces and compiles again for each batch size.

The step is traced once with dynamic batch and corpus sizes, compiled ahead of time (AOTInductor) and kept in the compiler's
cache folder. Its file name is a hash of everything it depends on: the sources of this package's step and of the model,
shape, optimizer, threads, torch and the processor. The trace uses an example batch of fixed size, so the library is the same
program whichever run needed it first, and a resumed run computes the same bits.
"""

from __future__ import annotations

import getpass
import hashlib
import inspect
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scaling_lab
from scaling_lab.core.spec import RunSpec
from scaling_lab.planning.execution import LIBRARY_PARAMS
from scaling_lab.planning.memory import loss_chunks
from scaling_lab.training.engine.shared_programs import determinism_switches

__all__ = ["StepFunction", "can_use_library", "library_folder", "step_from_library", "torch_compiled"]

# (starts (batch,), controls (3,), flat (n,), first moment (n,), second moment (n,), corpus) -> step metrics (3,)
StepFunction = Callable[..., Tensor]

# Sequences of the traced example. The compiler produces the same program for all batches but that of one sequence.
EXAMPLE_SEQUENCES = 8
EXAMPLE_CORPUS_TOKENS = 1 << 16
MAX_SEQUENCES = 1 << 20

_loaded: dict[str, StepFunction] = {}


def forget_loaded() -> None:
    """Drop the libraries that this process has loaded: the next step loads from disk or compiles, as in a new process."""
    _loaded.clear()


def can_use_library(spec: RunSpec, batch: int, flat: Tensor, stacked: bool) -> bool:
    """Whether the step can be a library: one run, on a CPU, with a small model and all logits at once."""
    whole_logits = loss_chunks(batch * spec.shape.context, spec.shape.vocab_size) == 1
    return not stacked and flat.device.type == "cpu" and flat.numel() <= LIBRARY_PARAMS and whole_logits


def step_from_library(
    step: StepFunction,
    model: Any,
    spec: RunSpec,
    constants: Sequence[Tensor | float],
    batch: int,
    corpus: Tensor,
) -> StepFunction:
    """The compiled `step`, loaded from its library on disk, which is created if it does not exist.

    `constants` are the numbers that are compiled into it. If the tracer fixes the batch size (a model with biases, torch
    2.13), the library is for this batch only; a step that cannot be made into a library falls back to `torch.compile`.
    """
    key = library_key(model, spec, constants, batch, corpus)
    n_params = sum(p.numel() for p in model.parameters())
    names = {key: None, f"{key}-{batch}": batch}
    for name in names:
        if name not in _loaded and (found := find_library(name)) is not None:
            _loaded[name] = found
        if name in _loaded:
            return _loaded[name]
    for name, fixed_batch in names.items():
        sequences = fixed_batch or (1 if batch == 1 else None)
        try:
            _loaded[name] = make_library(name, step, spec, n_params, corpus, sequences)
            return _loaded[name]
        # Any error of the tracer, the compiler or the linker: torch.compile will raise it again if the user has to fix it.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
    logging.getLogger(__name__).warning(
        "this step falls back to torch.compile, which compiles it at every start: %s", reason
    )
    return _loaded.setdefault(f"{key}-{batch}", torch_compiled(step))


def torch_compiled(step: StepFunction) -> StepFunction:
    compiled: StepFunction = torch.compile(step, dynamic=False)
    return compiled


def find_library(name: str) -> StepFunction | None:
    path = library_folder() / f"{name}.pt2"
    if not path.exists():
        return None
    try:
        return load_library(path)
    # The file is damaged; it will be created again.
    except RuntimeError:
        path.unlink(missing_ok=True)
        return None


def make_library(
    name: str, step: StepFunction, spec: RunSpec, n_params: int, corpus: Tensor, sequences: int | None
) -> StepFunction:
    path = library_folder() / f"{name}.pt2"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the rename is atomic; with the pid, as two processes may compile the same step.
    temporary = path.with_name(f"{name}-{os.getpid()}.pt2")
    try:
        compile_into(temporary, step, spec, n_params, corpus, sequences)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return load_library(path)


def load_library(path: Path) -> StepFunction:
    import torch._inductor

    # A process computes one run at a time, so calls need no lock.
    library = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)

    def step(*inputs: Tensor) -> Tensor:
        metrics: Tensor = library(*inputs)
        return metrics

    return step


def compile_into(
    path: Path, step: StepFunction, spec: RunSpec, n_params: int, corpus: Tensor, fixed: int | None
) -> None:
    """Trace the step on an example and compile it into `path`: for batches of `fixed` sequences or, with None, for any batch
    of more than one (a batch of one is a special case for the compiler)."""
    import torch._inductor
    from torch.export import Dim, export
    from torch.fx.experimental.proxy_tensor import make_fx

    sequences = fixed or EXAMPLE_SEQUENCES
    example = (
        torch.zeros(sequences, dtype=torch.int64), torch.ones(3), *(torch.zeros(n_params) for _ in range(3)),
        torch.zeros(EXAMPLE_CORPUS_TOKENS, dtype=corpus.dtype),
    )  # fmt: skip
    free_batch = None if fixed else {0: Dim("sequences", min=2, max=MAX_SEQUENCES)}
    sizes = (free_batch, None, None, None, None, {0: Dim("corpus", min=spec.shape.context + 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # `export` alone cannot trace through `torch.func.grad`; make_fx first reduces the step to plain operators.
        traced = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
        program = export(StepModule(traced), example, dynamic_shapes=sizes, strict=False)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={**build_options(), **determinism_switches()}
        )


def build_options() -> dict[str, Any]:
    """Options for a fast build: the C++ code that calls the kernels takes no time in a run, optimized or not."""
    from torch._inductor import config

    wanted = {"compile_wrapper_opt_level": "O0", "enable_line_tables": False}
    return {
        f"aot_inductor.{name}": value for name, value in wanted.items() if hasattr(config.aot_inductor, name)
    }


class StepModule(torch.nn.Module):
    """A traced graph as a module that names the step's six arguments."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(
        self, starts: Tensor, controls: Tensor, flat: Tensor, first: Tensor, second: Tensor, corpus: Tensor
    ) -> Tensor:
        metrics: Tensor = self.traced(starts, controls, flat, first, second, corpus)
        return metrics


def library_folder() -> Path:
    """A folder in torch.compile's own cache: TORCHINDUCTOR_CACHE_DIR or its default."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    root = Path(given) if given else Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return root / "scaling_lab"


def library_key(
    model: Any, spec: RunSpec, constants: Sequence[Tensor | float], batch: int, corpus: Tensor
) -> str:
    """A hash of everything that the library depends on."""
    optimizer = spec.optimizer
    parts = [
        source_digest(inspect.getfile(type(model))),
        machine(),
        str(torch.get_num_threads()),
        str(torch.are_deterministic_algorithms_enabled()),
        repr(determinism_switches()),
        repr(spec.shape),
        repr(spec.parametrization),
        spec.dtype,
        str(corpus.dtype),
        str(batch > 1),
        repr((optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.clip_norm)),
    ]
    digest = hashlib.sha256("\n".join(parts).encode())
    for constant in constants:
        digest.update(constant.numpy().tobytes() if isinstance(constant, Tensor) else repr(constant).encode())
    return f"{spec.shape.kind}-{digest.hexdigest()[:24]}"


@cache
def source_digest(model_file: str) -> str:
    """A hash of all code that a step is traced from: this package's, and the model's own file."""
    digest = hashlib.sha256()
    root = Path(scaling_lab.__file__).parent
    for path in sorted([*root.glob("training/**/*.py"), *root.glob("core/**/*.py")]):
        digest.update(path.read_bytes())
    digest.update(Path(model_file).read_bytes())
    return digest.hexdigest()


@cache
def machine() -> str:
    """Versions of torch and Python, and the processor with its instruction sets: libraries are specific to all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    except OSError:
        processor = platform.processor()
    return "\n".join((torch.__version__, platform.python_version(), platform.machine(), processor))
