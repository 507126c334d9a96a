"""Owns the validation loss: a fixed set, the same for every size, and the standard error of its mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaling_lab.core.spec import EvalSpec, RunSpec
from scaling_lab.plan.memory import LOGITS_AT_ONCE
from scaling_lab.train.gradient import token_loss
from scaling_lab.train.order import n_windows

# Tokens per forward pass at most: enough to be efficient. Over a large vocabulary fewer, by the size of their logits.
EVAL_BATCH_TOKENS = 8_192
# Neighbouring windows come from the same document, so their losses are correlated; means over this many contiguous
# stretches of the validation split are nearly independent (the method of batch means).
SEM_BLOCKS = 32


class ValidationSet:
    """Windows spread evenly over the validation split; which ones depends on the data and `EvalSpec` alone."""

    def __init__(
        self, tokens: NDArray[np.integer], context: int, spec: EvalSpec, device: torch.device
    ) -> None:
        available = n_windows(tokens.size, context)
        if available < 1:
            raise ValueError(
                f"the validation split has {tokens.size} tokens: less than one window of {context}"
            )
        count = min(available, max(1, spec.tokens // context))
        starts = (np.arange(count, dtype=np.int64) * available // count) * context
        windows = np.asarray(tokens)[starts[:, None] + np.arange(context + 1)]
        self._windows = torch.from_numpy(windows.astype(np.int64)).to(device)
        self.n_tokens = count * context

    @torch.no_grad()
    def loss(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        *,
        dtype: str = "float32",
        vocab_size: int = 256,
    ) -> tuple[float, float | None]:
        """(mean loss, standard error of the mean), nats per token."""

        def forward(tokens: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(model, parameters, (tokens,))
            return logits

        means = [self.window_losses(forward, rows, dtype) for rows in self.chunks(vocab_size)]
        return self.summary(torch.cat(means))

    def chunks(self, vocab_size: int) -> list[slice]:
        """The windows in parts that are computed at once."""
        rows = max(1, min(EVAL_BATCH_TOKENS, LOGITS_AT_ONCE // vocab_size) // (self._windows.shape[1] - 1))
        return [slice(start, start + rows) for start in range(0, len(self._windows), rows)]

    @torch.no_grad()
    def window_losses(self, forward: Callable[[Tensor], Tensor], rows: slice, dtype: str) -> Tensor:
        """Mean loss of each of these windows, nats per token; `forward` makes logits of tokens."""
        window = self._windows[rows]
        with torch.autocast(window.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(window[:, :-1])
        losses = token_loss(logits, window[:, 1:], reduction="none")
        return losses.view(len(window), -1).mean(1)

    @staticmethod
    def summary(window_losses: Tensor) -> tuple[float, float | None]:
        """(mean loss, standard error of the mean) of the losses of all windows, in order."""
        per_window = window_losses.cpu().double().numpy()
        return float(per_window.mean()), standard_error(per_window)


def standard_error(per_window: NDArray[np.float64]) -> float | None:
    """Standard error of the mean by batch means over contiguous stretches; None with fewer than two windows."""
    if per_window.size < 2:
        return None
    blocks = np.array_split(per_window, min(SEM_BLOCKS, per_window.size))
    means = np.array([block.mean() for block in blocks])
    return float(means.std(ddof=1) / math.sqrt(means.size))


def evaluation_steps(spec: RunSpec) -> tuple[int, ...]:
    """Steps (counted from 1) after which the validation set is visited: the last, and before it factors of sqrt(2).

    At most `eval.points`, and no more visits than cost `eval.max_cost_fraction` of the training FLOPs: a forward pass
    costs a third of a training step. The last step is always visited, and so are those whose checkpoint is kept.
    """
    visit_cost = spec.eval.tokens / 3
    affordable = int(spec.eval.max_cost_fraction * spec.train_tokens / visit_cost)
    points = max(1, min(spec.eval.points, affordable))
    visits = {max(1, round(spec.steps * 2 ** (-i / 2))) for i in range(points)} | set(spec.keep_steps)
    return tuple(sorted(step for step in visits if step > spec.parent_step))
