"""`fit`: one law fitted to a table of runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from scaling_lab.api.analyze import observations_of
from scaling_lab.api.html import html_table
from scaling_lab.api.options import analysis_settings
from scaling_lab.api.plots import drawing_on
from scaling_lab.api.tables import column_names
from scaling_lab.api.values import NamedScalars, ScalarEstimate, interval_of
from scaling_lab.core.errors import UserError, unknown

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

    from scaling_lab.analysis.data.observations import Observations
    from scaling_lab.analysis.estimate import Array, Estimate
    from scaling_lab.analysis.inference.bands import Band
    from scaling_lab.analysis.inference.profiles import Profile
    from scaling_lab.analysis.laws import LossLaw

# Columns that tables and laws name differently.
_LAW_COLUMNS = {"params": "n_params", "tokens": "n_tokens", "flops": "compute_flops"}
_METHODS = ("bootstrap", "profile")


def fit(
    law: str,
    data: Any,
    *,
    loss: str | None = None,
    params: str | None = None,
    tokens: str | None = None,
    flops: str | None = None,
    run_id: str | None = None,
    columns: Mapping[str, str] | None = None,
    units: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
    points: Literal["final", "all"] = "final",
    weights: Literal["loss_sem"] | None = None,
    law_options: Mapping[str, Any] | None = None,
    huber_delta: float = 1e-3,
    objective: Literal["huber_log", "mse_log", "mse"] = "huber_log",
    intervals: Literal["bootstrap", "profile"] | None = None,
    level: float = 0.9,
    resamples: int = 1000,
    seed: int = 0,
) -> LawFit:
    """A law of the loss fitted to the final losses of runs, from many starts.

    Args:
        law: chinchilla (L = E + A / N^alpha + B / D^beta), kaplan_nd, muennighoff, power_n, ...; an unknown name is an error
            that lists them.
        data: a table, as `analyze` takes it. A law may need further columns (`unique_tokens`, `width`, ...).
        loss: what the table calls its loss; likewise `params`, `tokens`, `flops` and `run_id`; `columns` for any other.
        units: the unit a column is written in.
        where: rows to keep.
        points: one point a run (its last by tokens), or every row.
        weights: loss_sem weights each point by 1 / loss_sem^2.
        law_options: options of the law's own.
        huber_delta: half-width of the quadratic part of the Huber function, in ln L (Hoffmann et al. 2022: 1e-3).
        objective: Huber or squares of ln L, or squares of L.
        intervals: how intervals are found; default: the bootstrap, where the law has a compute-optimal frontier, else the
            profile likelihood.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: an unknown law or option, a missing column, too few usable rows.

    >>> law = sl.fit("chinchilla", "my_runs.csv", resamples=200)
    >>> law.parameters["alpha"].interval.contains(0.35)
    True
    >>> law.loss(params=1e9, tokens=[2e10, 4e10]).round(1)
    array([2.5, 2.4])
    """
    from scaling_lab.analysis.approaches import Parametric

    if intervals is not None and intervals not in _METHODS:
        raise unknown("intervals", intervals, _METHODS)
    if not isinstance(law, str):
        raise UserError(
            f"law={type(law).__name__}: the law comes first, by its name: sl.fit('chinchilla', data)."
        )
    given = {"law": law, "law_options": law_options, "huber_delta": huber_delta, "objective": objective}
    settings = analysis_settings(
        {
            "points": points,
            "weights": weights,
            "seed": seed,
            "approach": {"parametric": {name: value for name, value in given.items() if value is not None}},
            "bootstrap": {"resamples": resamples, "level": level},
        }
    )
    names = column_names(columns, loss=loss, params=params, tokens=tokens, flops=flops, run_id=run_id)
    observations, name = observations_of(data, settings, names, units, where)
    return fitted(Parametric(settings.approach.parametric), observations, settings, name, intervals)


def fitted(
    approach: Any, observations: Observations, settings: Any, name: str, intervals: str | None
) -> LawFit:
    """The fit and its intervals, by the same code as the analysis's parametric approach."""
    import numpy as np

    from scaling_lab.analysis.analysis import point_weights, select_points
    from scaling_lab.analysis.inference.bootstrap import bootstrap
    from scaling_lab.analysis.inference.profiles import profile

    points = select_points(observations, settings)
    with np.errstate(all="ignore"):  # starts may leave float64
        weights = point_weights(points, settings)
        estimate = approach.estimate(points, weights)
        method = intervals or ("profile" if estimate.frontier is None else "bootstrap")
        drawn = bootstrap(approach, points, estimate, settings.bootstrap, settings.seed, weights)
        traced = (
            profile(approach, points, estimate, settings.bootstrap.level, weights)
            if method == "profile"
            else None
        )
    return LawFit(approach.law, points, estimate, drawn, traced, name)


