"""Compare laws on the same observations by their error on held-out points.

In sample, a law with more parameters always fits at least as well. Two out-of-sample tests are used: cross-validation that
leaves out whole runs (interpolation), and prediction of points above a compute threshold from those below it
(extrapolation, the purpose of a scaling law).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.analysis.estimate import Array, FitStatus
from scaling_lab.analysis.fitting.fit import DEFAULT_HUBER_DELTA, fit, fit_many
from scaling_lab.analysis.fitting.objective import ObjectiveName
from scaling_lab.analysis.laws.base import LossLaw, read_column
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError


@dataclass(frozen=True)
class HeldOutError:
    """Errors of ln L (.01 is 1% of the loss) on held-out points."""

    n_points: int
    mean_abs: float
    rms: float
    bias: float
    """Mean of ln L_fit - ln L; positive if the law predicts too high losses."""


@dataclass(frozen=True)
class LawScore:
    """The result for one law. The errors are None if the law could not be fitted (`message` says why)."""

    law: LossLaw
    n_parameters: int
    status: FitStatus
    message: str
    in_sample_mean_abs: float | None = None
    cross_validation: HeldOutError | None = None
    folds_failed: int = 0
    """Folds whose fit did not converge or was not determined by the data; their predictions are scored anyway."""
    excess: float | None = None
    """Mean over groups of the cross-validated |error| of this law minus that of the best law."""
    excess_standard_error: float | None = None
    """Standard error of `excess`, from paired differences over groups; an excess within 2 of these is not significant."""
    extrapolation: HeldOutError | None = None


@dataclass(frozen=True)
class LawComparison:
    """Laws in order of cross-validated error, followed by those that could not be fitted."""

    scores: tuple[LawScore, ...]
    n_groups: int
    folds: int
    threshold_flops: float | None
    """Points above it were predicted from those below; None if there is no compute to split by."""

    def __str__(self) -> str:
        width = max([14] + [len(s.law.label) + 1 for s in self.scores])
        lines = [
            f"{'law':<{width}}{'params':>7}{'in sample':>11}{'left out':>10}{'excess':>17}{'extrapolated':>14}  status"
        ]
        for s in self.scores:
            cells = [
                _percent(s.in_sample_mean_abs, 11),
                _percent(s.cross_validation.mean_abs if s.cross_validation else None, 10),
                _percent(s.excess, 9)
                + (f" ± {s.excess_standard_error:.2%}" if s.excess_standard_error is not None else " " * 8),
                _percent(s.extrapolation.mean_abs if s.extrapolation else None, 14),
            ]
            note = s.status.value if s.status == FitStatus.CONVERGED else f"{s.status.value}: {s.message}"
            lines.append(f"{s.law.label:<{width}}{s.n_parameters:>7}{''.join(cells)}  {note}")
        return "\n".join(lines)


def compare_laws(
    laws: Sequence[LossLaw],
    data: Any,
    *,
    loss_nats: Any = None,
    groups: Any = None,
    compute_flops: Any = None,
    folds: int = 10,
    extrapolation_quantile: float = 0.7,
    huber_delta: float = DEFAULT_HUBER_DELTA,
    objective: ObjectiveName = "huber_log",
    seed: int = 0,
) -> LawComparison:
    """Score each law on held-out points.

    Args:
        laws: two or more laws, fitted to the same rows.
        data, loss_nats, huber_delta, objective: as in `fitting.fit`.
        groups: (n,) labels; rows with the same label (a run) are left out together. By default each row is a group.
        compute_flops: (n,) training FLOPs to split by; by default the column of that name, or 6 N D.
        folds: number of cross-validation folds, at most the number of groups.
        extrapolation_quantile: rows above this quantile of compute are predicted from those at or below it.
        seed: seed of the assignment of groups to folds.

    Raises:
        UserError: fewer than 3 groups, or a quantile outside (0, 1).
    """
    if not 0 < extrapolation_quantile < 1:
        raise UserError(f"extrapolation_quantile={extrapolation_quantile!r} must be in (0, 1).")
    loss = (
        read_column(data, "loss_nats", "the comparison")
        if loss_nats is None
        else np.asarray(loss_nats, dtype=np.float64)
    )
    labels = (
        np.arange(len(loss))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    )
    if len(labels) != len(loss):
        raise UserError(f"groups has {len(labels)} values, but the loss has {len(loss)}.")
    n_groups = int(labels.max()) + 1 if len(labels) else 0
    if n_groups < 3:
        raise UserError(f"comparing laws needs at least 3 groups of points (runs), got {n_groups}.")
    folds = max(2, min(folds, n_groups))
    assignment = np.random.default_rng(seed).permutation(np.arange(n_groups) % folds)[labels]
    held_out = assignment[None, :] == np.arange(folds)[:, None]
    compute = _compute(data, compute_flops)
    threshold, above = None, None
    if compute is not None and np.ptp(compute) > 0:
        threshold = float(np.quantile(compute, extrapolation_quantile))
        if threshold >= compute.max():  # the largest budget is a large share: predict that budget
            threshold = float(compute[compute < compute.max()].max())
        above = compute > threshold
    settings = {"huber_delta": huber_delta, "objective": objective}
    scored = [_score(law, data, loss, held_out, above, settings) for law in laws]
    return LawComparison(_ranked(scored, labels), n_groups, folds, threshold)


def _score(
    law: LossLaw,
    data: Any,
    loss: Array,
    held_out: NDArray[np.bool_],
    above: NDArray[np.bool_] | None,
    settings: dict[str, Any],
) -> tuple[LawScore, Array | None]:
    """The score of one law, without excess, and its cross-validated errors of ln L (n,)."""
    names = law.parameters
    try:
        whole = fit(law, data, loss_nats=loss, **settings)
        columns = {c: read_column(data, c, f"law={law.name}") for c in law.columns}
    except UserError as error:
        return LawScore(law, len(names), FitStatus.NOT_APPLICABLE, str(error)), None
    if whole.status == FitStatus.NOT_IDENTIFIED:
        return LawScore(law, len(names), whole.status, whole.message), None
    left_out = held_out if above is None else np.vstack([held_out, above])
    batch = fit_many(law, data, loss_nats=loss, weights=(~left_out).astype(np.uint8), **settings)
    predicted = np.empty(left_out.shape)
    with np.errstate(all="ignore"):
        for i in range(len(left_out)):
            parameters = {k: float(v[i]) for k, v in batch.parameters.items()}
            predicted[i] = np.log(law.loss_nats(parameters, columns)) - np.log(loss)
    folds = len(held_out)
    errors = np.where(held_out, predicted[:folds], 0.0).sum(axis=0)
    score = LawScore(
        law=law,
        n_parameters=len(names),
        status=whole.status,
        message=whole.message,
        in_sample_mean_abs=float(np.mean(np.abs(whole.residuals_log))),
        cross_validation=_summary(errors),
        folds_failed=int(np.count_nonzero(~batch.reached[:folds])),
        extrapolation=None if above is None else _summary(predicted[folds][above]),
    )
    return score, errors


def _ranked(scored: list[tuple[LawScore, Array | None]], labels: NDArray[np.intp]) -> tuple[LawScore, ...]:
    """Scores in order of cross-validated error, with paired excess over the best law."""
    counts = np.bincount(labels)
    by_group = [None if e is None else np.bincount(labels, np.abs(e)) / counts for _, e in scored]
    usable = [i for i, g in enumerate(by_group) if g is not None and np.isfinite(g).all()]
    order = sorted(usable, key=lambda i: float(np.mean(by_group[i])))  # type: ignore[arg-type]
    out = []
    for i in order:
        difference = np.asarray(by_group[i]) - np.asarray(by_group[order[0]])
        error = float(np.std(difference, ddof=1) / np.sqrt(len(difference)))
        out.append(replace(scored[i][0], excess=float(np.mean(difference)), excess_standard_error=error))
    return tuple(out + [scored[i][0] for i in range(len(scored)) if i not in usable])


def _summary(errors: Array) -> HeldOutError:
    return HeldOutError(
        n_points=len(errors),
        mean_abs=float(np.mean(np.abs(errors))),
        rms=float(np.sqrt(np.mean(errors**2))),
        bias=float(np.mean(errors)),
    )


def _compute(data: Any, compute_flops: Any) -> Array | None:
    if compute_flops is not None:
        return np.asarray(compute_flops, dtype=np.float64)
    try:
        return read_column(data, "compute_flops", "the comparison")
    except UserError:
        pass
    try:
        n, d = (read_column(data, c, "the comparison") for c in ("n_params", "n_tokens"))
    except UserError:
        return None
    return FLOPS_PER_PARAM_TOKEN * n * d


def _percent(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.2%'):>{width}}"
