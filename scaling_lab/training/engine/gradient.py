"""The loss, and the gradient of one micro-batch as a function of one flat parameter vector.

With a large vocabulary the head's forward and backward run on one chunk of the tokens at a time (`chunked_loss.py`).
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
from scaling_lab.planning.memory import chunk_tokens, loss_chunks
from scaling_lab.training.engine.chunked_loss import chunked_head, loss_and_gradient
from scaling_lab.training.engine.optimizer import FlatLayout

GradientFunction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per token, computed in float32 whatever the dtype of the logits."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


def make_gradient(
    model: nn.Module, layout: FlatLayout, spec: RunSpec, sequences: int, compiled: bool = False
) -> GradientFunction:
    """The function (flat (n,), starts (sequences,), tokens) -> (mean gradient (n,) float32, mean loss in nats).

    Pure tensor arithmetic without branches: it compiles, and `torch.func.vmap` extends it to a stack of runs. `compiled` is
    about what the compiler does not see: the chunks of the loss.
    """
    device = next(model.parameters()).device
    offsets = torch.arange(spec.shape.context + 1, device=device)
    tokens_at_once = sequences * spec.shape.context
    chunks = loss_chunks(tokens_at_once, spec.shape.vocab_size, device.type)
    if chunks > 1 and supports_chunks(model):
        rows = chunk_tokens(tokens_at_once, spec.shape.vocab_size, device.type)
        parameter_gradient = chunked_gradient(model, spec, tokens_at_once, rows, compiled)
    else:
        parameter_gradient = whole_gradient(model, spec)

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
    model: nn.Module, spec: RunSpec, tokens: int, rows: int, compiled: bool = False
) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """Like `whole_gradient`, for `tokens` tokens, with the logits of at most `rows` of them at a time."""
    head_names = head_parameters(model, spec)
    buffers = dict(model.named_buffers())
    hidden_module, logits_module = MethodModule(model, "hidden"), MethodModule(model, "logits")

    def call(module: MethodModule, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in {**parameters, **buffers}.items()}
        with autocast(x, spec):
            out: Tensor = torch.func.functional_call(module, named, (x,))
        return out

    def sum_loss(rows: Tensor, head: list[Tensor], targets: Tensor) -> Tensor:
        logits = call(logits_module, dict(zip(head_names, head, strict=True)), rows)
        return token_loss(logits, targets, reduction="sum")

    named: dict[str, Tensor] = dict(model.named_parameters())
    device = next(iter(named.values())).device
    identity = (type(model).__qualname__, spec.shape, spec.parametrization, spec.dtype, str(device))
    name, chunked = chunked_head(identity, rows, compiled)
    with torch.no_grad():
        example = call(hidden_module, named, torch.zeros(1, 1, dtype=torch.int64, device=device))
    chunked.prepare(sum_loss, example, [named[n].detach() for n in head_names], tokens)

    def gradient_and_loss(
        parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        # Without auxiliary outputs vjp returns two values; its stub says otherwise.
        hidden, pull_back = torch.func.vjp(  # type: ignore[misc]
            lambda p: call(hidden_module, p, inputs), parameters
        )
        head = [parameters[name][None] for name in head_names]
        loss, hidden_gradient, *parts = loss_and_gradient(
            hidden.flatten(0, 1)[None], targets.flatten()[None], head, name
        )
        (gradients,) = pull_back(hidden_gradient.view_as(hidden))
        head_gradient = {name: part[0] for name, part in zip(head_names, parts, strict=True)}
        gradients = {n: g + head_gradient[n] if n in head_gradient else g for n, g in gradients.items()}
        return gradients, loss[0]

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
        chunks = loss_chunks(targets.numel(), self._vocab_size, inputs.device.type)
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