class LawFit:
    """One law fitted to runs: parameters with intervals, and the loss that it predicts.

    >>> law = sl.fit("chinchilla", "my_runs.csv", resamples=200)
    >>> law
    chinchilla on 36 points of my_runs.csv: converged
      E      1.8...
      A      ...
    >>> law.to_frame().loc["beta", "estimate"] == law.parameters["beta"].estimate
    np.True_
    """

    def __init__(
        self,
        law: LossLaw,
        points: Observations,
        estimate: Estimate,
        band: Band,
        profile: Profile | None,
        data_name: str,
    ) -> None:
        self._law, self._points, self._estimate, self._band, self._profile = (
            law,
            points,
            estimate,
            band,
            profile,
        )
        self._fit, self._data_name = estimate.fits[0], data_name

    @property
    def law(self) -> str:
        """The law's name."""
        return self._law.label

    @property
    def formula(self) -> str:
        """The law's formula."""
        return self._law.formula

    @property
    def source(self) -> str:
        """The publication that the law is from."""
        return self._law.source

    @property
    def status(self) -> str:
        """converged, max_steps, at_bound, starts_disagree or not_identified."""
        return self._fit.status.value

    @property
    def message(self) -> str:
        """One sentence that explains the status."""
        return self._fit.message

    @property
    def interval_method(self) -> str:
        """How the intervals were found."""
        return "profile likelihood" if self._profile is not None else self._band.method

    @cached_property
    def parameters(self) -> Mapping[str, ScalarEstimate]:
        """The law's parameters by name, E, A, B in nats per token."""
        return NamedScalars({n: self._scalar(n, v) for n, v in self._fit.parameters.items()}, self.message)

    @property
    def exponent(self) -> ScalarEstimate:
        """a of N_opt ~ C^a, where the law has a compute-optimal frontier."""
        return self._of_frontier("params_exponent", "params")

    @property
    def tokens_exponent(self) -> ScalarEstimate:
        """b of D_opt ~ C^b, where the law has a compute-optimal frontier."""
        return self._of_frontier("tokens_exponent", "tokens")

    @property
    def residuals(self) -> Array:
        """(points,): ln of the measured less ln of the fitted loss, in the order of `to_frame("points")`."""
        return -self._fit.residuals_log

    def loss(self, data: pd.DataFrame | None = None, **columns: Any) -> np.ndarray | float:
        """The loss that the law predicts, nats per token.

        Args:
            data: a DataFrame with the law's columns (`params`, `tokens`, ...), one prediction a row.
            **columns: or the columns themselves, numbers or arrays that broadcast: `params=1e9, tokens=[1e10, 1e11]`.

        Raises:
            UserError: a column of the law is missing, or one that it does not have is given.
        """
        import numpy as np

        ours = {theirs: name for name, theirs in _LAW_COLUMNS.items()}
        wanted = {ours.get(name, name): name for name in self._law.columns}
        given = dict(columns) if data is None else {**{n: data[n] for n in wanted if n in data}, **columns}
        missing, strange = [n for n in wanted if n not in given], [n for n in columns if n not in wanted]
        if missing or strange:
            what = (
                f"{missing[0]} is missing"
                if missing
                else f"{strange[0]}={columns[strange[0]]!r} is not one of its columns"
            )
            raise UserError(f"loss: {what}. The law {self.law} takes {', '.join(wanted)}.")
        values = {wanted[name]: np.asarray(given[name], dtype=np.float64) for name in wanted}
        found = np.asarray(self._law.loss_nats(self._fit.parameters, values), dtype=np.float64)
        return float(found) if found.ndim == 0 else found

    def to_frame(self, what: str = "parameters") -> pd.DataFrame:
        """parameters: one row each with its interval; points: the runs with measured and fitted loss, nats per token."""
        import numpy as np
        import pandas as pd

        from scaling_lab.api.frames import points

        if what == "points":
            return points(self._points).assign(
                fitted_loss=self._points.loss_nats * np.exp(self._fit.residuals_log)
            )
        if what != "parameters":
            raise unknown("to_frame: the table", what, ("parameters", "points"))
        rows = [
            {
                "parameter": name,
                "estimate": v.estimate,
                "lo": lo,
                "hi": hi,
                "standard_error": v.standard_error,
            }
            for name, v in self.parameters.items()
            for lo, hi in [(None, None) if v.interval is None else v.interval]
        ]
        return pd.DataFrame(rows).set_index("parameter")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Contours of the law over tokens and parameters with the runs. Raises `UserError` for a law of other columns."""
        from scaling_lab.reporting.figures_frontier import parametric_contour

        with drawing_on(ax, height=4.4) as axes:
            if not parametric_contour(axes, self._points, self._estimate):
                raise UserError(f"plot: law={self.law} has no contour over N and D, or is flat here.")
        return axes

    def summary(self) -> str:
        """The fit as text."""
        return "\n".join((repr(self), f"  {self.formula} ({self.source})", f"  {self.message}"))

    def _scalar(self, name: str, value: float) -> ScalarEstimate:
        level, message = self._band.level, self._band.message
        if self._profile is None:
            interval, error = self._band.interval(name), self._band.standard_error(name)
        else:
            ends = self._profile.intervals.get(name)
            interval, error = (None if ends is None else interval_of((ends.lo, ends.hi))), None
            message = self._profile.message if ends is None else ends.message
        return ScalarEstimate(value, interval, level, error, None if interval is not None else message)

    def _of_frontier(self, quantity: str, which: str) -> ScalarEstimate:
        frontier = self._estimate.frontier
        if frontier is None:
            return ScalarEstimate(None, message=self._estimate.message)
        return self._scalar(quantity, getattr(frontier, which).exponent)

    def __repr__(self) -> str:
        head = f"{self.law} on {self._points.n_points} points of {self._data_name}: {self.status}"
        return "\n".join((head, *(f"  {name:<6} {value!r}" for name, value in self.parameters.items())))

    def _repr_html_(self) -> str:
        rows = [(name, value) for name, value in self.parameters.items()]
        return html_table(repr(self).splitlines()[0], ("parameter", "estimate"), rows, self.message)
