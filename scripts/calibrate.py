#!/usr/bin/env python3
"""Measures whether the intervals that an analysis prints cover: simulates studies from known laws and counts.

    scripts/calibrate.py                              # 500 studies a cell, every cell
    scripts/calibrate.py --studies 100 --cells quickstart

A cell is a grid of runs, a law and an approach with its default interval. Its 90% intervals cover if the Wilson 99.9%
interval of the measured coverage meets 86 to 94%. Median widths are printed too: wide intervals cover easily.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analyse.approaches import Envelope, EnvelopeSettings, IsoFlop, Parametric
from scaling_lab.analyse.observations import Observations
from scaling_lab.analyse.predict import predict
from scaling_lab.analyse.uncertainty import Approach, BootstrapSettings, bootstrap

Array = NDArray[np.float64]
PASS_RANGE = (0.86, 0.94)
# Two-sided 99.9% point of the normal distribution.
_Z = 3.2905
# How far above the law's data term a run's loss lies at peak LR; vanishes as the LR reaches its end. Measured sweeps with
# a cosine to 10% show a fifth to a half (Haegele et al. 2024, arXiv 2405.18392: annealing gains of that size).
ANNEALING = 0.35


@dataclass(frozen=True)
class Law:
    """L = E + A N^-alpha + B D^-beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        return self.beta / (self.alpha + self.beta)

    def loss(self, n: Array | float, d: Array | float) -> Array:
        return np.asarray(
            self.E + self.A * np.asarray(n) ** -self.alpha + self.B * np.asarray(d) ** -self.beta
        )

    def params_opt(self, c: Array | float) -> Array:
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return g * (np.asarray(c) / 6) ** self.a


LAWS = {
    # Through the losses measured on the standard library's source text.
    "quickstart": Law(1.08, 55.3, 965.0, 0.50, 0.57),
    # Besiroglu et al. 2024, arXiv 2404.10102.
    "chinchilla": Law(1.8172, 477.8, 2143.4, 0.3473, 0.3672),
    # Kaplan et al. 2020, arXiv 2001.08361: alpha_N .076, no floor; beta such that a is theirs, .73 rounded.
    "kaplan": Law(0.0, 12.0, 120.0, 0.076, 0.205),
}


@dataclass(frozen=True)
class Grid:
    """Where the runs are: (N, C, seed) of each; `horizons` for training curves."""

    build: Callable[[Law], tuple[Array, Array]]
    curves: bool = False


def _centred(law: Law) -> tuple[Array, Array]:
    """Three budgets over a factor 16, six sizes over a factor 16 about the optimum, two seeds at the middle budget."""
    budgets = (1e11, 4e11, 4e11, 1.6e12)
    n = np.concatenate([law.params_opt(c) * np.geomspace(0.25, 4, 6) for c in budgets])
    return n, np.repeat(budgets, 6)


def _ladder(law: Law) -> tuple[Array, Array]:
    """The same budgets, every size from one ladder: windows that are off-centre, each otherwise."""
    sizes = float(law.params_opt(4e11)) * 1.75 ** np.arange(-8, 9) * 1.2
    n, c = [], []
    for budget in (1e11, 4e11, 4e11, 1.6e12):
        best = int(np.argmin(np.abs(np.log(sizes / law.params_opt(budget)))))
        window = sizes[best - 2 : best + 4]
        n.append(window)
        c.append(np.full(window.size, budget))
    return np.concatenate(n), np.concatenate(c)


def _paper(law: Law) -> tuple[Array, Array]:
    """Nine budgets of Hoffmann et al. 2022 and nine sizes of one ladder at each."""
    middle = float(law.params_opt(1e20))
    sizes = middle * 1.5 ** np.arange(-14, 15)
    n, c = [], []
    for budget in (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21):
        best = int(np.argmin(np.abs(np.log(sizes / law.params_opt(budget)))))
        window = sizes[best - 4 : best + 5]
        n.append(window)
        c.append(np.full(window.size, budget))
    return np.concatenate(n), np.concatenate(c)


def _horizons(law: Law) -> tuple[Array, Array]:
    """Fifteen sizes in a ratio of 1.4 with four cosine horizons each, spanning a factor 16 about their own optimum."""
    sizes = 1e8 * 1.4 ** np.arange(15)
    optimal_c = 6 * (sizes / law.params_opt(6.0)) ** (1 / law.a)  # C at which each size is optimal
    n = np.repeat(sizes, 4)
    return n, (optimal_c[:, None] * np.geomspace(0.25, 4, 4)).ravel()


GRIDS = {
    "quickstart": Grid(_centred),
    "quickstart-ladder": Grid(_ladder),
    "paper": Grid(_paper),
    "horizons": Grid(_horizons, curves=True),
}


@dataclass(frozen=True)
class Cell:
    grid: str
    law: str
    noise_nats: float
    approach: str


CELLS = (
    *(
        Cell(g, "quickstart", s, a)
        for g in ("quickstart", "quickstart-ladder")
        for s in (0.005, 0.015)
        for a in ("isoflop", "parametric")
    ),
    *(Cell("paper", law, 0.004, a) for law in ("chinchilla", "kaplan") for a in ("isoflop", "parametric")),
    *(Cell("horizons", "chinchilla", 0.004, a) for a in ("envelope", "envelope-hull")),
)


