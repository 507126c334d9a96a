"""Owns compiled steps of small models as shared libraries on disk: one of a shape serves every batch size, seed, horizon and
process, where `torch.compile` traces and compiles for each batch anew.

The step is traced once with the batch and the corpus as free sizes, compiled ahead of time (AOTInductor) and kept in the
compiler's cache folder. What a library was made from is in its name: the sources of this package's step, the model's own
source, shape, optimiser, threads, torch and the processor. A trace looks at an example of a fixed batch, so that the library is
the same program whichever run needed it first, and a resumed run computes the same bits.
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

__all__ = ["Step", "fits", "library_folder", "step_from_library"]

# (starts (batch,), controls (3,), flat (n,), first moment (n,), second moment (n,), corpus) -> what the step tells (3,)
Step = Callable[..., Tensor]

# Sequences of the example that is traced. What the compiler sees is the same for all batches but that of one sequence.
EXAMPLE_SEQUENCES = 8
EXAMPLE_CORPUS_TOKENS = 1 << 16
MAX_SEQUENCES = 1 << 20

_loaded: dict[str, Step] = {}


def forget_loaded() -> None:
    """Drop the libraries this process has loaded: the next step loads from disk or compiles, as in a new process."""
    _loaded.clear()


def fits(spec: RunSpec, batch: int, flat: Tensor, stacked: bool) -> bool:
    """Whether a step is one that a library is made of: of one run, on a CPU, its logits at once, its constants small."""
    whole_logits = loss_chunks(batch * spec.shape.context, spec.shape.vocab_size) == 1
    return not stacked and flat.device.type == "cpu" and flat.numel() <= LIBRARY_PARAMS and whole_logits


def step_from_library(
    step: Step, model: Any, spec: RunSpec, constants: Sequence[Tensor | float], batch: int, corpus: Tensor
) -> Step:
    """`step`, compiled: loaded where a library of it lies on disk, else compiled and kept there.

    `constants` are the numbers that are compiled into it. Where the tracer fixes the batch (a model with biases, torch 2.13),
    the library is of this batch; a step that has none at all goes through `torch.compile`.
    """
    key = library_key(model, spec, constants, batch, corpus)
    n_params = sum(p.numel() for p in model.parameters())
    names = {key: None, f"{key}-{batch}": batch}
    for name in names:
        if name not in _loaded and (found := on_disk(name)) is not None:
            _loaded[name] = found
        if name in _loaded:
            return _loaded[name]
    for name, fixed in names.items():
        try:
            _loaded[name] = compiled_to_disk(name, step, spec, n_params, corpus, batch, fixed)
            return _loaded[name]
        # Whatever a tracer, a compiler or a linker says: torch.compile says it again if it is the user's to mend.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
    logging.getLogger(__name__).warning(
        "this step goes through torch.compile, which compiles it at each start: %s", reason
    )
    return _loaded.setdefault(f"{key}-{batch}", torch_compiled(step))


def torch_compiled(step: Step) -> Step:
    compiled: Step = torch.compile(step, dynamic=False)
    return compiled


def on_disk(name: str) -> Step | None:
    path = library_folder() / f"{name}.pt2"
    if not path.exists():
        return None
    try:
        return loaded(path)
    # Torn: it is made anew in its place.
    except RuntimeError:
        path.unlink(missing_ok=True)
        return None


def compiled_to_disk(
    name: str, step: Step, spec: RunSpec, n_params: int, corpus: Tensor, batch: int, fixed: int | None
) -> Step:
    path = library_folder() / f"{name}.pt2"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, for the rename; of a name of its own, for two processes that compile the same.
    fresh = path.with_name(f"{name}-{os.getpid()}.pt2")
    try:
        compile_into(fresh, step, spec, n_params, corpus, fixed or (1 if batch == 1 else None))
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return loaded(path)


def loaded(path: Path) -> Step:
    import torch._inductor

    # One process computes one run at a time: no lock around each call.
    library = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)

    def step(*inputs: Tensor) -> Tensor:
        told: Tensor = library(*inputs)
        return told

    return step


def compile_into(
    path: Path, step: Step, spec: RunSpec, n_params: int, corpus: Tensor, fixed: int | None
) -> None:
    """Trace the step on an example and compile it into `path`, for batches of `fixed` sequences or, with None, of any above one
    (a batch of one is a size of its own for the compiler)."""
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
        # `export` alone does not look through `torch.func.grad`; of what make_fx leaves, plain operators, it does.
        traced = make_fx(step, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
        program = export(Whole(traced), example, dynamic_shapes=sizes, strict=False)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=quick_build()
        )


def quick_build() -> dict[str, Any]:
    """What a build can leave out: the C++ that calls the kernels takes no time at a run, however it is compiled."""
    from torch._inductor import config

    wanted = {"compile_wrapper_opt_level": "O0", "enable_line_tables": False}
    return {
        f"aot_inductor.{name}": value for name, value in wanted.items() if hasattr(config.aot_inductor, name)
    }


class Whole(torch.nn.Module):
    """A graph as a module with the step's six arguments by name."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(
        self, starts: Tensor, controls: Tensor, flat: Tensor, first: Tensor, second: Tensor, corpus: Tensor
    ) -> Tensor:
        told: Tensor = self.traced(starts, controls, flat, first, second, corpus)
        return told


def library_folder() -> Path:
    """Beside what torch.compile keeps: TORCHINDUCTOR_CACHE_DIR, or its default."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    root = Path(named) if named else Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    return root / "scaling_lab"


def library_key(
    model: Any, spec: RunSpec, constants: Sequence[Tensor | float], batch: int, corpus: Tensor
) -> str:
    """Of all that the library depends on: a change of any makes another."""
    optimizer = spec.optimizer
    parts = [
        sources(inspect.getfile(type(model))), machine(), str(torch.get_num_threads()), str(torch.are_deterministic_algorithms_enabled()),
        repr(spec.shape), repr(spec.parametrization), spec.dtype, str(corpus.dtype), str(batch > 1),
        repr((optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.clip_norm)),
    ]  # fmt: skip
    digest = hashlib.sha256("\n".join(parts).encode())
    for constant in constants:
        digest.update(constant.numpy().tobytes() if isinstance(constant, Tensor) else repr(constant).encode())
    return f"{spec.shape.kind}-{digest.hexdigest()[:24]}"


@cache
def sources(model_file: str) -> str:
    """The text of everything in this package that a step is traced from, and of the model's own file."""
    digest = hashlib.sha256()
    root = Path(scaling_lab.__file__).parent
    for path in sorted([*root.glob("training/**/*.py"), *root.glob("core/**/*.py")]):
        digest.update(path.read_bytes())
    digest.update(Path(model_file).read_bytes())
    return digest.hexdigest()


@cache
def machine() -> str:
    """torch, its Python, and the processor with its instruction sets: libraries are made for exactly this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    except OSError:
        processor = platform.processor()
    return "\n".join((torch.__version__, platform.python_version(), platform.machine(), processor))
