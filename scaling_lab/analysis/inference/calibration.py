"""Coverage of the intervals of each approach, measured on studies simulated from known laws.

A cell is a grid of runs, a law, a noise level, and an approach with its default interval. A study draws the seed noise of
the runs, estimates and resamples, and stores each interval with the truth. Over many studies a 90% interval should contain
the truth in 86 to 94%. A quantity of a cell passes if the Wilson 99.9% interval of its measured coverage overlaps that
range. `scripts/calibrate.py` runs the cells and prints the table; tests/test_calibration.py runs a few small ones.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.approaches import Envelope, EnvelopeSettings, IsoFlop, Parametric
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.inference.bootstrap import Approach, BootstrapSettings, bootstrap
from scaling_lab.analysis.inference.prediction import Prediction, predict
from scaling_lab.analysis.inference.profiles import profile

LEVEL = 0.9
PASS_RANGE = (0.86, 0.94)
# Two-sided 99.9% point of the normal distribution.
_Z_999 = 3.2905
# Excess loss at peak LR, as a fraction of the law's data term; it decreases to 0 as the LR decays. Measured sweeps with a
# cosine to 10% show .2 to .5 (Haegele et al. 2024, arXiv 2405.18392, report annealing gains of that size).
ANNEALING = 0.35
_CURVE_POINTS = 60


@dataclass(frozen=True)
class TrueLaw:
    """L = E + A N^-alpha + B D^-beta under C = 6 N D."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """The exponent of N_opt in C."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, n: Array | float, d: Array | float) -> Array:
        return np.asarray(
            self.E + self.A * np.asarray(n) ** -self.alpha + self.B * np.asarray(d) ** -self.beta
        )

    def params_opt(self, c: Array | float) -> Array:
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return g * (np.asarray(c) / 6) ** self.a


LAWS: Mapping[str, TrueLaw] = {
    # Fitted to losses of tiny models on the source text of the standard library (results/LOG.md).
    "quickstart": TrueLaw(1.08, 55.3, 965.0, 0.50, 0.57),
    # The fit of Besiroglu et al. 2024, arXiv 2404.10102, to 240 runs of Hoffmann et al.
    "chinchilla": TrueLaw(1.8172, 477.8, 2143.4, 0.3473, 0.3672),
    # Kaplan et al. 2020, arXiv 2001.08361: alpha_N = .076, no floor; beta chosen to give their exponent of N, .73.
    "kaplan": TrueLaw(0.0, 12.0, 120.0, 0.076, 0.205),
    # The same exponents, scaled to 1.9 nats at N = 4e4 and C = 4e11.
    "kaplan-small": TrueLaw(0.0, 3.10, 9.69, 0.076, 0.205),
}


def _window(sizes: Array, optimum: float, below: int, above: int) -> Array:
    best = int(np.argmin(np.abs(np.log(sizes / optimum))))
    return sizes[best - below : best + above + 1]


def _centered(law: TrueLaw) -> tuple[Array, Array]:
    """Three budgets over a factor of 16, six sizes over a factor of 16 around the optimum, two seeds at the middle budget."""
    budgets = (1e11, 4e11, 4e11, 1.6e12)
    n = np.concatenate([law.params_opt(c) * np.geomspace(0.25, 4, 6) for c in budgets])
    return n, np.repeat(budgets, 6)


def _ladder(law: TrueLaw) -> tuple[Array, Array]:
    """The same budgets with all sizes from one ladder, so that windows are off-center, each by a different amount."""
    sizes: Array = float(law.params_opt(4e11)) * np.power(1.75, np.arange(-8, 9)) * 1.2
    budgets = (1e11, 4e11, 4e11, 1.6e12)
    windows = [_window(sizes, float(law.params_opt(c)), 2, 3) for c in budgets]
    return np.concatenate(windows), np.repeat(budgets, [w.size for w in windows])


def _paper(law: TrueLaw) -> tuple[Array, Array]:
    """The nine budgets of Hoffmann et al. 2022, with nine sizes of one ladder at each."""
    sizes: Array = float(law.params_opt(1e20)) * np.power(1.5, np.arange(-14, 15))
    budgets = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
    windows = [_window(sizes, float(law.params_opt(c)), 4, 4) for c in budgets]
    return np.concatenate(windows), np.repeat(budgets, [w.size for w in windows])


