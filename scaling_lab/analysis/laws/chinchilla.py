"""The parametric loss L(N, D) of Hoffmann et al. (Approach 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.base import ComputeOptimum, LawInputs
from scaling_lab.analysis.laws.sums import LogSumLaw, Slope, Term, chinchilla_like_optimum


@dataclass(frozen=True)
class Chinchilla(LogSumLaw):
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    name = "chinchilla"
    title = "Chinchilla L(N, D)"
    source = "Hoffmann et al. 2022, arXiv 2203.15556, eq. 2"
    formula = "L(N, D) = E + A / N^alpha + B / D^beta"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params", "n_tokens")

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("A", Slope("alpha", (1.0, 0.0))), Term("B", Slope("beta", (0.0, 1.0))))

    @property
    def example(self) -> Mapping[str, float]:
        # The paper's unrounded fit, found in its TeX source (Besiroglu et al. 2024, arXiv 2404.10102).
        return {
            "E": np.exp(0.52672),
            "A": np.exp(6.00734),
            "B": np.exp(6.01792),
            "alpha": 0.33917,
            "beta": 0.28491,
        }

    def frontier(self, parameters: Mapping[str, Any]) -> ComputeOptimum:
        return chinchilla_like_optimum(*(parameters[k] for k in ("A", "B", "alpha", "beta")))

    def hoffmann_starts(self, inputs: LawInputs) -> Array:
        """The 4,500 starts of the paper: alpha, beta in {0, .5, .., 2}, e in {-1, -.5, .., 1}, a, b in {0, 5, .., 25}."""
        exponents, logs = np.arange(0, 2.5, 0.5), np.arange(0, 30, 5.0)
        grid = np.array(list(product(np.arange(-1, 1.5, 0.5), logs, logs, exponents, exponents)))
        natural = dict(zip(self.parameters, np.concatenate([np.exp(grid[:, :3]), grid[:, 3:]], axis=1).T))
        return np.clip(self.from_natural(natural, inputs), *self.bounds(inputs))
