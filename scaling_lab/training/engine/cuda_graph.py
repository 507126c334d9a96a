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

Step = Callable[[Tensor, Tensor], Tensor]

# PyTorch's advice for capturing: run the work a few times first, on a side stream.
WARM_UP_STEPS = 3


class BlockGraph:
    """A step captured on fixed buffers that hold the inputs of `BLOCK_STEPS` steps; longer blocks are split.

    Each replay reads the next row of the buffers, by a counter on the device. `state` are the tensors that the step changes
    in place: they are restored after the warm-up, so that the graph starts where the eager step would. If capturing fails
    (a kernel that waits for the device), steps are launched one by one: the same kernels, but slower.

    The step is not kept: it owns the graph, and a reference back would keep a finished run's memory until the next garbage
    collection.
    """

    def __init__(
        self,
        step: Step,
        state: dict[str, Tensor],
        starts: Tensor,
        controls: Tensor,
    ) -> None:
        self._starts = starts.new_zeros((BLOCK_STEPS, *starts.shape))
        self._controls = controls.new_zeros((BLOCK_STEPS, *controls.shape))
        self._next = torch.zeros(1, dtype=torch.int64, device=starts.device)
        self._rows = torch.arange(BLOCK_STEPS, device=starts.device)
        self._starts.copy_(starts.expand_as(self._starts))
        self._controls.copy_(controls.expand_as(self._controls))
        self._metrics: Tensor
        self._graph: torch.cuda.CUDAGraph | None = None
        # On the host: a copy on the device would be the peak of its memory.
        before = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        stream = torch.cuda.current_stream()
        try:
            self._graph = self._capture(step)
        except RuntimeError as error:
            # Where a capture fails, torch leaves the stream of the capture current.
            torch.cuda.set_stream(stream)
            if is_out_of_memory(error):
                raise
            torch.cuda.synchronize()
            log.warning(
                "no CUDA graph (%s): steps are launched one by one.", " ".join(str(error).split())[:200]
            )
        for name, tensor in state.items():
            tensor.copy_(before[name])

    def _capture(self, step: Step) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                metrics = step(self._starts[0], self._controls[0])
            self._metrics = metrics.new_zeros((BLOCK_STEPS, *metrics.shape))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # A feed's thread may be pinning the next chunk: only the work of this thread is captured.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run_next_step(step)
        return graph

    def _run_next_step(self, step: Step) -> None:
        """The captured work: the step on the row given by the counter, and incrementing the counter."""
        starts = self._starts.index_select(0, self._next).squeeze(0)
        controls = self._controls.index_select(0, self._next).squeeze(0)
        metrics = step(starts, controls)
        # Not `index_copy_`, which sorts its indices under deterministic algorithms.
        here = (self._rows == self._next).view(-1, *[1] * metrics.ndim)
        self._metrics.copy_(torch.where(here, metrics, self._metrics))
        self._next.add_(1)

    def run(self, step: Step, starts: Tensor, controls: Tensor) -> Tensor:
        """A block of steps, of the same `step`; see `TrainStep.run`."""
        if self._graph is None:
            return torch.stack([step(starts[i], controls[i]) for i in range(len(starts))])
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
