"""Evaluation losses on fixed sets, the same for all model sizes, and the standard error of their mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaling_lab.core.errors import UserError
from scaling_lab.core.evaluation import EvalSpec
from scaling_lab.core.sources.generation.documents import floor_nats, has_known_probabilities
from scaling_lab.core.spec import RunSpec
from scaling_lab.planning.memory import LOGITS_AT_ONCE
from scaling_lab.training.data.order import n_windows
from scaling_lab.training.engine.gradient import token_loss

# Maximum tokens per forward pass, enough to be efficient. With a large vocabulary the size of the logits is the limit.
EVAL_BATCH_TOKENS = 8_192
# Neighboring windows come from the same document, so their losses are correlated; means over this many contiguous
# stretches of the validation split are nearly independent (the method of batch means).
SEM_BLOCKS = 32


@dataclass(frozen=True)
class EvaluationResult:
    """Losses and scores on all evaluation sets at one step."""

    loss_nats: float
    """Mean over the validation set, nats per token."""
    sem_nats: float | None
    others: dict[str, float] = field(default_factory=dict)
    """Loss on the other sets by name, and scores on the validation set; scores on another set as NAME.SCORE."""


class EvaluationSuite:
    """The validation set of a run, its other evaluation sets (`eval.sets`), and the loss floor if it is known."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        context = spec.shape.context
        self.main = ValidationSet(spec.data, context, spec.eval, device)
        self.others = {s.name: ValidationSet(s.source, context, spec.eval, device) for s in spec.eval.sets}
        self.floor_nats = self.main.floor_nats()

    def set(self, name: str | None) -> ValidationSet:
        """The validation set (None), or another set by name."""
        return self.main if name is None else self.others[name]

    def evaluate(
        self,
        mean_loss: Callable[[str | None], tuple[float, float | None]],
        scores: Callable[[ValidationSet], dict[str, float]],
    ) -> EvaluationResult:
        """Evaluate all sets: `mean_loss` gives the mean loss on a set by name, with its standard error, and `scores` other
        metrics of a set."""
        others = scores(self.main)
        for name, other in self.others.items():
            others[name] = mean_loss(name)[0]
            others |= {f"{name}.{score}": value for score, value in scores(other).items()}
        return EvaluationResult(*mean_loss(None), others)


class ValidationSet:
    """Windows of a source's validation split; they depend only on the source and the `EvalSpec`."""

    def __init__(self, source: Any, context: int, spec: EvalSpec, device: torch.device) -> None:
        self._source = source
        windows = validation_windows(source, context, spec.tokens)
        self._windows = torch.from_numpy(windows.astype(np.int64)).to(device)
        self.n_tokens = len(windows) * context

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
        """The windows in chunks, one per forward pass."""
        rows = max(1, min(EVAL_BATCH_TOKENS, LOGITS_AT_ONCE // vocab_size) // (self._windows.shape[1] - 1))
        return [slice(start, start + rows) for start in range(0, len(self._windows), rows)]

    @torch.no_grad()
    def window_losses(self, forward: Callable[[Tensor], Tensor], rows: slice, dtype: str) -> Tensor:
        """Mean loss on each of these windows, nats per token; `forward` maps tokens to logits."""
        window = self._windows[rows]
        with torch.autocast(window.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(window[:, :-1])
        losses = token_loss(logits, window[:, 1:], reduction="none")
        return losses.view(len(window), -1).mean(1)

    @staticmethod
    def summary(window_losses: Tensor) -> tuple[float, float | None]:
        """(mean loss, standard error of the mean) from the losses on all windows, in order."""
        per_window = window_losses.cpu().double().numpy()
        return float(per_window.mean()), standard_error(per_window)

    def floor_nats(self) -> float | None:
        """Mean true -ln p of these windows, nats per token: the loss of an oracle. None if it is unknown."""
        if not has_known_probabilities(self._source):
            return None
        return float(floor_nats(self._source, self._windows.cpu().numpy()).mean())

    @torch.no_grad()
    def fact_scores(
        self, model: nn.Module, parameters: dict[str, Tensor], *, dtype: str, vocab_size: int
    ) -> dict[str, float]:
        """How well the model knows the values of facts, for sources with `value_positions`: the share of values whose tokens
        are all the model's first choice, and the loss per token of a value, nats. The first shows emergence, the second
        does not (Schaeffer et al. 2023, arXiv 2304.15004)."""
        if not hasattr(self._source, "value_positions"):
            return {}
        places = torch.from_numpy(self._source.value_positions(self._windows.shape[1])).to(
            self._windows.device
        )
        if not places.numel():
            return {}
        right, losses = [], []
        for rows in self.chunks(vocab_size):
            window = self._windows[rows]
            targets = window[:, 1:]
            with torch.autocast(window.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = torch.func.functional_call(model, parameters, (window[:, :-1],))
            first_choice = logits.argmax(-1) == targets
            right.append(first_choice[:, places].all(-1).float().mean(1))
            each = token_loss(logits, targets, reduction="none").view(targets.shape)
            losses.append(each[:, places].mean((1, 2)))
        return {
            "exact_match": float(torch.cat(right).double().mean()),
            "value_loss_nats": float(torch.cat(losses).double().mean()),
        }


def validation_windows(source: Any, context: int, tokens: int) -> NDArray[np.integer]:
    """Windows of about `tokens` tokens in total, (n, context + 1): spread evenly over a text's validation split, or the first
    validation documents of a generated source. Raises `UserError` if the split is shorter than one window."""
    wanted = max(1, tokens // context)
    if hasattr(source, "documents"):
        documents: NDArray[np.integer] = source.documents("validation", np.arange(wanted), context + 1)
        return documents
    text = source.tokens("validation")
    available = n_windows(text.size, context)
    if available < 1:
        raise UserError(
            f"data={source.kind}: the validation split has {text.size} tokens, less than one window of "
            f"model.context={context} and a target."
        )
    count = min(available, wanted)
    starts = (np.arange(count, dtype=np.int64) * available // count) * context
    return np.asarray(text[starts[:, None] + np.arange(context + 1)])


def standard_error(per_window: NDArray[np.float64]) -> float | None:
    """Standard error of the mean, by batch means over contiguous stretches; None for fewer than two windows."""
    if per_window.size < 2:
        return None
    blocks = np.array_split(per_window, min(SEM_BLOCKS, per_window.size))
    means = np.array([block.mean() for block in blocks])
    return float(means.std(ddof=1) / math.sqrt(means.size))


def evaluation_steps(spec: RunSpec) -> tuple[int, ...]:
    """Steps (counted from 1) after which the run is evaluated: the last, and before it steps that are sqrt(2) apart.

    There are at most `eval.points`, and they cost at most `eval.max_cost_fraction` of the training FLOPs: a forward pass
    costs a third of a training step. The last step and those whose checkpoint is kept are always included.
    """
    cost_tokens = spec.eval.tokens / 3 * (1 + len(spec.eval.sets))
    affordable = int(spec.eval.max_cost_fraction * spec.train_tokens / cost_tokens)
    points = max(1, min(spec.eval.points, affordable))
    steps = {max(1, round(spec.steps * 2 ** (-i / 2))) for i in range(points)} | set(spec.keep_steps)
    return tuple(sorted(step for step in steps if step > spec.parent_step))
