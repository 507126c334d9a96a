"""Owns one optimisation step: gather, forward, backward, clip, update, as one function that can be compiled whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.train.optim import FlatLayout, adamw_update, clip_scale, group_vectors


def token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats per token, in float32 whatever the logits are."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


class TrainStep:
    """A model's parameters and optimiser state as flat vectors, and the step that updates them.

    `__call__(starts, controls)` trains on the windows of `tokens` that begin at `starts` (batch,) and returns the mean
    loss before the update, a scalar tensor on the device (nothing is read back). `controls`: see `adamw_update`.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, spec: RunSpec, execution: Execution) -> None:
        self.model = model
        self.tokens = tokens
        self.layout = layout = FlatLayout.of(model)
        self.flat = layout.flatten({name: p.detach() for name, p in model.named_parameters()}).clone()
        self.first_moment = torch.zeros_like(self.flat)
        self.second_moment = torch.zeros_like(self.flat)
        self.buffers = buffers = dict(model.named_buffers())
        groups = group_vectors(layout, spec.optimizer, spec.parametrization, spec.shape).to(self.flat.device)
        offsets = torch.arange(spec.shape.context + 1, device=tokens.device)
        device_type, autocast = tokens.device.type, spec.dtype == "bfloat16"

        def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=autocast):
                logits = torch.func.functional_call(model, (parameters, buffers), (inputs,))
            return token_loss(logits, targets)

        gradient_and_loss = torch.func.grad_and_value(loss_of)

        def step(
            starts: Tensor, controls: Tensor, flat: Tensor, first: Tensor, second: Tensor, data: Tensor
        ) -> Tensor:
            window = data[starts[:, None] + offsets].long()
            gradients, loss = gradient_and_loss(layout.views(flat), window[:, :-1], window[:, 1:])
            gradient = layout.flatten(gradients).float()
            scale, _ = clip_scale(gradient, spec.optimizer.clip_norm)
            adamw_update(flat, gradient * scale, first, second, groups, spec.optimizer, controls)
            return loss

        self._step = torch.compile(step, dynamic=False) if execution.compile else step

    def __call__(self, starts: Tensor, controls: Tensor) -> Tensor:
        loss: Tensor = self._step(
            starts, controls, self.flat, self.first_moment, self.second_moment, self.tokens
        )
        return loss

    def parameters(self) -> dict[str, Tensor]:
        """The current parameters by name, views of the flat vector."""
        return self.layout.views(self.flat)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; the tensors themselves, not copies."""
        return {"flat": self.flat, "first_moment": self.first_moment, "second_moment": self.second_moment}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state, in place. Raises ValueError for tensors of another size."""
        for name, mine in self.state().items():
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"{name} has {tuple(state[name].shape)} elements, this model {tuple(mine.shape)}"
                )
            mine.copy_(state[name])