def _horizons(law: TrueLaw) -> tuple[Array, Array]:
    """Fifteen sizes in ratios of 1.4 with four cosine horizons each, over a factor of 16 around the optimum for each size."""
    sizes = 1e8 * 1.4 ** np.arange(15)
    optimal_c = 6 * (sizes / law.params_opt(6.0)) ** (1 / law.a)
    return np.repeat(sizes, 4), (optimal_c[:, None] * np.geomspace(0.25, 4, 4)).ravel()


@dataclass(frozen=True)
class Grid:
    """N and C of the runs. With `curves` a study has whole training curves with a matched cosine."""

    build: Callable[[TrueLaw], tuple[Array, Array]]
    curves: bool = False


GRIDS: Mapping[str, Grid] = {
    "quickstart": Grid(_centered),
    "quickstart-ladder": Grid(_ladder),
    "quickstart-curves": Grid(_centered, curves=True),
    "paper": Grid(_paper),
    "horizons": Grid(_horizons, curves=True),
}


@dataclass(frozen=True)
class Cell:
    """`claimed` is False if the approach claims no calibration for the grid: it is still measured; its diagnostics say so."""

    grid: str
    law: str
    noise_nats: float
    approach: str
    claimed: bool = True

    @property
    def name(self) -> str:
        return f"{self.grid} {self.law} {self.noise_nats:g} {self.approach}"


_SMALL = (
    *(("quickstart", "quickstart", noise) for noise in (0.005, 0.015)),
    *(("quickstart-ladder", "quickstart", noise) for noise in (0.005, 0.015)),
    ("quickstart", "kaplan-small", 0.005),
)
CELLS: tuple[Cell, ...] = (
    *(Cell(*study, approach) for study in _SMALL for approach in ("isoflop", "parametric")),
    *(Cell("paper", law, 0.004, a) for law in ("chinchilla", "kaplan") for a in ("isoflop", "parametric")),
    *(Cell("horizons", law, 0.004, "envelope") for law in ("chinchilla", "kaplan")),
    # Without several horizons per size the envelope claims no calibrated interval (see caveats.py).
    Cell("horizons", "chinchilla", 0.004, "envelope-hull", claimed=False),
    Cell("quickstart-curves", "quickstart", 0.005, "envelope", claimed=False),
    Cell("quickstart", "quickstart", 0.005, "parametric-profile"),
    Cell("paper", "chinchilla", 0.004, "parametric-profile"),
)


def simulate(cell: Cell, study: int) -> Observations:
    """Simulate one study of a cell: final losses with seed noise, or whole curves under a cosine schedule."""
    law, grid = LAWS[cell.law], GRIDS[cell.grid]
    # Approaches with the same grid, law and noise see the same studies.
    rng = np.random.default_rng([study, zlib.crc32(f"{cell.grid} {cell.law} {cell.noise_nats:g}".encode())])
    n, c = grid.build(law)
    noise = cell.noise_nats * rng.standard_normal(n.size)
    end = c / 6 / n
    if not grid.curves:
        return Observations.from_arrays(
            n_params=n, n_tokens=end, loss_nats=law.loss(n, end) + noise, budget_flops=c
        )
    progress = np.geomspace(0.03, 1.0, _CURVE_POINTS)
    d = end[:, None] * progress
    above_final = 0.5 * (1 + np.cos(np.pi * progress))  # (LR - final LR) / (peak LR - final LR)
    loss = law.loss(n[:, None], d) + ANNEALING * above_final * law.B * d**-law.beta + noise[:, None]
    return Observations.from_arrays(
        n_params=np.repeat(n, _CURVE_POINTS),
        n_tokens=d.ravel(),
        loss_nats=loss.ravel(),
        run_id=np.repeat(np.arange(n.size), _CURVE_POINTS),
        budget_flops=np.repeat(c, _CURVE_POINTS),
    )


@dataclass(frozen=True)
class StudyInterval:
    """One interval of one study, and the truth that it should contain."""

    lo: float
    hi: float
    truth: float


_APPROACHES: Mapping[str, Approach] = {
    "isoflop": IsoFlop(),
    "parametric": Parametric(),
    "parametric-profile": Parametric(),
    "envelope": Envelope(),
    "envelope-hull": Envelope(EnvelopeSettings(method="hull")),
}
# The quantities with intervals, in the order of the table; "10x" is at ten times the largest C.
QUANTITIES = (
    *("params_exponent", "tokens_exponent", "params_opt", "tokens_opt", "loss_opt"),
    *("params_opt_10x", "tokens_opt_10x", "tokens_per_param_10x", "loss_opt_10x"),
    *("E", "A", "B", "alpha", "beta"),
)
_LOGARITHMIC = ("params_opt", "tokens_opt", "tokens_per_param", "A", "B")


