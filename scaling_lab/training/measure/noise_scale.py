"""Owns the gradient noise scale: from the norms of micro-batches' gradients, measured at validation visits.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: with E|g_b|^2 = |G|^2 + tr(S) / b at two batch sizes b, the true
gradient's |G|^2 and the noise tr(S) follow, and B_simple = tr(S) / |G|^2 is the batch at which the two are equal. Kaplan et
al. 2020 relate it to the critical batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling_lab.core.spec import RunSpec
from scaling_lab.training.engine.gradient import make_gradient
from scaling_lab.training.engine.optimizer import FlatLayout

# Micro-batches of a measurement, one sequence each. Late in training tr(S) is many times |G|^2 b: a measurement on fewer
# tokens than the scale itself says little of |G|^2.
PARTS = 64
# Measurements that would cost more than this share of a run's training are left out, the early ones first.
MAX_COST_FRACTION = 0.02
# Gradients of all parts are taken at once where they have at most this many elements (64 MB).
AT_ONCE = 2**24
# A step's own micro-batches serve where it has at least so many.
ENOUGH_PARTS = 8


@dataclass(frozen=True)
class Noise:
    """|G|^2 and tr(S) of one measurement; tr(S) per token. Either may come out negative where the other dwarfs it."""

    gradient_square: float
    trace_tokens: float

    @property
    def scale_tokens(self) -> float | None:
        """B_simple in tokens; None where the measurement cannot tell."""
        if not (self.gradient_square > 0 and self.trace_tokens > 0):
            return None
        return self.trace_tokens / self.gradient_square


def noise(part_square: float, square: float, part_tokens: int, tokens: int) -> Noise:
    """From the mean squared norm of parts' gradients and that of their mean's (equations A.2 and A.3)."""
    return Noise(
        gradient_square=(tokens * square - part_tokens * part_square) / (tokens - part_tokens),
        trace_tokens=(part_square - square) / (1 / part_tokens - 1 / tokens),
    )


def visits_measured(spec: RunSpec, visits: Sequence[int]) -> frozenset[int]:
    """At which of the validation visits the noise is measured: the last ones that the cost allows."""
    affordable = int(MAX_COST_FRACTION * spec.train_tokens / (PARTS * spec.shape.context))
    return frozenset(sorted(visits)[-affordable:] if affordable else ())


class NoiseProbe:
    """Measures on the sequences that follow the step's batch in the data order: a pure function of parameters and step."""

    def __init__(self, model: torch.nn.Module, layout: FlatLayout, spec: RunSpec) -> None:
        self._context = spec.shape.context
        self._gradient = make_gradient(model, layout, spec, 1)

    @torch.no_grad()
    def measure(self, flat: Tensor, windows: Tensor) -> Noise:
        """At parameters (n,), over `windows` (parts, context + 1)."""
        parts, length = windows.shape
        data = windows.reshape(-1)
        starts = (torch.arange(parts, device=data.device) * length)[:, None]
        if parts * flat.numel() <= AT_ONCE:
            each = torch.func.vmap(self._gradient, in_dims=(None, 0, None))
            with warnings.catch_warnings():
                # On a CPU attention is computed part by part here, which is what is wanted; a user can do nothing about it.
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
        return noise(part_square.item(), square.item(), self._context, parts * self._context)
