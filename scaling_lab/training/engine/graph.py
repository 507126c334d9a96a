"""Owns running a step as one CUDA graph: gather, forward, backward, clip and update are launched with one call.

A tiny model's step is dozens of kernels of a few microseconds each: launched one by one they cost more than they compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from scaling_lab.training.engine.memory import is_out_of_memory

log = logging.getLogger(__name__)

# Steps whose inputs the graph holds at once; longer blocks are run in parts.
BLOCK_STEPS = 64
# PyTorch's advice for work that is captured: let it run a few times first, on a side stream.
WARM_UP_STEPS = 3


class BlockGraph:
    """A step on fixed buffers: a replay takes the next row of the block's inputs, by a counter on the device.

    `state` is what the step changes in place; it is put back after the warm-up, so the graph begins where the eager step
    would. Where capturing fails (a kernel that waits for the device) steps run one by one: the same kernels, slower.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        state: dict[str, Tensor],
        starts: Tensor,
        controls: Tensor,
    ) -> None:
        self._step = step
        self._starts = starts.new_zeros((BLOCK_STEPS, *starts.shape))
        self._controls = controls.new_zeros((BLOCK_STEPS, *controls.shape))
        self._next = torch.zeros(1, dtype=torch.int64, device=starts.device)
        self._starts.copy_(starts.expand_as(self._starts))
        self._controls.copy_(controls.expand_as(self._controls))
        self._told: Tensor
        self._graph: torch.cuda.CUDAGraph | None = None
        before = {name: tensor.clone() for name, tensor in state.items()}
        try:
            self._capture()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            torch.cuda.synchronize()
            log.warning(
                "no CUDA graph (%s): steps are launched one by one.", " ".join(str(error).split())[:200]
            )
            self._graph = None
        for name, tensor in state.items():
            tensor.copy_(before[name])

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                told = self._step(self._starts[0], self._controls[0])
            self._told = told.new_zeros((BLOCK_STEPS, *told.shape))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A feed's thread may be pinning the next chunk: only what this thread does is part of the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._one()
        self._graph = graph

    def _one(self) -> None:
        """What is captured: the step on the row that the counter names, and the counter's advance."""
        starts = self._starts.index_select(0, self._next).squeeze(0)
        controls = self._controls.index_select(0, self._next).squeeze(0)
        self._told.index_copy_(0, self._next, self._step(starts, controls).unsqueeze(0))
        self._next.add_(1)

    def run(self, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps; see `TrainStep.run`."""
        if self._graph is None:
            return torch.stack([self._step(starts[i], controls[i]) for i in range(len(starts))])
        told = []
        for first in range(0, len(starts), BLOCK_STEPS):
            part, rates = starts[first : first + BLOCK_STEPS], controls[first : first + BLOCK_STEPS]
            self._starts[: len(part)].copy_(part)
            self._controls[: len(part)].copy_(rates)
            self._next.zero_()
            for _ in range(len(part)):
                self._graph.replay()
            told.append(self._told[: len(part)].clone())
        return torch.cat(told)
