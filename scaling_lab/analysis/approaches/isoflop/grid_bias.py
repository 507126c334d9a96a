"""The bias that the grid of sizes and budgets gives IsoFLOP, estimated on noise-free losses of the fitted law.

A valley of L = E + A N^-alpha + B D^-beta is asymmetric if alpha != beta, so the minimum of a parabola is biased, even more
if the sizes are not centered on it (Czech et al. 2026, arXiv 2603.22339). The optimum of the fitted law is known. The bias
is the difference between it and the result of the method on losses of that law, at the sizes and budgets of the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from scaling_lab.analysis.approaches.isoflop.isoflop import IsoFlop
from scaling_lab.analysis.approaches.law_frontier import law_columns
from scaling_lab.analysis.approaches.parametric import Parametric
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import BudgetStatus, Estimate, FitStatus

# A smaller bias is not worth correcting: it is far below the width of the intervals of a sweep.
_BIASED_EXPONENT = 0.005
_BIASED_SIZE = 0.03


@dataclass(frozen=True)
class GridBias:
    """IsoFLOP's estimates minus the truth, on noise-free losses of a fitted law."""

    law: str
    params_exponent: float
    tokens_exponent: float
    log_params_opt: float
    """ln(N_opt estimated / N_opt of the law) at `compute_flops`."""
    compute_flops: float

    def corrected(self, found: Estimate) -> Corrected:
        """The estimate `found` minus this bias. It must have a frontier."""
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
    """IsoFLOP's estimates without the bias of its grid: exponents, and N_opt (parameters) at `GridBias.compute_flops`."""

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
    """The bias of `found` (an IsoFLOP estimate of `points`) if the law of `fitted` is true.

    None if either has no frontier, the fit has not converged, or the noise-free valleys give no frontier.

    Args:
        compute_flops: the compute at which N_opt is compared.
    """
    if found.frontier is None or fitted.frontier is None:
        return None
    if fitted.status not in (FitStatus.CONVERGED, FitStatus.AT_BOUND):
        return None
    law = parametric.law
    with_budgets = points.with_budgets()
    used = [b.budget_flops for b in found.budgets if b.status is BudgetStatus.OK]
    loss = np.asarray(law.loss_nats(fitted.fits[0].parameters, law_columns(points, law)), dtype=np.float64)
    # Budgets that were dropped contribute neither to the estimate nor to its bias.
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
    """A diagnostic with the bias and the corrected estimate."""
    better = bias.corrected(found)
    verdict = "so the estimate may be biased by as much" if bias.large else "which is small"
    also = " (minimum=shared largely avoids this bias)" if bias.large and minimum != "shared" else ""
    return (
        f"On noise-free losses of the fitted {bias.law} law, at these sizes and budgets, minimum={minimum} is off by"
        f" {bias.params_exponent:+.4f} in the exponent of N and by {np.expm1(bias.log_params_opt):+.1%} in N_opt (at"
        f" {bias.compute_flops:.2g} FLOPs), {verdict}. Corrected for this bias{also}: N as C^{better.params_exponent:.4f}, D as C^{better.tokens_exponent:.4f},"
        f" N_opt = {better.params_opt:.3g}."
    )
