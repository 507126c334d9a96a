"""Predictions of the compute-optimal run at given budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling_lab.api.html import html_table
from scaling_lab.api.values import ScalarEstimate, scalar_of
from scaling_lab.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_lab.analysis.inference.prediction import Prediction, Quantity

_QUANTITIES = ("params_opt", "tokens_opt", "tokens_per_param", "loss_opt")
_NO_LOSS = "the approach has no loss to extrapolate here (two budgets show no floor)"


@dataclass(frozen=True)
class PredictedRun:
    """The compute-optimal run at one budget, as one approach sees it."""

    approach: str
    """envelope, isoflop or parametric."""
    compute_flops: float
    params_opt: ScalarEstimate
    """Parameters."""
    tokens_opt: ScalarEstimate
    """Training tokens."""
    tokens_per_param: ScalarEstimate
    loss_opt: ScalarEstimate
    """Nats per token."""
    extrapolation_factor: float
    """How far beyond the data's own range the budget lies, a factor; 1 inside."""

    @classmethod
    def of(cls, found: Prediction, level: float) -> PredictedRun:
        """From the analysis's own value."""

        def scalar(quantity: Quantity | None) -> ScalarEstimate:
            if quantity is None:
                return ScalarEstimate(None, message=_NO_LOSS)
            return ScalarEstimate(quantity.estimate, quantity.interval, level)

        values = {name: scalar(getattr(found, name)) for name in _QUANTITIES}
        return cls(
            found.approach,
            found.compute_flops,
            extrapolation_factor=found.extrapolation_factor,
            **values,
        )

    @classmethod
    def of_json(cls, node: Mapping[str, Any], level: float) -> PredictedRun:
        """From an entry of `predictions` in analysis.json."""
        values = {name: scalar_of(node[name], level, _NO_LOSS) for name in _QUANTITIES}
        return cls(
            node["approach"],
            node["compute_flops"],
            extrapolation_factor=node["extrapolation_factor"],
            **values,
        )


class Predictions:
    """What each approach predicts at one or several compute budgets.

    >>> at = analysis.predict(1e23)
    >>> 1e10 < at.isoflop.params_opt.estimate < 1e12
    True
    >>> bool(at.to_frame().loc[(1e23, "isoflop"), "params_opt"] == at.isoflop.params_opt.estimate)
    True
    """

    def __init__(self, runs: Sequence[PredictedRun], messages: Mapping[str, str]) -> None:
        self.runs = tuple(runs)
        """One for each budget and each approach that has a frontier."""
        self._messages = dict(messages)

    @property
    def compute_flops(self) -> tuple[float, ...]:
        """The budgets, training FLOPs."""
        return tuple(dict.fromkeys(run.compute_flops for run in self.runs))

    def at(self, compute_flops: float) -> Predictions:
        """Those at one of the budgets. Raises `UserError` for a budget that was not asked for."""
        runs = [r for r in self.runs if math.isclose(r.compute_flops, compute_flops, rel_tol=1e-9)]
        if not runs:
            choices = ", ".join(f"{c:g}" for c in self.compute_flops)
            raise UserError(
                f"compute_flops={compute_flops!r} is not among the predictions. Choices: {choices}."
            )
        return Predictions(runs, self._messages)

    @property
    def envelope(self) -> PredictedRun:
        """The envelope's prediction, where one budget was asked for."""
        return self._only("envelope")

    @property
    def isoflop(self) -> PredictedRun:
        """IsoFLOP's prediction, where one budget was asked for."""
        return self._only("isoflop")

    @property
    def parametric(self) -> PredictedRun:
        """The parametric fit's prediction, where one budget was asked for."""
        return self._only("parametric")

    def _only(self, approach: str) -> PredictedRun:
        if len(self.compute_flops) > 1:
            choices = ", ".join(f".at({c:g})" for c in self.compute_flops)
            raise UserError(f"{approach}: several budgets were asked for. Choose one: {choices}.")
        for run in self.runs:
            if run.approach == approach:
                return run
        raise UserError(f"{approach} predicts nothing: {self._messages.get(approach, 'it was not run')}")

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `to_frame`."""
        rows = []
        for run in self.runs:
            row: dict[str, Any] = {"compute_flops": run.compute_flops, "approach": run.approach}
            for name in _QUANTITIES:
                row |= ends_of(name, getattr(run, name))
            rows.append(row | {"extrapolation_factor": run.extrapolation_factor})
        return rows

    def to_frame(self) -> pd.DataFrame:
        """One row a budget and approach: each quantity with its interval's ends (`params_opt_lo`, `params_opt_hi`)."""
        import pandas as pd

        quantities = [f"{name}{end}" for name in _QUANTITIES for end in ("", "_lo", "_hi")]
        columns = ["compute_flops", "approach", *quantities, "extrapolation_factor"]
        return pd.DataFrame(self.rows(), columns=columns).set_index(["compute_flops", "approach"])

    def __repr__(self) -> str:
        lines = [
            f"{r.compute_flops:.3g} FLOPs, {r.approach}: N = {r.params_opt!r}, D = {r.tokens_opt!r}, loss {r.loss_opt!r}"
            for r in self.runs
        ]
        return "\n".join(lines) or f"no predictions: {'; '.join(self._messages.values())}"

    def _repr_html_(self) -> str:
        header = (
            "FLOPs",
            "approach",
            "parameters",
            "tokens",
            "tokens per parameter",
            "loss (nats)",
            "beyond the data",
        )
        rows = [
            (f"{r.compute_flops:.3g}", r.approach, r.params_opt, r.tokens_opt, r.tokens_per_param, r.loss_opt, beyond(r))
            for r in self.runs
        ]  # fmt: skip
        return html_table("Compute-optimal runs", header, rows)


def beyond(run: PredictedRun) -> str:
    """How far a prediction lies beyond the data, in a word."""
    return "inside" if run.extrapolation_factor <= 1 else f"{run.extrapolation_factor:.3g}x"


def ends_of(name: str, value: ScalarEstimate) -> dict[str, float | None]:
    """A scalar as three cells of a frame: the number and the ends of its interval."""
    interval = value.interval
    return {
        name: value.estimate,
        f"{name}_lo": None if interval is None else interval.lo,
        f"{name}_hi": None if interval is None else interval.hi,
    }
