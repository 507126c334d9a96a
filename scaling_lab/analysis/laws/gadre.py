"""The over-training law of Gadre et al.: loss as a function of compute and tokens per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling_lab.analysis.laws.base import ComputeOptimum
from scaling_lab.analysis.laws.sums import LogSumLaw, Slope, Term, chinchilla_like_optimum
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN

_LOG_SIX = float(np.log(FLOPS_PER_PARAM_TOKEN))


@dataclass(frozen=True)
class Gadre(LogSumLaw):
    """L(C, M) = E + (a M^eta + b M^-eta) C^-eta with C = 6 N D and M = D / N: Chinchilla's law with alpha = beta = 2 eta.

    At any fixed M the reducible loss falls as C^-eta: over-training shifts the line on log axes but keeps its slope.
    """

    name = "gadre"
    title = "Gadre over-training L(C, M)"
    source = "Gadre et al. 2024, arXiv 2403.08540, the law L(C, M)"
    formula = "L(C, M) = E + (a M^eta + b M^-eta) C^-eta, C = 6 N D, M = D / N"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params", "n_tokens")

    @property
    def terms(self) -> tuple[Term, ...]:
        # M^eta C^-eta = (6 N^2)^-eta and M^-eta C^-eta = (6 D^2)^-eta.
        return (Term("a", Slope("eta", (2.0, 0.0), _LOG_SIX)), Term("b", Slope("eta", (0.0, 2.0), _LOG_SIX)))

    @property
    def example(self) -> Mapping[str, float]:
        # The published C4 fit of the data-constrained paper (alpha = beta), written in this form: see muennighoff.py.
        eta = 0.3526596 / 2
        return {
            "E": float(np.exp(0.6254804)),
            "a": float(np.exp(6.255414 + eta * _LOG_SIX)),
            "b": float(np.exp(7.3049974 + eta * _LOG_SIX)),
            "eta": eta,
        }

    def frontier(self, parameters: Mapping[str, Any]) -> ComputeOptimum:
        eta = np.asarray(parameters["eta"])
        shrink = np.exp(-eta * _LOG_SIX)
        return chinchilla_like_optimum(parameters["a"] * shrink, parameters["b"] * shrink, 2 * eta, 2 * eta)
