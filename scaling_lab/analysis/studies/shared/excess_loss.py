"""Excess loss from mistuned learning rates (and batches), run by run, and the exponents if every size were tuned.

Tuning that is right at one size and wrong at another tilts a scaling law: it is the largest of Porian et al.'s causes
(2024, arXiv 2406.19146) of the disagreement between Kaplan and Chinchilla. Runs at a few learning rates (and batches)
around the sweep's own (design=learning_rate) measure the excess at some sizes; in between, the distance to the best setting
and the curvature are interpolated in ln N, and between budgets in ln C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate, Interval
from scaling_lab.analysis.inference.bootstrap import Approach
from scaling_lab.analysis.studies.shared.lr_quadratic import (
    SAME_SETTING_LOG,
    QuadraticFit,
    best_at_edge,
    fit_quadratic,
    near_best,
    quadratic_rise,
    settings_of,
    underdetermined_reason,
)
from scaling_lab.core.errors import UserError

# Samples of the noise for the error of the excess loss, and how many of them the laws are refitted to.
SAMPLES = 400
REFITS = 40


@dataclass(frozen=True)
class TrainedRuns:
    """Runs with the settings they were trained under: equal-length arrays (runs,)."""

    names: NDArray[np.object_]
    n_params: Array
    budget_flops: Array
    peak_lr: Array
    batch_tokens: Array
    loss_nats: Array
    seed: Array

    def __len__(self) -> int:
        return len(self.names)

    def at(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> TrainedRuns:
        return TrainedRuns(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    def with_runs_of(self, other: TrainedRuns) -> TrainedRuns:
        """Both, a run that is in both once."""
        new = ~np.isin(other.names.astype(str), self.names.astype(str))
        return TrainedRuns(
            *(
                np.concatenate([getattr(self, name), getattr(other, name)[new]])
                for name in self.__dataclass_fields__
            )
        )

    def log_settings(self) -> Array:
        """(runs, 2) ln LR and ln batch."""
        return np.stack([np.log(self.peak_lr), np.log(self.batch_tokens)], axis=1)


@dataclass(frozen=True)
class TunedCell:
    """One size at one budget whose learning rate (and batch) were varied."""

    n_params: float
    budget_flops: float
    n_runs: int
    status: str
    """ok, or why there is no excess loss: too_few, concave, outside (as in a valley's status)."""
    message: str | None
    log_settings: Array
    """(runs, 2) ln of LR and batch over the sweep's own, of the runs of the cell."""
    loss_nats: Array
    """(runs,)"""
    fit: QuadraticFit | None = None
    """Its point estimate comes first."""
    best_over_used: tuple[float, ...] = ()
    """Best LR over the sweep's, and best batch over the sweep's where batches were varied."""
    best_over_used_intervals: tuple[Interval | None, ...] = ()
    excess_nats: float | None = None
    excess_interval: Interval | None = None
    excess_standard_error: float | None = None


@dataclass(frozen=True)
class TunedExponents:
    """One approach on the losses as trained, and on the losses less their excess."""

    approach: str
    status: str
    message: str
    params_exponent: float | None
    tokens_exponent: float | None
    tuned_params_exponent: float | None
    tuned_tokens_exponent: float | None
    change_interval: Interval | None
    """Of the exponent of N, tuned less as trained; from the error of the excess loss alone."""


@dataclass(frozen=True)
class Tuning:
    """The excess loss of a sweep's runs, measured at some of them."""

    cells: tuple[TunedCell, ...]
    varied: tuple[str, ...]
    """("LR",) or ("LR", "batch")."""
    noise_nats: float | None
    """Standard deviation of one loss about its cell's surface; None where it is unknown."""
    noise_source: str
    level: float
    excess_nats: Array
    """(points,) of every point of the sweep."""
    excess_standard_error: Array
    """(points,) NaN where the noise is not known."""
    exponents: tuple[TunedExponents, ...] = ()
    message: str | None = None
    """Why there is no excess loss, where there is none."""


def measure_excess_loss(
    sweep: TrainedRuns, tuned: TrainedRuns, *, level: float = 0.9, seed: int = 0
) -> tuple[Tuning, Array]:
    """The excess loss of every run of `sweep`, and (samples, runs) of it under the noise, the estimate first.

    Args:
        sweep: the runs whose excess loss is asked for, at the sweep's own settings.
        tuned: runs of some of the same sizes and budgets under other settings.
        level: of the intervals.

    Raises:
        UserError: no run in one of the two.
    """
    if not len(sweep) or not len(tuned):
        which = "sweep" if not len(sweep) else "learning-rate sweep"
        raise UserError(f"tuning: the {which} has no completed run.")
    groups = [_CellRuns(sweep, runs) for runs in _cells(sweep, tuned)]
    both = all(g.varies_batch() for g in groups)
    dims = 2 if both else 1
    kept = [g.near(dims) for g in groups]
    noise, source = _noise(kept)
    rng = np.random.default_rng([seed, 7])
    cells = tuple(_cell(g, k, dims, noise, level, rng) for g, k in zip(groups, kept))
    good = [c for c in cells if c.fit is not None]
    varied = ("LR", "batch")[:dims]
    if not good:
        nothing = np.full(len(sweep), np.nan)
        why = "No size has a best setting within what was tried: " + "; ".join(
            sorted({c.message for c in cells if c.message})
        )
        return Tuning(cells, varied, noise, source, level, nothing, nothing, (), why + "."), nothing[None]
    samples = _interpolated(sweep, good)
    error = samples[1:].std(axis=0, ddof=1) if noise is not None else np.full(len(sweep), np.nan)
    return Tuning(cells, varied, noise, source, level, samples[0], error), samples


def tuned_exponents(
    tuning: Tuning,
    samples: Array,
    points: Observations,
    approaches: Sequence[Approach],
    estimates: Sequence[Estimate],
) -> Tuning:
    """`tuning` with the exponents of every approach that uses final losses, on the losses less their excess.

    Args:
        samples: (samples, points) excess losses, the estimate first.
        estimates: of `approaches` on the losses as they are.
    """
    if tuning.message is not None:
        return tuning
    found = []
    for approach, plain in zip(approaches, estimates):
        if approach.name == "envelope":
            why = "The envelope uses losses within the runs, and the excess is known only at their ends."
            found.append(
                TunedExponents("envelope", "not_applicable", why, *_exponents(plain), None, None, None)
            )
            continue
        best = approach.estimate(_less(points, samples[0]))
        change = None
        if best.frontier is not None and plain.frontier is not None and tuning.noise_nats is not None:
            moved = [
                _exponents(approach.estimate(_less(points, s)))[0]
                for s in samples[1 :: max(1, (len(samples) - 1) // REFITS)]
            ]
            base = plain.frontier.params.exponent
            change = _interval(np.array([np.nan if m is None else m - base for m in moved]), tuning.level)
        found.append(
            TunedExponents(
                approach.name, best.status.value, best.message, *_exponents(plain), *_exponents(best), change
            )
        )
    return replace(tuning, exponents=tuple(found))


def _less(points: Observations, excess: Array) -> Observations:
    return replace(points, loss_nats=points.loss_nats - excess)


def _exponents(estimate: Estimate) -> tuple[float | None, float | None]:
    f = estimate.frontier
    return (None, None) if f is None else (f.params.exponent, f.tokens.exponent)


@dataclass(frozen=True)
class _CellRuns:
    """The runs of one size and budget, and the settings that the sweep uses there."""

    sweep: TrainedRuns
    runs: TrainedRuns

    @property
    def reference(self) -> Array:
        """(2,) ln LR and ln batch of the sweep at this size and budget, interpolated in ln N at the nearest budget."""
        distance = np.abs(np.log(self.sweep.budget_flops / self.runs.budget_flops[0]))
        near = self.sweep.at(distance <= distance.min() + 1e-9)
        order = np.argsort(near.n_params, kind="stable")
        log_n, settings = np.log(near.n_params[order]), near.log_settings()[order]
        at = np.log(self.runs.n_params[0])
        return np.array([np.interp(at, log_n, settings[:, i]) for i in range(2)])

    def offsets(self) -> Array:
        """(runs, 2) ln of each run's settings over the reference."""
        return self.runs.log_settings() - self.reference

    def varies_batch(self) -> bool:
        x = self.offsets()
        return underdetermined_reason(x[near_best(x, self.runs.loss_nats)]) is None

    def near(self, dims: int) -> tuple[Array, TrainedRuns]:
        """(settings (runs, dims), runs) near enough to fit; with LR alone only those of the sweep's batch."""
        x = self.offsets()
        if dims == 1:
            same = np.abs(x[:, 1]) <= SAME_SETTING_LOG
            x, runs = x[same, :1], self.runs.at(same)
        else:
            runs = self.runs
        if not len(runs):
            return x, runs
        close = near_best(x, runs.loss_nats)
        return x[close], runs.at(close)


def _cells(sweep: TrainedRuns, tuned: TrainedRuns) -> list[TrainedRuns]:
    """The tuned sizes and budgets, ascending, each with the sweep's own runs of it."""
    everything = sweep.with_runs_of(tuned)

    def key(runs: TrainedRuns) -> NDArray[np.str_]:
        return np.array([f"{b:.9e} {n:.9e}" for b, n in zip(runs.budget_flops, runs.n_params)])

    keys = key(everything)
    order = np.lexsort((tuned.n_params, tuned.budget_flops))
    return [everything.at(keys == k) for k in dict.fromkeys(key(tuned)[order].tolist())]


def _noise(cells: Sequence[tuple[Array, TrainedRuns]]) -> tuple[float | None, str]:
    """(standard deviation of one loss, where it is from)."""
    for source, estimator in (
        (
            "runs that share settings and differ in their seed, less what a seed does to all settings",
            _two_way,
        ),
        ("runs that share settings and differ in their seed", _one_way),
        ("the distances of the losses from their parabolas", _residuals),
    ):
        parts = [estimator(x, runs) for x, runs in cells]
        squares, freedom = sum(p[0] for p in parts), sum(p[1] for p in parts)
        if freedom >= 2:
            return float(np.sqrt(squares / freedom)), f"{source} ({freedom} degrees of freedom)"
    return (
        None,
        "not known: there are neither repeated seeds nor spare settings, so the excess loss has no error bar",
    )


def _two_way(x: Array, runs: TrainedRuns) -> tuple[float, int]:
    """Sum of squares and degrees of freedom of the losses less the means of their setting and of their seed."""
    label = settings_of(x) if len(runs) else np.zeros(0, np.int64)
    table = {(int(s), float(seed)): loss for s, seed, loss in zip(label, runs.seed, runs.loss_nats)}
    seeds = sorted({seed for _, seed in table})
    rows = [s for s in sorted({s for s, _ in table}) if all((s, seed) in table for seed in seeds)]
    if len(rows) < 2 or len(seeds) < 2:
        return 0.0, 0
    values = np.array([[table[s, seed] for seed in seeds] for s in rows])
    left = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float((left**2).sum()), (len(rows) - 1) * (len(seeds) - 1)


def _one_way(x: Array, runs: TrainedRuns) -> tuple[float, int]:
    label = settings_of(x) if len(runs) else np.zeros(0, np.int64)
    squares, freedom = 0.0, 0
    for s in np.unique(label):
        values = runs.loss_nats[label == s]
        squares += float(((values - values.mean()) ** 2).sum())
        freedom += len(values) - 1
    return squares, freedom


def _residuals(x: Array, runs: TrainedRuns) -> tuple[float, int]:
    if underdetermined_reason(x) is not None:
        return 0.0, 0
    found = fit_quadratic(x, runs.loss_nats[None])
    if isinstance(found, str):
        return 0.0, 0
    return found.residual_squares, found.n_runs - {1: 3, 2: 6}[x.shape[1]]


def _cell(
    group: _CellRuns,
    near: tuple[Array, TrainedRuns],
    dims: int,
    noise: float | None,
    level: float,
    rng: np.random.Generator,
) -> TunedCell:
    x, runs = near
    base = TunedCell(
        float(group.runs.n_params[0]), float(group.runs.budget_flops[0]), len(runs), "ok", None,
        group.offsets(), group.runs.loss_nats,
    )  # fmt: skip
    why = underdetermined_reason(x)
    if why is not None:
        if best_at_edge(base.log_settings[:, :dims], base.loss_nats):
            return replace(base, status="outside", message="the best setting tried is the last on its side")
        return replace(base, status="too_few", message=why)
    shaken = (noise or 0.0) * rng.standard_normal((SAMPLES + 1, len(runs)))
    shaken[0] = 0.0
    fit = fit_quadratic(x, runs.loss_nats + shaken)
    if isinstance(fit, str):
        return replace(base, status="concave" if "bend up" in fit else "outside", message=fit)
    excess = fit.excess_nats
    known = noise is not None
    return replace(
        base,
        fit=fit,
        best_over_used=tuple(float(v) for v in np.exp(fit.optimum[0])),
        best_over_used_intervals=tuple(
            _interval(np.exp(fit.optimum[1:, i]), level) if known else None for i in range(dims)
        ),
        excess_nats=float(excess[0]),
        excess_interval=_interval(excess[1:], level) if known else None,
        excess_standard_error=float(excess[1:].std(ddof=1)) if known else None,
    )


def _interpolated(sweep: TrainedRuns, cells: Sequence[TunedCell]) -> Array:
    """(samples, runs) excess losses: offset and curvature linear in ln N within a budget and in ln C between budgets, constant
    beyond the ends. A mean of quadratics with minima is one too, so the excess is never negative."""
    budgets = sorted({c.budget_flops for c in cells})
    log_n, log_c = np.log(sweep.n_params), np.log(sweep.budget_flops)
    layers = []
    for budget in budgets:
        of_budget = sorted((c for c in cells if c.budget_flops == budget), key=lambda c: c.n_params)
        fits = [c.fit for c in of_budget if c.fit is not None]
        weights = _linear_weights(log_n, np.log([c.n_params for c in of_budget]))
        layers.append(
            (
                np.einsum("rc,csi->sri", weights, np.stack([b.optimum for b in fits])),
                np.einsum("rc,csij->srij", weights, np.stack([b.hessian for b in fits])),
            )
        )
    weights = _linear_weights(log_c, np.log(budgets))
    offset = np.einsum("rb,bsri->sri", weights, np.stack([o for o, _ in layers]))
    hessian = np.einsum("rb,bsrij->srij", weights, np.stack([h for _, h in layers]))
    return quadratic_rise(offset, hessian)


def _linear_weights(x: Array, knots: Array) -> Array:
    """(x, knots) weights of linear interpolation, held at the ends."""
    return np.stack([np.interp(x, knots, unit) for unit in np.eye(len(knots))], axis=1)


def _interval(values: Array, level: float) -> Interval | None:
    """Central percentiles; None where fewer than 20 values are finite."""
    values = values[np.isfinite(values)]
    if values.size < 20:
        return None
    tail = (1 - level) / 2
    lo, hi = np.quantile(values, [tail, 1 - tail])
    return Interval(float(lo), float(hi))
