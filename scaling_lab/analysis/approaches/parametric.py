"""Owns Approach 3 (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3): a law L(N, D) fitted to every point, and the
frontier that minimises it at fixed compute.

Where C = 6 N D to 1% and the law has a closed form, that is the frontier. Elsewhere D = C / (FLOPs per token of a size),
as observed, and the minimum is found numerically: small models with attention and a head are not at C = 6 N D. The
fitting engine is `scaling_lab.analysis.fitting.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.estimate import Array, Estimate, FitResult, FitStatus, Frontier, LossCurve, PowerLaw
from scaling_lab.analysis.fitting.fit import DEFAULT_HUBER_DELTA, fit, fit_many
from scaling_lab.analysis.frontiers import FrontierPoints, at_compute, quantities
from scaling_lab.analysis.inference.bootstrap import Draws, NoInterval
from scaling_lab.analysis.laws import LossLaw, get_law
from scaling_lab.analysis.laws.sums import LogSumLaw
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN
from scaling_lab.core.errors import UserError

# Budgets at which the numerical frontier is found, log-spaced over the observed range of C.
_BUDGETS = 12
# Sizes tried at each budget, and how far beyond the observed sizes (in ln N): the optimum may lie outside the sample.
_SIZES = 160
_BEYOND_LOG_N = 5.0
_LARGEST_RESAMPLE = 4e8
# A range of ln C that one budget may have, its runs off by 10% either way: within it an exponent rests on the law's form alone.
_ONE_COMPUTE = 2 * np.log(1.1)
# Fewer points than this a parameter make a small grid: the runs drawn anew leave whole flanks of it out.
_POINTS_PER_PARAMETER = 10


@dataclass(frozen=True)
class ParametricSettings:
    """Options `approach.parametric.*`."""

    law: str = "chinchilla"
    law_options: Mapping[str, Any] = field(default_factory=dict)
    huber_delta: float = DEFAULT_HUBER_DELTA
    objective: str = "huber_log"

    def __post_init__(self) -> None:
        get_law(
            self.law, **self.law_options
        )  # refuses an unknown law or option now, not after reading a table
        if not self.huber_delta > 0:
            raise UserError(f"approach.parametric.huber_delta={self.huber_delta} must be positive.")


@dataclass(frozen=True)
class FlopsPerToken:
    """ln of training FLOPs per token as a smooth function of ln N, from observed runs: 6 N times a correction."""

    correction: Array
    """Polynomial coefficients of ln(C / 6 N D) in (ln N - centre), constant beyond the observed sizes."""
    centre: float
    log_n_range: tuple[float, float]
    largest_error: float
    """Largest |ln| deviation of an observed size from the polynomial."""

    def __call__(self, log_n: Any) -> Any:
        inside = np.clip(log_n, *self.log_n_range) - self.centre
        return (
            np.log(FLOPS_PER_PARAM_TOKEN) + log_n + np.polynomial.polynomial.polyval(inside, self.correction)
        )


@dataclass(frozen=True)
class Parametric:
    """Approach 3 with its settings; pure methods."""

    settings: ParametricSettings = field(default_factory=ParametricSettings)
    name: str = "parametric"

    @property
    def law(self) -> LossLaw:
        return get_law(self.settings.law, **self.settings.law_options)

    def estimate(self, observations: Observations, weights: Array | None = None) -> Estimate:
        """Points -> fitted law -> frontier. Raises `UserError` where the law needs a column that is not there."""
        law = self.law
        columns = law_columns(observations, law)
        result = fit(
            law,
            columns,
            loss_nats=observations.loss_nats,
            weights=weights,
            huber_delta=self.settings.huber_delta,
            objective=self.settings.objective,  # type: ignore[arg-type]
        )
        notes: list[str] = []
        status, message = result.status, result.message
        frontier = None
        if not _has_frontier(law):
            status = FitStatus.NOT_APPLICABLE if status is FitStatus.CONVERGED else status
            message = f"{law.title or law.name} has no compute-optimal frontier: it does not depend on both N and D. {message}"
        elif (
            status is not FitStatus.NOT_IDENTIFIED
            and np.ptp(np.log(observations.compute_flops)) < _ONE_COMPUTE
        ):
            status = FitStatus.NOT_IDENTIFIED
            message = (
                "All points are at one compute: they show which size is best there, not how the best size grows with compute."
                f" Runs at another budget would. (The fit itself: {message})"
            )
        elif status is not FitStatus.NOT_IDENTIFIED:
            frontier = self._frontier(observations, law, result, notes)
            if frontier is None:
                status, message = (
                    FitStatus.NOT_IDENTIFIED,
                    f"The fitted law has no interior optimum. {message}",
                )
        return Estimate(
            self.name, status, message, frontier, law=law.name, fits=(result,), diagnostics=tuple(notes)
        )

    def default_unit(self, observations: Observations) -> str:
        """Runs, since several rows of one run are not independent; on a small grid with one point a run, noise about the
        fit: drawing few runs anew, with repeats, overstates the error (scripts/calibrate.py measures both)."""
        one_each = np.bincount(observations.run_index).max() == 1
        small = observations.n_points < _POINTS_PER_PARAMETER * len(self.law.parameters)
        return "residual" if one_each and small else "run"

    def resample(
        self,
        observations: Observations,
        draws: Draws,
        weights: Array | None = None,
        estimate: Estimate | None = None,
    ) -> dict[str, Array]:
        """(resamples,) each: the frontier's quantities and the law's parameters; see `uncertainty.Approach`.

        A resample's E may be below 0 (it is reported as 0): where the truth has no floor, resamples held at E = 0 pile up
        there and cut one tail off every other parameter (90% intervals of alpha then cover 75%: scripts/calibrate.py).
        """
        law = self.law
        free = law.with_free_floor() if isinstance(law, LogSumLaw) else law
        if draws.resamples * float(observations.n_points) > _LARGEST_RESAMPLE:
            raise NoInterval(
                f"{observations.n_points} points x {draws.resamples} resamples are too many; use points=final or a"
                " smaller bootstrap.resamples."
            )
        columns = law_columns(observations, law)
        options: dict[str, Any] = {
            "huber_delta": self.settings.huber_delta,
            "objective": self.settings.objective,
        }
        if draws.unit == "residual":
            if estimate is not None and estimate.fits:
                found = estimate.fits[0]
            else:
                found = fit(law, columns, loss_nats=observations.loss_nats, weights=weights, **options)
            if isinstance(free, LogSumLaw) and found.parameters.get("E") == 0.0:
                found = self._free_fit(free, columns, observations, weights, found)
            losses = residual_losses(observations, found, draws, weights)
            # The losses are noise about this fit: their minima are near it, and need no search.
            batch = fit_many(
                free, columns, loss_nats=losses, weights=weights, starts=found.parameters, **options
            )
        else:
            counts = draws.point_counts(observations)
            w = counts.astype(np.uint16) if weights is None else counts * weights
            batch = fit_many(free, columns, loss_nats=observations.loss_nats, weights=w, **options)
        samples = self._quantities(observations, law, batch.parameters)
        failed = ~batch.reached
        out = {**{k: np.asarray(v, dtype=np.float64) for k, v in batch.parameters.items()}, **samples}
        if "E" in batch.parameters:
            out["E"] = np.maximum(out["E"], 0.0)
        return {name: np.where(failed, np.nan, values) for name, values in out.items()}

    def _free_fit(
        self,
        free: LossLaw,
        columns: Mapping[str, Array],
        observations: Observations,
        weights: Array | None,
        held: FitResult,
    ) -> FitResult:
        """The fit with E free, about which resamples are simulated where the estimate is held at E = 0; `held` where the
        free one does not converge.

        About the held fit they would be centred on what the bound chose, which is nearer to a truth without a floor than
        chance has it: its 90% intervals of A then held 99% of such truths (scripts/calibrate.py).
        """
        result = fit(
            free,
            columns,
            loss_nats=observations.loss_nats,
            weights=weights,
            starts=held.parameters,
            huber_delta=self.settings.huber_delta,
            objective=self.settings.objective,  # type: ignore[arg-type]
        )
        return result if result.status is FitStatus.CONVERGED else held

    def _frontier(
        self, observations: Observations, law: LossLaw, result: FitResult, notes: list[str]
    ) -> Frontier | None:
        one = {k: np.array([v]) for k, v in result.parameters.items()}
        q = {name: float(v[0]) for name, v in self._quantities(observations, law, one).items()}
        if not all(
            np.isfinite(q[k]) for k in ("params_exponent", "tokens_exponent", "params_log_coefficient")
        ):
            return None
        c = observations.compute_flops
        compute = (float(c.min()), float(c.max()))
        if _closed_form(observations, law):
            notes.append("Frontier in closed form: flops = 6 params tokens to 1%.")
        else:
            per_token = flops_per_token(observations)
            notes.append(
                "Frontier found numerically on the observed FLOPs per token (flops is not 6 params tokens to 1%, or the"
                " law has no closed form); its exponents are those of power laws through it over the observed range."
            )
            if per_token.largest_error > 0.05:
                notes.append(
                    f"FLOPs per token are not a smooth function of N: sizes deviate by up to {per_token.largest_error:.0%}."
                )
        grid = np.geomspace(*compute, 33)
        samples = {k: np.array(v) for k, v in q.items()}
        points = [at_compute(samples, x) for x in grid]
        return Frontier(
            params=PowerLaw.of_log(q["params_exponent"], q["params_log_coefficient"]),
            tokens=PowerLaw.of_log(q["tokens_exponent"], q["tokens_log_coefficient"]),
            compute_range_flops=compute,
            compute_flops=grid,
            params_opt=np.array([float(p["params_opt"]) for p in points]),
            tokens_opt=np.array([float(p["tokens_opt"]) for p in points]),
            loss_opt=np.array([float(p["loss_opt"]) for p in points]),
            loss=LossCurve(
                q["loss_floor_nats"], float(np.exp(q["loss_log_coefficient"])), q["loss_exponent"]
            ),
        )

    def _quantities(
        self, observations: Observations, law: LossLaw, parameters: Mapping[str, Array]
    ) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            if _closed_form(observations, law):
                return _closed_quantities(law, parameters, observations)
            return quantities(numerical_frontier(law, parameters, observations))


def residual_losses(
    observations: Observations, result: FitResult, draws: Draws, weights: Array | None
) -> Array:
    """(resamples, points): the fitted losses times Gaussian noise of the residuals' scale, itself redrawn.

    Drawing the residuals themselves would not do: a fit that is nearly L1 passes exactly through as many points as it has
    parameters, so that among few residuals many are 0 (measured: 90% intervals cover 80%).
    """
    n, p = observations.n_points, len(result.parameters)
    if n <= p:
        raise NoInterval(f"{n} points leave no residuals beside {p} parameters.")
    rng = draws.rng()
    w = np.ones(n) if weights is None else weights
    scale = np.sqrt((w * result.residuals_log**2).sum() / rng.chisquare(n - p, size=draws.resamples))
    noise = scale[:, None] * rng.standard_normal((draws.resamples, n)) / np.sqrt(w)
    return observations.loss_nats * np.exp(result.residuals_log + noise)


def law_columns(observations: Observations, law: LossLaw) -> dict[str, Array]:
    """The columns that a law reads, from the observations' own or their extra columns.

    Raises:
        UserError: a column is missing; the message says which and what there is.
    """
    own = {
        "n_params": observations.n_params,
        "n_tokens": observations.n_tokens,
        "compute_flops": observations.compute_flops,
    }
    found = {**observations.extra, **own}
    missing = [c for c in law.columns if c not in found]
    if missing:
        have = ", ".join(sorted(observations.extra)) or "none"
        raise UserError(
            f"law={law.name} needs the column {missing[0]!r} beside params and tokens; further columns: {have}."
        )
    return {c: found[c] for c in law.columns}


def flops_per_token(observations: Observations) -> FlopsPerToken:
    """Observed FLOPs per token as a function of size: a cubic (or less) through ln(C / 6 N D) over ln N."""
    log_n = np.log(observations.n_params)
    excess = (
        np.log(observations.compute_flops / observations.n_tokens) - np.log(FLOPS_PER_PARAM_TOKEN) - log_n
    )
    x, at = np.unique(np.round(log_n, 9), return_inverse=True)
    y = np.bincount(at, excess) / np.bincount(at)
    centre = float(x.mean())
    degree = min(3, max(0, x.size - 2))
    coefficients = np.polynomial.polynomial.polyfit(x - centre, y, degree)
    error = float(np.abs(np.polynomial.polynomial.polyval(x - centre, coefficients) - y).max())
    return FlopsPerToken(coefficients, centre, (float(x[0]), float(x[-1])), error)


def numerical_frontier(
    law: LossLaw, parameters: Mapping[str, Array], observations: Observations
) -> FrontierPoints:
    """(samples, budgets) optima of a law at fixed C, for a batch of parameters (each (samples,))."""
    per_token = flops_per_token(observations)
    log_n_obs = np.log(observations.n_params)
    log_c = np.linspace(
        np.log(observations.compute_flops.min()), np.log(observations.compute_flops.max()), _BUDGETS
    )
    others = _columns_by_size(law, observations)
    p = {k: np.asarray(v, dtype=np.float64)[:, None, None] for k, v in parameters.items()}

    def losses(log_n: Array) -> Array:
        log_d = log_c[:, None] - per_token(log_n)
        columns = {"n_params": np.exp(log_n), "n_tokens": np.exp(log_d)}
        columns |= {name: np.exp(np.interp(log_n, *xy)) for name, xy in others.items()}
        if "compute_flops" in law.columns:
            columns["compute_flops"] = np.broadcast_to(np.exp(log_c)[:, None], log_n.shape)
        return np.asarray(law.loss_nats(p, columns))

    wide = np.linspace(log_n_obs.min() - _BEYOND_LOG_N, log_n_obs.max() + _BEYOND_LOG_N, _SIZES)
    coarse = losses(np.broadcast_to(wide, (1, log_c.size, wide.size)))
    at = np.argmin(coarse, axis=-1)
    inside = (at > 0) & (at < wide.size - 1)
    step = wide[1] - wide[0]
    log_n = wide[at]
    for _ in range(3):  # zoom in; each pass divides the spacing by eight
        fine = log_n[..., None] + np.linspace(-step, step, 17)
        values = losses(fine)
        best = np.clip(np.argmin(values, axis=-1), 1, 15)
        log_n = np.take_along_axis(fine, best[..., None], axis=-1)[..., 0]
        step /= 8
    loss = losses(log_n[..., None])[..., 0]
    log_d = log_c - per_token(log_n)
    ok = inside & np.isfinite(loss)
    return FrontierPoints(
        np.broadcast_to(log_c, ok.shape),
        np.where(ok, log_n, 0.0),
        np.where(ok, log_d, 0.0),
        np.where(ok, loss, np.nan),
        ok.astype(np.float64),
    )


def _columns_by_size(law: LossLaw, observations: Observations) -> dict[str, tuple[Array, Array]]:
    """Further columns of a law (width, depth, unique tokens) as (ln N, ln value), the mean of each size."""
    x, at = np.unique(np.round(np.log(observations.n_params), 9), return_inverse=True)
    out: dict[str, tuple[Array, Array]] = {}
    for name, values in law_columns(observations, law).items():
        if name not in ("n_params", "n_tokens", "compute_flops"):
            out[name] = (x.astype(np.float64), np.bincount(at, np.log(values)) / np.bincount(at))
    return out


def _has_frontier(law: LossLaw) -> bool:
    return "n_params" in law.columns and "n_tokens" in law.columns


def _closed_form(observations: Observations, law: LossLaw) -> bool:
    return observations.is_six_nd and law.frontier(law.example) is not None


def _closed_quantities(
    law: LossLaw, parameters: Mapping[str, Array], observations: Observations
) -> dict[str, Array]:
    optimum = law.frontier(parameters)
    assert optimum is not None
    log_k = np.log(np.asarray(optimum.params_coefficient, dtype=np.float64))
    log_kd = np.log(np.asarray(optimum.tokens_coefficient, dtype=np.float64))
    a, b = (np.asarray(v, dtype=np.float64) for v in (optimum.params_exponent, optimum.tokens_exponent))
    # Along the frontier both terms fall as the same power of C, so two losses give the curve beside E.
    log_c = np.log([observations.compute_flops.min(), observations.compute_flops.max()])
    if log_c[1] - log_c[0] < 1e-6:
        log_c = log_c + np.array([-1.0, 1.0])
    columns = {
        "n_params": np.exp(log_k[:, None] + a[:, None] * log_c),
        "n_tokens": np.exp(log_kd[:, None] + b[:, None] * log_c),
    }
    loss = np.asarray(law.loss_nats({k: np.asarray(v)[:, None] for k, v in parameters.items()}, columns))
    floor = np.asarray(parameters["E"], dtype=np.float64) if "E" in parameters else np.zeros_like(a)
    above = np.log(loss - floor[:, None])
    gamma = (above[:, 0] - above[:, 1]) / (log_c[1] - log_c[0])
    return {
        "params_exponent": a,
        "params_log_coefficient": log_k,
        "tokens_exponent": b,
        "tokens_log_coefficient": log_kd,
        "loss_floor_nats": floor,
        "loss_log_coefficient": above[:, 0] + gamma * log_c[0],
        "loss_exponent": gamma,
    }
