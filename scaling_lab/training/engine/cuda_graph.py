"""The step as a CUDA graph: gather, forward, backward, clipping and update are launched by one call.

A tiny model's step is dozens of kernels of a few microseconds each; launching them one by one would take longer than
running them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from scaling_lab.planning.memory import BLOCK_STEPS
from scaling_lab.training.engine.memory import is_out_of_memory

log = logging.getLogger(__name__)

# PyTorch's advice for capturing: run the work a few times first, on a side stream.
WARM_UP_STEPS = 3


class BlockGraph:
    """A step captured on fixed buffers that hold the inputs of `BLOCK_STEPS` steps; longer blocks are split.

    Each replay reads the next row of the buffers, by a counter on the device. `state` are the tensors that the step changes
    in place: they are restored after the warm-up, so that the graph starts where the eager step would. If capturing fails
    (a kernel that waits for the device), steps are launched one by one: the same kernels, but slower.
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
        self._metrics: Tensor
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
                metrics = self._step(self._starts[0], self._controls[0])
            self._metrics = metrics.new_zeros((BLOCK_STEPS, *metrics.shape))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A feed's thread may be pinning the next chunk: only the work of this thread is captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run_next_step()
        self._graph = graph

    def _run_next_step(self) -> None:
        """The captured work: the step on the row given by the counter, and incrementing the counter."""
        starts = self._starts.index_select(0, self._next).squeeze(0)
        controls = self._controls.index_select(0, self._next).squeeze(0)
        self._metrics.index_copy_(0, self._next, self._step(starts, controls).unsqueeze(0))
        self._next.add_(1)

    def run(self, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps; see `TrainStep.run`."""
        if self._graph is None:
            return torch.stack([self._step(starts[i], controls[i]) for i in range(len(starts))])
        metrics = []
        for first in range(0, len(starts), BLOCK_STEPS):
            part, rates = starts[first : first + BLOCK_STEPS], controls[first : first + BLOCK_STEPS]
            self._starts[: len(part)].copy_(part)
            self._controls[: len(part)].copy_(rates)
            self._next.zero_()
            for _ in range(len(part)):
                self._graph.replay()
            metrics.append(self._metrics[: len(part)].clone())
        return torch.cat(metrics)