def run_study(cell: Cell, study: int, resamples: int = 300) -> dict[str, StudyInterval]:
    """All intervals of an analysis of this study, by quantity; empty if there are none."""
    law, approach = LAWS[cell.law], _APPROACHES[cell.approach]
    points = simulate(cell, study).final()
    estimate = approach.estimate(points)
    parameters = {k: float(getattr(law, k)) for k in ("E", "A", "B", "alpha", "beta")}
    exponents = {"params_exponent": law.a, "tokens_exponent": 1 - law.a}
    if cell.approach == "parametric-profile":
        assert isinstance(approach, Parametric)
        truths = {**exponents, **parameters}
        # A missing end means that the profile does not rise on that side, so the interval contains everything there.
        return {
            name: StudyInterval(
                -np.inf if ends.lo is None else ends.lo, np.inf if ends.hi is None else ends.hi, truths[name]
            )
            for name, ends in profile(approach, points, estimate, LEVEL).intervals.items()
        }
    band = bootstrap(approach, points, estimate, BootstrapSettings(resamples, level=LEVEL), study)
    out = {}
    for name, truth in {**exponents, **(parameters if estimate.law else {})}.items():
        interval = band.interval(name)
        if interval is not None:
            out[name] = StudyInterval(interval.lo, interval.hi, truth)
    largest = float(points.compute_flops.max())
    for suffix, c in (("", float(np.exp(np.log(points.compute_flops).mean()))), ("_10x", 10 * largest)):
        out |= {k + suffix: v for k, v in _predicted(predict(estimate, band, c), law).items()}
    return {name: out[name] for name in QUANTITIES if name in out}


def _predicted(prediction: Prediction | None, law: TrueLaw) -> dict[str, StudyInterval]:
    if prediction is None:
        return {}
    n = float(law.params_opt(prediction.compute_flops))
    d = prediction.compute_flops / 6 / n
    truths = {"params_opt": n, "tokens_opt": d, "tokens_per_param": d / n, "loss_opt": float(law.loss(n, d))}
    out = {}
    for name, truth in truths.items():
        quantity = getattr(prediction, name)
        if quantity is not None and quantity.interval is not None:
            out[name] = StudyInterval(quantity.interval.lo, quantity.interval.hi, truth)
    return out


@dataclass(frozen=True)
class Coverage:
    """How often the intervals of one quantity contained the truth."""

    quantity: str
    n: int
    """Studies with an interval."""
    hits: int
    below: int
    """Misses with the truth below the interval."""
    median_width: float
    """Median width of the intervals; of their logarithm for N, D and amplitudes."""

    @property
    def logarithmic(self) -> bool:
        return self.quantity.removesuffix("_10x") in _LOGARITHMIC

    @property
    def coverage(self) -> float:
        return self.hits / self.n

    @property
    def wilson(self) -> tuple[float, float]:
        return wilson(self.hits, self.n)

    @property
    def passes(self) -> bool:
        lo, hi = self.wilson
        return hi >= PASS_RANGE[0] and lo <= PASS_RANGE[1]


def coverages(studies: Sequence[Mapping[str, StudyInterval]]) -> list[Coverage]:
    """The coverage of each quantity over the studies of a cell, in the order of the table."""
    out = []
    for name in QUANTITIES:
        rows = np.array([(c.lo, c.hi, c.truth) for s in studies if (c := s.get(name)) is not None])
        if not rows.size:
            continue
        lo, hi, truth = rows.T
        logarithmic = name.removesuffix("_10x") in _LOGARITHMIC
        with np.errstate(all="ignore"):
            width = np.log(hi / np.maximum(lo, 0.0)) if logarithmic else hi - lo
        hits = int(((lo <= truth) & (truth <= hi)).sum())
        out.append(Coverage(name, len(rows), hits, int((truth < lo).sum()), float(np.median(width))))
    return out


def wilson(hits: int, n: int, z: float = _Z_999) -> tuple[float, float]:
    """The Wilson interval of a proportion; 99.9% by default."""
    p = hits / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(center - half, 0.0), min(center + half, 1.0)
