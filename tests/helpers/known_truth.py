"""Noise-free observations from a known law for tests of the approaches, and the folder of the published tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import scaling_lab.analysis.published
from scaling_lab.analysis.data.observations import Observations

PUBLISHED = Path(scaling_lab.analysis.published.__file__).parent

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """L = E + A N^-alpha + B D^-beta under C = 6 N D, stated by its optimum: N_opt = n_ref at C = c_ref."""

    alpha: float
    beta: float
    E: float = 1.7
    n_ref: float = 1e9
    c_ref: float = 1e20
    data_term: float = 0.4
    """B D^-beta at the reference optimum, nats."""

    @property
    def a(self) -> float:
        return self.beta / (self.alpha + self.beta)

    def params_opt(self, c: float | Array) -> Array:
        return self.n_ref * (np.asarray(c) / self.c_ref) ** self.a

    def loss(self, n: Array, d: Array) -> Array:
        d_ref = self.c_ref / 6 / self.n_ref
        b = self.data_term * d_ref**self.beta
        # At the optimum alpha A N^-alpha = beta B D^-beta.
        a = self.beta / self.alpha * self.data_term * self.n_ref**self.alpha
        return self.E + a * n**-self.alpha + b * d**-self.beta

    def isoflop(self, budgets: Array, factors: Array, **more: Array) -> Observations:
        """Sizes at `factors` times the optimum of every budget."""
        n = (self.params_opt(budgets)[:, None] * factors).ravel()
        c = np.repeat(budgets, factors.size)
        d = c / 6 / n
        return Observations.from_arrays(
            n_params=n, n_tokens=d, loss_nats=self.loss(n, d), budget_flops=c, **more
        )

    def curves(self, sizes: Array, points: int = 200, decades: float = 4.0) -> Observations:
        """One curve per size, with tokens spanning `decades` around the compute where the middle size is optimal."""
        middle = np.sqrt(sizes[0] * sizes[-1])
        c = self.c_ref * (middle / self.n_ref) ** (1 / self.a)
        d = np.geomspace(10 ** (-decades / 2), 10 ** (decades / 2), points) * c / 6 / middle
        n, d = np.repeat(sizes, points), np.tile(d, sizes.size)
        run = np.repeat([f"n{i}" for i in range(sizes.size)], points)
        return Observations.from_arrays(n_params=n, n_tokens=d, loss_nats=self.loss(n, d), run_id=run)
