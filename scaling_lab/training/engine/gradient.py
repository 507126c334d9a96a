"""Owns the gradient of one micro-batch as a function of one flat parameter vector, and the loss that it is of.

Over a large vocabulary the logits are the largest tensors of a step. There the head's forward and backward run chunk by
chunk of the tokens: a chunk's logits live only until their gradient is taken, and the float32 logits of a whole batch
never exist (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989).
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

GradientOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per token, in float32 whatever the logits are."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


def make_gradient(model: nn.Module, layout: FlatLayout, spec: RunSpec, sequences: int) -> GradientOf:
    """The function (flat (n,), starts (sequences,), tokens) -> (mean gradient (n,) float32, mean loss in nats).

    Pure tensor arithmetic without branches: it compiles, and `torch.func.vmap` makes one of a stack of it.
    """
    offsets = torch.arange(spec.shape.context + 1, device=next(model.parameters()).device)
    chunks = loss_chunks(sequences * spec.shape.context, spec.shape.vocab_size)
    in_parts = chunks > 1 and can_be_chunked(model)
    of_parameters = chunked_gradient(model, spec, chunks) if in_parts else whole_gradient(model, spec)

    def gradient(flat: Tensor, starts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        window = tokens[starts[:, None] + offsets].long()
        gradients, loss = of_parameters(layout.views(flat), window[:, :-1], window[:, 1:])
        return layout.flatten(gradients).float(), loss

    return gradient


def whole_gradient(model: nn.Module, spec: RunSpec) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """(parameters by name, inputs (B, T), targets (B, T)) -> (their gradients, loss), all logits at once."""
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
    """As `whole_gradient`, the logits of one of `chunks` parts of the tokens at a time."""
    head_names = head_parameters(model, spec)
    buffers = dict(model.named_buffers())
    hidden_part, logits_part = Part(model, "hidden"), Part(model, "logits")

    def call(part: Part, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in {**parameters, **buffers}.items()}
        with autocast(x, spec):
            out: Tensor = torch.func.functional_call(part, named, (x,))
        return out

    def gradient_and_loss(
        parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        # Without auxiliary outputs it returns two values; its stub says otherwise.
        hidden, pull_back = torch.func.vjp(  # type: ignore[misc]
            lambda p: call(hidden_part, p, inputs), parameters
        )

        def share(rows: Tensor, head: dict[str, Tensor], goals: Tensor) -> Tensor:
            return token_loss(call(logits_part, head, rows), goals, reduction="sum") / targets.numel()

        share_gradient: Any = torch.func.grad_and_value(share, argnums=(0, 1))
        head = {name: parameters[name] for name in head_names}
        of_head = {name: torch.zeros_like(value) for name, value in head.items()}
        loss, of_hidden = torch.zeros((), device=hidden.device), []
        size = math.ceil(targets.numel() / chunks)
        for rows, goals in zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True):
            (of_rows, of_part), value = share_gradient(rows, head, goals)
            loss = loss + value
            of_hidden.append(of_rows)
            of_head = {name: of_head[name] + of_part[name] for name in head_names}
        (gradients,) = pull_back(torch.cat(of_hidden).view_as(hidden))
        return {name: g + of_head[name] if name in of_head else g for name, g in gradients.items()}, loss

    return gradient_and_loss


class WithLoss(nn.Module):
    """A model and its mean loss as one module, for autograd as it is (`sharded.py`): (inputs (B, T), targets (B, T)) -> loss;
    without targets the logits.

    Over a large vocabulary a chunk's logits are computed again in the backward pass rather than kept: the head's forward
    twice is what it costs.
    """

    def __init__(self, model: nn.Module, spec: RunSpec) -> None:
        super().__init__()
        self.model, self._vocab_size = model, spec.shape.vocab_size

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not can_be_chunked(self.model):
            logits: Tensor = self.model(inputs)
            return logits if targets is None else token_loss(logits, targets)
        chunks = loss_chunks(targets.numel(), self._vocab_size)
        if chunks == 1:
            return token_loss(self.model(inputs), targets)
        hidden: Tensor = self.model.hidden(inputs)  # type: ignore[operator]
        size = math.ceil(targets.numel() / chunks)
        parts = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
        sums = [
            checkpoint(self._sum, rows, goals, use_reentrant=False, preserve_rng_state=False)
            for rows, goals in parts
        ]
        return torch.stack(sums).sum() / targets.numel()

    def _sum(self, rows: Tensor, goals: Tensor) -> Tensor:
        return token_loss(self.model.logits(rows), goals, reduction="sum")  # type: ignore[operator]


def can_be_chunked(model: nn.Module) -> bool:
    """Whether the family has the two parts; one without is trained all the same, its logits at once."""
    return hasattr(model, "hidden") and hasattr(model, "logits")


class Part(nn.Module):
    """One method of a model as a module of its own, for `functional_call`."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.model, self.method)(x)
        return out


def head_parameters(model: nn.Module, spec: RunSpec) -> tuple[str, ...]:
    """Names of the parameters that turn hidden states into logits: found by asking autograd, as families differ."""
    named = dict(model.named_parameters())
    first = next(iter(named.values()))
    logits = model.logits(torch.zeros(1, spec.shape.width, device=first.device, dtype=first.dtype))  # type: ignore[operator]
    found = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(named, found, strict=True) if gradient is not None)


def autocast(like: Tensor, spec: RunSpec) -> torch.autocast:
    """The run's precision: bfloat16 products under bfloat16, as they are under float32 and tf32.

    A bfloat16 copy of the weights instead was as fast and no nearer to float32 (scripts/bench_bf16.py, results/bench_bf16.txt).
    """
    return torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=spec.dtype == "bfloat16")
