"""Compiled programs that all runs of a shape share: one `torch.compile` serves every batch, seed, horizon and corpus in a process.

On CUDA the compiler takes a minute for a shape. Batch and corpus have dynamic sizes, and what differs from run to run (learning
rate ratios, weight decay, clipping) is an input. A CPU keeps a program for each batch (or a library: `step_library.py`).
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from scaling_lab.training.engine.memory import is_out_of_memory

log = logging.getLogger(__name__)

# What makes results depend on a benchmark of the moment, or on which batch was compiled first: in torch from 2.10 on one switch;
# before, padding of matrix products and autotuning by name.
DETERMINISM_SWITCHES = {
    "deterministic": True,
    "shape_padding": False,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
}

PROGRAMS: dict[Any, SharedProgram] = {}


def shares_programs(device: torch.device) -> bool:
    return device.type == "cuda"


def determinism_switches() -> dict[str, Any]:
    """Inductor's switches for this process, as far as this version of torch has them; none if nothing must be deterministic."""
    if not torch.are_deterministic_algorithms_enabled():
        return {}
    from torch._inductor import config

    return {name: value for name, value in DETERMINISM_SWITCHES.items() if hasattr(config, name)}


class SharedProgram:
    """A compiled function of (*inputs, *settings). `dynamic`: the positions of the inputs whose first dimension varies."""

    def __init__(self, function: Callable[..., Tensor], dynamic: Sequence[int]) -> None:
        self._function, self._dynamic = function, dynamic
        self._compiled: Callable[..., Tensor] | None = torch.compile(with_own_code(function))
        self._fixed: dict[tuple[int, ...], Callable[..., Tensor]] = {}

    def __call__(self, settings: tuple[Any, ...], *inputs: Tensor) -> Tensor:
        from torch._inductor import config

        with config.patch(determinism_switches()):
            if self._compiled is not None:
                try:
                    with self._quiet():
                        return self._compiled(*self._marked(inputs), *settings)
                # Errors of the compiler come before the program has changed anything.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    reason = str(error).strip().partition("\n")[0]
                    log.warning("this step is compiled for each batch size: %s", reason)
                    self._compiled = None
            return self._for_these_sizes(inputs)(*inputs, *settings)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without torch's own pages about a size that it made a constant: one line says it."""
        logger = logging.getLogger("torch._guards")
        before, logger.disabled = logger.disabled, True
        try:
            yield
        finally:
            logger.disabled = before

    def _marked(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        marked = list(inputs)
        for position in self._dynamic:
            # The compiler treats a size of 1 as a constant.
            if len(inputs[position]) > 1:
                marked[position] = inputs[position].detach()  # a mark stays with its tensor
                torch._dynamo.mark_dynamic(marked[position], 0)
        return marked

    def _for_these_sizes(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        sizes = tuple(len(inputs[position]) for position in self._dynamic)
        if sizes not in self._fixed:
            self._fixed[sizes] = torch.compile(with_own_code(self._function), dynamic=False)
        return self._fixed[sizes]


def shared_program(
    key: Any, function: Callable[..., Tensor], settings: tuple[Any, ...], dynamic: Sequence[int]
) -> Callable[..., Tensor]:
    """`function(*inputs, *settings)` as a compiled function of the inputs: the program of this key and the function's name, made
    if there is none. The program keeps the `function` that came first: it must hold no tensor of a run, and `key` everything
    that it depends on.
    """
    key = (key, function.__name__)
    if key not in PROGRAMS:
        PROGRAMS[key] = SharedProgram(function, dynamic)
    return partial(PROGRAMS[key], settings)


def as_tensors(settings: Any, device: torch.device) -> Any:
    """The settings with a tensor (1,) for each number: the compiler makes constants of numbers, and a program for each value."""
    return tree_map_only(float, lambda value: torch.tensor([value], device=device), settings)


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own. Dynamo counts programs by code object, stops compiling at 8 and computes
    later ones eagerly without a word; all steps are made by the same few lines."""
    if not isinstance(function, types.FunctionType):
        return function
    clone = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters take no memory: for programs that get the parameters as inputs."""
    empty = {
        id(p): nn.Parameter(torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape))
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)
