"""Sensitivity of the exponents to other choices: FLOP conventions, fewer budgets, each run left out, other methods.

Each row states the change, the approach, its exponents with that change, and the difference from the analysis itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.approaches import Envelope, IsoFlop, Parametric
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate
from scaling_lab.analysis.inference.bootstrap import Draws
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError

# Leaving out each run needs one refit per run: with more runs that is slow, and no single run matters much.
_MAX_INFLUENCE_RUNS = 300
_MAX_INFLUENCE_ROWS = 3
# Residuals beyond this many robust standard deviations (1.4826 times the median absolute deviation) are outliers.
_OUTLIER_SIGMAS = 4.0


@dataclass(frozen=True)
class SensitivityRow:
    """The estimate of one approach with one choice changed."""

    kind: str
    """convention, data, influence or method."""
    choice: str
    approach: str
    status: str
    params_exponent: float | None
    tokens_exponent: float | None
    change: float | None
    """params_exponent minus that of the analysis itself."""
    message: str | None = None


@dataclass(frozen=True)
class _FixedDraws(Draws):
    """Draws with given, not random, counts of each run."""

    counts_of_runs: Array | None = None

    def run_counts(self, observations: Observations) -> Array:
        assert self.counts_of_runs is not None
        return self.counts_of_runs

    def point_counts(self, observations: Observations) -> Array:
        return self.run_counts(observations)[:, observations.run_index]


def sensitivity(
    approaches: Sequence[Any],
    estimates: Sequence[Estimate],
    observations: Observations,
    weights: Array | None = None,
) -> tuple[SensitivityRow, ...]:
    """Refit with each other choice that these observations allow. Approaches without a frontier are skipped."""
    usable = [(a, e) for a, e in zip(approaches, estimates) if e.frontier is not None]
    rows: list[SensitivityRow] = []
    for choice, changed in _conventions(observations):
        rows += _refit("convention", choice, usable, changed, weights)
    for choice, keep in _subsets(usable, observations):
        part = observations.runs(keep)
        if part.n_points == 0:
            continue
        w = None if weights is None else weights[keep[observations.run_index]]
        rows += _refit("data", choice, usable, part, w)
    for approach, base in usable:
        for choice, other in _other_methods(approach, observations):
            rows += _refit("method", choice, [(other, base)], observations, weights)
    for approach, base in usable:
        rows += _influence(approach, base, observations, weights)
    return tuple(rows)


def _refit(
    kind: str,
    choice: str,
    usable: Iterable[tuple[Any, Estimate]],
    observations: Observations,
    weights: Array | None,
) -> list[SensitivityRow]:
    rows = []
    for approach, base in usable:
        try:
            found = approach.estimate(observations, weights)
        except UserError as error:
            rows.append(
                SensitivityRow(kind, choice, approach.name, "not_applicable", None, None, None, str(error))
            )
            continue
        f = found.frontier
        assert base.frontier is not None
        rows.append(
            SensitivityRow(
                kind,
                choice,
                approach.name,
                found.status.value,
                f.params.exponent if f else None,
                f.tokens.exponent if f else None,
                f.params.exponent - base.frontier.params.exponent if f else None,
                None if f else found.message,
            )
        )
    return rows


def _conventions(observations: Observations) -> Iterable[tuple[str, Observations]]:
    for name in observations.alternatives:
        if name != observations.convention:
            yield f"convention={name}", observations.under(name)
    if not observations.alternatives and not observations.is_six_nd:
        six = FLOPS_PER_PARAM_TOKEN * observations.n_params * observations.n_tokens
        curves = observations.curves
        six_curves = replace(curves, compute_flops=FLOPS_PER_PARAM_TOKEN * curves.n_params * curves.n_tokens)
        yield (
            "flops=6 params tokens",
            replace(
                observations, compute_flops=six, separate_curves=six_curves, budgets_match_convention=False
            ),
        )


def _subsets(
    usable: Sequence[tuple[Any, Estimate]], observations: Observations
) -> Iterable[tuple[str, NDArray[np.bool_]]]:
    final = observations.final()
    budget = np.full(observations.n_runs, np.nan)
    budget[final.run_index] = final.with_budgets().budget_flops
    values = np.unique(budget)
    if 3 <= values.size <= 15:
        yield "without the smallest budget", budget > values[0]
        if values.size >= 5:
            yield "without the two smallest budgets", budget > values[1]
    elif values.size > 15:  # not a grid of budgets
        compute = np.full(observations.n_runs, np.nan)
        compute[final.run_index] = final.compute_flops
        yield "without the quarter of runs with the least compute", compute > np.quantile(compute, 0.25)
    for approach, base in usable:
        if isinstance(approach, Parametric) and base.fits:
            r = base.fits[0].residuals_log
            scale = 1.4826 * float(np.median(np.abs(r - np.median(r))))
            outliers = np.abs(r - np.median(r)) > _OUTLIER_SIGMAS * scale
            keep = np.ones(observations.n_runs, dtype=bool)
            keep[observations.run_index[outliers]] = False
            if scale > 0 and outliers.any() and keep.sum() >= 0.5 * keep.size:
                yield (
                    f"without {int((~keep).sum())} run(s) beyond {_OUTLIER_SIGMAS:g} robust sigmas of the parametric fit",
                    keep,
                )


def _other_methods(approach: Any, observations: Observations) -> Iterable[tuple[str, Any]]:
    s = approach.settings
    if isinstance(approach, IsoFlop):
        for minimum in ("shared", "parabola", "akima", "cubic"):
            if minimum != s.minimum:
                yield (
                    f"approach.isoflop.minimum={minimum}",
                    replace(approach, settings=replace(s, minimum=minimum)),
                )
        if s.window_log_params is not None:
            whole = replace(s, window_log_params=None)
            yield (
                "approach.isoflop.window_log_params=null",
                replace(approach, settings=whole),
            )
    elif isinstance(approach, Envelope):
        used = approach.method(observations)
        for method in ("interpolate", "hull"):
            if method != used:
                yield (
                    f"approach.envelope.method={method}",
                    replace(approach, settings=replace(s, method=method)),
                )
        edge = "keep" if s.edge == "drop" else "drop"
        if used != "ends":
            yield f"approach.envelope.edge={edge}", replace(approach, settings=replace(s, edge=edge))
    elif isinstance(approach, Parametric):
        for delta in (1e-4, 1e-2):
            if delta != s.huber_delta:
                changed = replace(s, huber_delta=delta)
                yield f"approach.parametric.huber_delta={delta:g}", replace(approach, settings=changed)
        if s.objective != "mse_log":
            yield (
                "approach.parametric.objective=mse_log",
                replace(approach, settings=replace(s, objective="mse_log")),
            )


def _influence(
    approach: Any, base: Estimate, observations: Observations, weights: Array | None
) -> list[SensitivityRow]:
    n = observations.n_runs
    if not 3 < n <= _MAX_INFLUENCE_RUNS or n * observations.n_points > 1_000_000:
        return []
    draws = _FixedDraws("run", n, 0, counts_of_runs=1.0 - np.eye(n))
    samples = approach.resample(observations, draws, weights)
    assert base.frontier is not None
    change = samples["params_exponent"] - base.frontier.params.exponent
    failed = ~np.isfinite(change)
    order = np.argsort(-np.where(failed, np.inf, np.abs(change)), kind="stable")
    return [
        SensitivityRow(
            "influence",
            f"without run {observations.run_names[i]}",
            approach.name,
            "not_applicable" if failed[i] else "converged",
            None if failed[i] else float(samples["params_exponent"][i]),
            None if failed[i] else float(samples["tokens_exponent"][i]),
            None if failed[i] else float(change[i]),
            "Without this run the approach gives no estimate." if failed[i] else None,
        )
        for i in order[:_MAX_INFLUENCE_ROWS]
    ]
