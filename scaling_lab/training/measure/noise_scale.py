"""The gradient noise scale, from the norms of micro-batches' gradients, measured at evaluations.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: E|g_b|^2 = |G|^2 + tr(S) / b for a batch size b, so two batch sizes
give the true gradient's |G|^2 and the noise tr(S). B_simple = tr(S) / |G|^2 is the batch size at which the two terms are
equal. Kaplan et al. 2020 relate it to the critical batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling_lab.core.spec import RunSpec
from scaling_lab.training.engine.attention_rules import register_attention_rules
from scaling_lab.training.engine.gradient import make_gradient
from scaling_lab.training.engine.optimizer import FlatLayout

# Micro-batches of a measurement, one sequence each. Late in training tr(S) is many times |G|^2 b: a measurement on fewer
# tokens than the noise scale itself determines |G|^2 poorly.
PROBE_SEQUENCES = 64
# Measurements that would cost more than this share of a run's training are omitted, the early ones first.
MAX_COST_FRACTION = 0.02
# The gradients of all sequences are computed at once if they have at most this many elements (64 MB).
MAX_ELEMENTS_AT_ONCE = 2**24
# A step's own micro-batches are used if there are at least this many.
MIN_STEP_PARTS = 8


@dataclass(frozen=True)
class NoiseMeasurement:
    """|G|^2 and tr(S) of one measurement; tr(S) per token. Either may be negative if the other dominates."""

    gradient_square: float
    trace_tokens: float

    @property
    def scale_tokens(self) -> float | None:
        """B_simple in tokens; None if the measurement does not determine it."""
        if not (self.gradient_square > 0 and self.trace_tokens > 0):
            return None
        return self.trace_tokens / self.gradient_square


def noise_from_norms(part_square: float, square: float, part_tokens: int, tokens: int) -> NoiseMeasurement:
    """From the mean squared norm of the parts' gradients and that of their mean (equations A.2 and A.3)."""
    return NoiseMeasurement(
        gradient_square=(tokens * square - part_tokens * part_square) / (tokens - part_tokens),
        trace_tokens=(part_square - square) / (1 / part_tokens - 1 / tokens),
    )


def measured_steps(spec: RunSpec, evaluation_steps: Sequence[int]) -> frozenset[int]:
    """The evaluation steps at which the noise is measured: the last ones, as many as the cost allows."""
    affordable = int(MAX_COST_FRACTION * spec.train_tokens / (PROBE_SEQUENCES * spec.shape.context))
    return frozenset(sorted(evaluation_steps)[-affordable:] if affordable else ())


class NoiseProbe:
    """Measures on the sequences that follow the step's batch in the data order: a pure function of parameters and step."""

    def __init__(self, model: torch.nn.Module, layout: FlatLayout, spec: RunSpec) -> None:
        self._context = spec.shape.context
        register_attention_rules()
        self._gradient = make_gradient(model, layout, spec, 1)

    @torch.no_grad()
    def measure(self, flat: Tensor, windows: Tensor) -> NoiseMeasurement:
        """The noise at the parameters `flat` (n,), from `windows` (parts, context + 1)."""
        parts, length = windows.shape
        data = windows.reshape(-1)
        starts = (torch.arange(parts, device=data.device) * length)[:, None]
        if parts * flat.numel() <= MAX_ELEMENTS_AT_ONCE:
            each = torch.func.vmap(self._gradient, in_dims=(None, 0, None))
            with warnings.catch_warnings():
                # An operation without a batching rule is computed part by part: a user can do nothing about it.
                warnings.filterwarnings(
                    "ignore", "There is a performance drop because we have not yet implemented"
                )
                gradients, _ = each(flat, starts, data)
            part_square = gradients.square().sum(1).mean()
            square = gradients.mean(0).square().sum()
        else:
            total, part_square = torch.zeros_like(flat), torch.zeros((), device=flat.device)
            for start in starts:
                gradient, _ = self._gradient(flat, start, data)
                total += gradient / parts
                part_square += gradient.square().sum() / parts
            square = total.square().sum()
        return noise_from_norms(part_square.item(), square.item(), self._context, parts * self._context)
