"""The loss over a large vocabulary and its gradient, chunk by chunk, as one operation whatever the number of chunks.

The logits of a whole batch would be the largest tensors of a step. Here the head's forward and backward run on one chunk of
the tokens at a time, and a chunk's logits live only until their gradient is computed (the idea of Liger Kernel's fused linear
cross-entropy, Hsu et al. 2024, arXiv 2410.10989). One chunk is traced once; the operation, opaque to tracers, calls it in a loop.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# (rows (n, width), targets (n,), total (), *head) -> [loss (), gradient of the rows, *gradients of the head]: the summed
# cross-entropy over `total`.
ChunkProgram = Callable[..., list[Tensor]]
# (rows (n, width), head parameters, targets (n,)) -> their summed cross-entropy ()
SumLoss = Callable[[Tensor, list[Tensor], Tensor], Tensor]

HEADS: dict[str, ChunkedHead] = {}


class ChunkedHead:
    """The programs of a model's last part, from hidden states to the loss, for chunks of up to `rows` tokens."""

    def __init__(self, rows: int, compiled: bool) -> None:
        self._rows, self._compiled = rows, compiled
        self._programs: dict[int, ChunkProgram] = {}

    def prepare(self, sum_loss: SumLoss, hidden: Tensor, head: Sequence[Tensor], tokens: int) -> None:
        """Trace the chunks of `tokens` tokens; `hidden` and `head` are examples of the inputs."""
        size = self.chunk_size(tokens)
        # A last chunk that is smaller is not worth another compilation.
        for rows, compiled in ((size, self._compiled), (tokens % size, False)):
            if rows and rows not in self._programs:
                program = trace_chunk(sum_loss, hidden, head, rows)
                self._programs[rows] = torch.compile(program, dynamic=False) if compiled else program

    def chunk_size(self, tokens: int) -> int:
        """Tokens of each chunk but the last: as many as `rows`, or fewer so that the last one is not much smaller."""
        return math.ceil(tokens / math.ceil(tokens / self._rows))

    def gradient(self, hidden: Tensor, targets: Tensor, head: Sequence[Tensor]) -> list[Tensor]:
        """See `loss_and_gradient`, for one member: hidden (tokens, width), targets (tokens,)."""
        tokens = len(targets)
        total = torch.full((), tokens, dtype=torch.float32, device=hidden.device)
        loss, rows_gradient = torch.zeros_like(total), hidden.new_empty(hidden.shape)
        head_gradient = [torch.zeros_like(value) for value in head]
        size = self.chunk_size(tokens)
        for first in range(0, tokens, size):
            chunk = slice(first, first + size)
            rows = hidden[chunk]
            value, rows_gradient[chunk], *parts = self._programs[len(rows)](
                rows, targets[chunk], total, *head
            )
            loss += value
            for whole, part in zip(head_gradient, parts, strict=True):
                whole += part
        return [loss, rows_gradient, *head_gradient]


def trace_chunk(sum_loss: SumLoss, hidden: Tensor, head: Sequence[Tensor], rows: int) -> ChunkProgram:
    """The loss of `rows` tokens with its gradient, as plain operators: an operation's body cannot differentiate."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def chunk_loss(rows: Tensor, head: list[Tensor], targets: Tensor, total: Tensor) -> Tensor:
        return sum_loss(rows, head, targets) / total

    gradient: Any = torch.func.grad_and_value(chunk_loss, argnums=(0, 1))

    def chunk(rows: Tensor, targets: Tensor, total: Tensor, *head: Tensor) -> list[Tensor]:
        (rows_gradient, parts), value = gradient(rows, list(head), targets, total)
        return [value, rows_gradient, *parts]

    with FakeTensorMode(allow_non_fake_inputs=True):

        def like(t: Tensor, shape: Sequence[int]) -> Tensor:
            return torch.empty(shape, dtype=t.dtype, device=t.device)

        total = torch.ones((), device=hidden.device)
        targets = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        example = (like(hidden, (rows, hidden.shape[-1])), targets, total, *(like(h, h.shape) for h in head))
        traced: ChunkProgram = make_fx(chunk)(*example)
    return traced


def chunked_head(identity: tuple[Any, ...], rows: int, compiled: bool) -> tuple[str, ChunkedHead]:
    """The head of this identity and its name for `loss_and_gradient`. The name is the same in every process, so that programs
    that contain it are found in the compiler's cache."""
    name = hashlib.sha256(repr((*identity, rows, compiled)).encode()).hexdigest()[:16]
    return name, HEADS.setdefault(name, ChunkedHead(rows, compiled))


# torch 2.6 infers no schema from `list[Tensor]`.
SCHEMA = "(Tensor hidden, Tensor targets, Tensor[] head, str name) -> Tensor[]"


@torch.library.custom_op("scaling_lab::loss_and_gradient", mutates_args=(), schema=SCHEMA)
def loss_and_gradient(hidden: Tensor, targets: Tensor, head: list[Tensor], name: str) -> list[Tensor]:
    """Mean losses of M members (M,), the gradients of their hidden states, and those of their head parameters.

    hidden (M, tokens, width), targets (M, tokens), head: parameters (M, ...). The members are computed one after the other, so
    that there are the logits of one chunk of one member at a time.
    """
    return loss_and_gradient_of(hidden, targets, head, name)


def loss_and_gradient_of(hidden: Tensor, targets: Tensor, head: list[Tensor], name: str) -> list[Tensor]:
    members = [
        HEADS[name].gradient(hidden[k], targets[k], [value[k] for value in head]) for k in range(len(hidden))
    ]
    if len(members) == 1:
        return [output[None] for output in members[0]]
    return [torch.stack(outputs) for outputs in zip(*members, strict=True)]


@loss_and_gradient.register_fake
def _(hidden: Tensor, targets: Tensor, head: list[Tensor], name: str) -> list[Tensor]:
    loss = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    return [loss, hidden.new_empty(hidden.shape), *(value.new_empty(value.shape) for value in head)]


@loss_and_gradient.register_vmap
def _(info: Any, dims: Any, hidden: Tensor, targets: Tensor, head: list[Tensor], name: str) -> Any:
    def folded(value: Tensor, dim: int | None) -> Tensor:
        each = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        return each.flatten(0, 1)

    values = [folded(value, dim) for value, dim in zip(head, dims[2], strict=True)]
    outputs = loss_and_gradient(folded(hidden, dims[0]), folded(targets, dims[1]), values, name)
    return [output.unflatten(0, (info.batch_size, -1)) for output in outputs], [0] * len(outputs)
