"""The loss, and the gradient of one micro-batch as a function of one flat parameter vector.

With a large vocabulary the logits are the largest tensors of a step. In that case the head's forward and backward run on
one chunk of the tokens at a time: a chunk's logits live only until their gradient is computed, and the float32 logits of a
whole batch never exist (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaling_lab.core.spec import RunSpec
from scaling_lab.planning.memory import loss_chunks
from scaling_lab.training.engine.optimizer import FlatLayout

GradientFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per token, computed in float32 whatever the dtype of the logits."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


def make_gradient(model: nn.Module, layout: FlatLayout, spec: RunSpec, sequences: int) -> GradientFunction:
    """The function (flat (n,), starts (sequences,), tokens) -> (mean gradient (n,) float32, mean loss in nats).

    Pure tensor arithmetic without branches: it compiles, and `torch.func.vmap` extends it to a stack of runs.
    """
    offsets = torch.arange(spec.shape.context + 1, device=next(model.parameters()).device)
    chunks = loss_chunks(sequences * spec.shape.context, spec.shape.vocab_size)
    chunked = chunks > 1 and supports_chunks(model)
    parameter_gradient = chunked_gradient(model, spec, chunks) if chunked else whole_gradient(model, spec)

    def gradient(flat: Tensor, starts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        window = tokens[starts[:, None] + offsets].long()
        gradients, loss = parameter_gradient(layout.views(flat), window[:, :-1], window[:, 1:])
        return layout.flatten(gradients).float(), loss

    return gradient


def whole_gradient(model: nn.Module, spec: RunSpec) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """(parameters by name, inputs (B, T), targets (B, T)) -> (their gradients, loss), with all logits at once."""
    buffers = dict(model.named_buffers())

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(inputs, spec):
            logits = torch.func.functional_call(model, (parameters, buffers), (inputs,))
        return token_loss(logits, targets)

    gradient_and_loss: Callable[..., Any] = torch.func.grad_and_value(loss_of)
    return gradient_and_loss


def chunked_gradient(
    model: nn.Module, spec: RunSpec, chunks: int
) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """Like `whole_gradient`, with the tokens in `chunks` parts and the logits of one part at a time."""
    head_names = head_parameters(model, spec)
    buffers = dict(model.named_buffers())
    hidden_module, logits_module = MethodModule(model, "hidden"), MethodModule(model, "logits")

    def call(module: MethodModule, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in {**parameters, **buffers}.items()}
        with autocast(x, spec):
            out: Tensor = torch.func.functional_call(module, named, (x,))
        return out

    def gradient_and_loss(
        parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        # Without auxiliary outputs vjp returns two values; its stub says otherwise.
        hidden, pull_back = torch.func.vjp(  # type: ignore[misc]
            lambda p: call(hidden_module, p, inputs), parameters
        )

        def chunk_loss(rows: Tensor, head: dict[str, Tensor], row_targets: Tensor) -> Tensor:
            logits = call(logits_module, head, rows)
            return token_loss(logits, row_targets, reduction="sum") / targets.numel()

        chunk_gradient: Any = torch.func.grad_and_value(chunk_loss, argnums=(0, 1))
        head = {name: parameters[name] for name in head_names}
        head_gradient = {name: torch.zeros_like(value) for name, value in head.items()}
        loss, hidden_gradients = torch.zeros((), device=hidden.device), []
        size = math.ceil(targets.numel() / chunks)
        pieces = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
        for rows, row_targets in pieces:
            (rows_gradient, part), value = chunk_gradient(rows, head, row_targets)
            loss = loss + value
            hidden_gradients.append(rows_gradient)
            head_gradient = {name: head_gradient[name] + part[name] for name in head_names}
        (gradients,) = pull_back(torch.cat(hidden_gradients).view_as(hidden))
        gradients = {n: g + head_gradient[n] if n in head_gradient else g for n, g in gradients.items()}
        return gradients, loss

    return gradient_and_loss


class ModelWithLoss(nn.Module):
    """A model and its mean loss as one module, for ordinary autograd (`parallel/sharded.py`):
    (inputs (B, T), targets (B, T)) -> loss; without targets it returns the logits.

    With a large vocabulary a chunk's logits are recomputed in the backward pass rather than kept, at the cost of a second
    forward pass of the head.
    """

    def __init__(self, model: nn.Module, spec: RunSpec) -> None:
        super().__init__()
        self.model, self._vocab_size = model, spec.shape.vocab_size

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not supports_chunks(self.model):
            logits: Tensor = self.model(inputs)
            return logits if targets is None else token_loss(logits, targets)
        chunks = loss_chunks(targets.numel(), self._vocab_size)
        if chunks == 1:
            return token_loss(self.model(inputs), targets)
        hidden: Tensor = self.model.hidden(inputs)  # type: ignore[operator]
        size = math.ceil(targets.numel() / chunks)
        pieces = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
        sums = [
            checkpoint(self._sum, rows, row_targets, use_reentrant=False, preserve_rng_state=False)
            for rows, row_targets in pieces
        ]
        return torch.stack(sums).sum() / targets.numel()

    def _sum(self, rows: Tensor, row_targets: Tensor) -> Tensor:
        return token_loss(self.model.logits(rows), row_targets, reduction="sum")  # type: ignore[operator]


def supports_chunks(model: nn.Module) -> bool:
    """Whether the family has the two methods that chunks need; a family without them computes its logits at once."""
    return hasattr(model, "hidden") and hasattr(model, "logits")


class MethodModule(nn.Module):
    """One method of a model as a module of its own, for `functional_call`."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.model, self.method)(x)
        return out


def head_parameters(model: nn.Module, spec: RunSpec) -> tuple[str, ...]:
    """Names of the parameters that turn hidden states into logits. They differ by family, so autograd finds them."""
    named = dict(model.named_parameters())
    first = next(iter(named.values()))
    logits = model.logits(torch.zeros(1, spec.shape.width, device=first.device, dtype=first.dtype))  # type: ignore[operator]
    found = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(named, found, strict=True) if gradient is not None)


def autocast(like: Tensor, spec: RunSpec) -> torch.autocast:
    """The run's precision: matrix products in bfloat16 for dtype=bfloat16; no autocast for float32 and tf32.

    A bfloat16 copy of the weights was as fast and no closer to float32 (scripts/bench_bf16.py, results/benchmarks/bench_bf16.txt).
    """
    return torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=spec.dtype == "bfloat16")
