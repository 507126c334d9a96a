"""The gradient of a batch, summed over processes while the backward pass is still running.

Parameters and gradients are views of two flat vectors. The gradient vector is cut into buckets; as soon as a bucket's
gradients of the last micro-batch are there, its sum over the processes begins, last layers first (Li et al. 2020,
arXiv 2006.15704). torch's DistributedDataParallel does the same, but a process that fails leaves the others waiting; here it
goes on with zeros, so that all processes can use smaller micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling_lab.core.spec import RunSpec
from scaling_lab.training.engine.gradient import ModelWithLoss, autocast
from scaling_lab.training.engine.optimizer import FlatLayout
from scaling_lab.training.parallel.team import collective_guard

# As in torch's DistributedDataParallel.
BUCKET_BYTES = 25 * 2**20


class OverlappedGradient:
    """Computes the sum over all processes of a weighted mean gradient, into a flat vector."""

    def __init__(
        self,
        model: nn.Module,
        layout: FlatLayout,
        flat: Tensor,
        gradient: Tensor,
        spec: RunSpec,
        *,
        compiled: bool,
    ) -> None:
        """`gradient` has the size of `flat`, the parameters; the model's own become views of both."""
        self._spec, self._gradient = spec, gradient
        self._with_loss = ModelWithLoss(model, spec)
        self._offsets = torch.arange(spec.shape.context + 1, device=flat.device)
        self._buckets = make_buckets(layout, BUCKET_BYTES // flat.element_size())
        bucket_of = {name: k for k, bucket in enumerate(self._buckets) for name in bucket.names}
        parameters, gradients = layout.views(flat), layout.views(gradient)
        for name, parameter in model.named_parameters():
            parameter.data, parameter.grad = parameters[name], gradients[name]
            parameter.register_post_accumulate_grad_hook(partial(self._ready, bucket_of[name]))
        # Only within a step: evaluation and the noise probe call the same blocks inside torch.func.
        blocks = [m for child in model.children() if isinstance(child, nn.ModuleList) for m in child]
        self._compiled = [(block, torch.compile(block.forward)) for block in blocks] if compiled else []
        self._begin(sending=False)

    def compute(self, starts: Tensor, micro: int, tokens: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Write the sum of all processes' mean gradients, times their weights, into the gradient vector.

        Returns this process's mean loss, and the squared norm of the gradient of its first micro-batch. If this process
        fails, it sends zeros for what it has not sent yet, and the error is raised at the end.
        """
        self._gradient.zero_()
        error: Exception | None = None
        try:
            with self._compiled_blocks():
                loss, square = self._backward(starts.split(micro), tokens, weight)
        except Exception as caught:
            error = caught
            for bucket in self._buckets[self._sent if self._sending else 0 :]:
                self._gradient[bucket.first : bucket.last].zero_()
        if not self._sending:
            self._begin(sending=True)
        self._send_rest()
        if error is not None:
            raise error
        return loss, square

    def send_zeros(self) -> None:
        """Take part in the sum of a step without a share of it."""
        self._gradient.zero_()
        self._begin(sending=True)
        self._send_rest()

    def _send_rest(self) -> None:
        """Send the buckets that were not sent during the backward pass, and wait for all sums."""
        while self._sent < len(self._buckets):
            self._send()
        for handle in self._handles:
            with collective_guard():
                handle.wait()

    def _backward(self, parts: tuple[Tensor, ...], tokens: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        loss, scale = torch.zeros((), device=tokens.device), weight / len(parts)
        square = torch.zeros((), device=tokens.device)
        for k, part in enumerate(parts):
            self._begin(sending=k == len(parts) - 1)
            window = tokens[part[:, None] + self._offsets].long()
            with autocast(window, self._spec):
                part_loss: Tensor = self._with_loss(window[:, :-1], window[:, 1:])
            (part_loss * scale).backward()
            loss += part_loss.detach() / len(parts)
            if k == 0:
                square = self._square if self._sending else self._gradient.square().sum()
        return loss, square / scale**2

    def _begin(self, *, sending: bool) -> None:
        """Before a micro-batch; with `sending`, the sums over the processes begin during its backward pass."""
        self._sending, self._sent = sending, 0
        self._missing = [len(bucket.names) for bucket in self._buckets]
        self._handles: list[Any] = []
        self._square = torch.zeros((), device=self._gradient.device)

    def _ready(self, bucket: int, parameter: Tensor) -> None:
        """A parameter's gradient is there: all processes send their buckets in the same order."""
        if not self._sending:
            return
        self._missing[bucket] -= 1
        while self._sent < len(self._buckets) and self._missing[self._sent] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._sent]
        part = self._gradient[bucket.first : bucket.last]
        with torch.no_grad():
            self._square += part.square().sum()
        with collective_guard():
            self._handles.append(dist.all_reduce(part, async_op=True))
        self._sent += 1

    @contextmanager
    def _compiled_blocks(self) -> Iterator[None]:
        for block, forward in self._compiled:
            block.forward = forward
        try:
            yield
        finally:
            for block, _ in self._compiled:
                del block.forward


@dataclass(frozen=True)
class Bucket:
    """Parameters that are next to each other in the flat vector: its elements first .. last - 1."""

    first: int
    last: int
    names: tuple[str, ...]


def make_buckets(layout: FlatLayout, size: int) -> list[Bucket]:
    """Buckets of at least `size` elements but for the last one, in the order of the backward pass: from the end."""
    found: list[Bucket] = []
    last = position = sum(shape.numel() for shape in layout.shapes)
    names: list[str] = []
    for name, shape in zip(reversed(layout.names), reversed(layout.shapes), strict=True):
        names.append(name)
        position -= shape.numel()
        if last - position >= size or position == 0:
            found.append(Bucket(position, last, tuple(names)))
            last, names = position, []
    return found