def simulate(cell: Cell, rng: np.random.Generator) -> Observations:
    """One study: final losses with seed noise, or whole curves that know their cosine schedule."""
    law, grid = LAWS[cell.law], GRIDS[cell.grid]
    n, c = grid.build(law)
    noise = cell.noise_nats * rng.standard_normal(n.size)
    if not grid.curves:
        d = c / 6 / n
        return Observations.from_arrays(
            n_params=n, n_tokens=d, loss_nats=law.loss(n, d) + noise, budget_flops=c
        )
    progress = np.geomspace(0.03, 1.0, 60)
    end = c / 6 / n
    d = end[:, None] * progress
    lr = 0.1 + 0.45 * (1 + np.cos(np.pi * progress))
    above = ANNEALING * (lr - 0.1) / 0.9 * law.B * d**-law.beta
    loss = law.loss(n[:, None], d) + above + noise[:, None]
    return Observations.from_arrays(
        n_params=np.repeat(n, 60),
        n_tokens=d.ravel(),
        loss_nats=loss.ravel(),
        run_id=np.repeat(np.arange(n.size), 60),
    )


APPROACHES: dict[str, Approach] = {
    "isoflop": IsoFlop(),
    "parametric": Parametric(),
    "envelope": Envelope(),
    "envelope-hull": Envelope(EnvelopeSettings(method="hull")),
}
QUANTITIES = ("params_exponent", "params_opt", "loss_opt", "params_opt_10x", "loss_opt_10x")


def study(job: tuple[Cell, int, int, str]) -> dict[str, tuple[float, float, float]]:
    """(low, high, truth) by quantity of one simulated study; empty where there was no interval."""
    cell, number, resamples, unit = job
    law, approach = LAWS[cell.law], APPROACHES[cell.approach]
    obs = simulate(cell, np.random.default_rng([number, CELLS.index(cell)]))
    points = obs.final()
    estimate = approach.estimate(points)
    settings = BootstrapSettings(resamples=resamples, unit=unit)  # type: ignore[arg-type]
    band = bootstrap(approach, points, estimate, settings, number)
    interval = band.interval("params_exponent")
    if interval is None:
        return {}
    out = {"params_exponent": (interval.lo, interval.hi, law.a)}
    mean = float(np.exp(np.log(points.compute_flops).mean()))
    for suffix, c in (("", mean), ("_10x", 10 * float(points.compute_flops.max()))):
        found = predict(estimate, band, c)
        n = float(law.params_opt(c))
        truth = {"params_opt": n, "loss_opt": float(law.loss(n, c / 6 / n))}
        for name, value in truth.items():
            quantity = getattr(found, name)
            if quantity is not None and quantity.interval is not None:
                out[name + suffix] = (quantity.interval.lo, quantity.interval.hi, value)
    return out


def wilson(hits: int, n: int) -> tuple[float, float]:
    """99.9% interval of a proportion."""
    p = hits / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return centre - half, centre + half


def report(cell: Cell, results: Sequence[dict[str, tuple[float, float, float]]]) -> tuple[str, bool]:
    """A row of the table, and whether every quantity passes."""
    texts, passed = [], True
    for name in QUANTITIES:
        rows = np.array([r[name] for r in results if name in r])
        if not len(rows):
            texts.append("none")
            continue
        hits = int(((rows[:, 0] <= rows[:, 2]) & (rows[:, 2] <= rows[:, 1])).sum())
        lo, hi = wilson(hits, len(rows))
        ok = hi >= PASS_RANGE[0] and lo <= PASS_RANGE[1]
        passed &= ok
        relative = name.startswith("params_opt")
        widths = np.log(rows[:, 1] / rows[:, 0]) if relative else rows[:, 1] - rows[:, 0]
        texts.append(f"{hits / len(rows):.3f}{'' if ok else ' FAILS'} ({np.median(widths):.2g})")
    missing = sum(not r for r in results)
    head = f"{cell.grid} | {cell.law} | {cell.noise_nats:g} | {cell.approach}"
    return f"| {head} | {' | '.join(texts)} | {missing} |", passed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--unit", default="auto")
    parser.add_argument("--cells", default="", help="only cells whose 'grid law approach' contains this")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print(
        f"Coverage of 90% intervals (median width; of N in ln N) over {options.studies} studies, unit={options.unit}.\n"
    )
    print(f"| grid | law | noise, nats | approach | {' | '.join(QUANTITIES)} | no interval |")
    print("|---|---|---|---|" + "---|" * (len(QUANTITIES) + 1))
    everything = True
    with ProcessPoolExecutor(options.workers) as pool:
        for cell in CELLS:
            if options.cells not in f"{cell.grid} {cell.law} {cell.approach}":
                continue
            jobs = [(cell, i, options.resamples, options.unit) for i in range(options.studies)]
            row, passed = report(cell, list(pool.map(study, jobs, chunksize=8)))
            everything &= passed
            print(row, flush=True)
    return 0 if everything else 1


if __name__ == "__main__":
    sys.exit(main())
