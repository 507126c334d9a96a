"""Owns the estimate of what IsoFLOP's grid does to its answer: the same method on noise-free losses of the fitted law.

A valley of L = E + A N^-alpha + B D^-beta is not symmetric where alpha != beta, so that a parabola's minimum is off, by more
where the sizes are not centred on it (Czech et al. 2026, arXiv 2603.22339). The fitted law is known, its optimum too: what
the method finds on its losses, at the very sizes and budgets of the data, minus that optimum, is the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scaling_lab.analysis.approaches.isoflop.isoflop import IsoFlop
from scaling_lab.analysis.approaches.parametric import Parametric, law_columns
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import BudgetStatus, Estimate, FitStatus

# From these on the bias is called one: below, no interval of a sweep tells it from none.
_BIASED_EXPONENT = 0.005
_BIASED_SIZE = 0.03


@dataclass(frozen=True)
class GridBias:
    """What IsoFLOP finds minus the truth, on noise-free losses of a fitted law."""

    law: str
    params_exponent: float
    tokens_exponent: float
    log_params_opt: float
    """ln of N_opt found over the law's own, at `compute_flops`."""
    compute_flops: float

    def corrected(self, found: Estimate) -> Corrected:
        """`found`, the estimate that this is the bias of, without it. It must have a frontier."""
        assert found.frontier is not None
        params, tokens = found.frontier.params, found.frontier.tokens
        return Corrected(
            params.exponent - self.params_exponent,
            tokens.exponent - self.tokens_exponent,
            float(params(self.compute_flops)) * float(np.exp(-self.log_params_opt)),
        )

    @property
    def large(self) -> bool:
        """Whether it is worth correcting."""
        return abs(self.params_exponent) >= _BIASED_EXPONENT or abs(self.log_params_opt) >= _BIASED_SIZE


@dataclass(frozen=True)
class Corrected:
    """What IsoFLOP says without the bias of its grid: exponents, and N_opt (parameters) at the bias's `compute_flops`."""

    params_exponent: float
    tokens_exponent: float
    params_opt: float


def grid_bias(
    isoflop: IsoFlop,
    found: Estimate,
    parametric: Parametric,
    fitted: Estimate,
    points: Observations,
    compute_flops: float,
) -> GridBias | None:
    """The bias of `found` (an IsoFLOP estimate of `points`) if the law of `fitted` is the truth; None where either has no
    frontier, the fit has not converged, or the noise-free valleys show none.

    Args:
        compute_flops: where N_opt is compared.
    """
    if found.frontier is None or fitted.frontier is None:
        return None
    if fitted.status not in (FitStatus.CONVERGED, FitStatus.AT_BOUND):
        return None
    law = parametric.law
    with_budgets = points.with_budgets()
    used = [b.budget_flops for b in found.budgets if b.status is BudgetStatus.OK]
    loss = np.asarray(law.loss_nats(fitted.fits[0].parameters, law_columns(points, law)), dtype=np.float64)
    # Budgets that were dropped have no part in the estimate, nor in its bias.
    keep = np.isfinite(loss) & (loss > 0)
    if points.budgets_match_convention:
        keep &= np.isin(with_budgets.budget_flops, used)
    clean = isoflop.estimate(replace(points, loss_nats=np.where(keep, loss, 1.0)).points(keep)).frontier
    if clean is None:
        return None
    truth = fitted.frontier
    bias = GridBias(
        fitted.law or law.name,
        clean.params.exponent - truth.params.exponent,
        clean.tokens.exponent - truth.tokens.exponent,
        float(np.log(clean.params(compute_flops)) - np.log(truth.params(compute_flops))),
        compute_flops,
    )
    return bias if np.isfinite([bias.params_exponent, bias.log_params_opt]).all() else None


def bias_sentence(bias: GridBias, found: Estimate, minimum: str) -> str:
    """The bias and the estimate without it, for the estimate's diagnostics."""
    better = bias.corrected(found)
    verdict = "so its answer may be biased by that" if bias.large else "which is little"
    also = ", as minimum=shared largely does by itself" if bias.large and minimum != "shared" else ""
    return (
        f"On noise-free losses of the fitted {bias.law} law, at these sizes and budgets, minimum={minimum} finds an exponent of N"
        f" {bias.params_exponent:+.4f} and an N_opt {np.expm1(bias.log_params_opt):+.1%} (at {bias.compute_flops:.2g} FLOPs) from the"
        f" law's own, {verdict}. Corrected for it{also}: N as C^{better.params_exponent:.4f}, D as C^{better.tokens_exponent:.4f},"
        f" N_opt = {better.params_opt:.3g}."
    )
