"""One approach of an analysis, read from what analysis.json says about it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from scaling_lab.api.values import NamedScalars, ScalarEstimate, interval_of, scalar_of


class ApproachResult:
    """The envelope, IsoFLOP or the parametric fit: its exponents, parameters and status.

    >>> analysis.isoflop
    isoflop: N ~ C^0.5..., D ~ C^0.4...; converged
    >>> sorted(analysis.parametric.parameters)
    ['A', 'B', 'E', 'alpha', 'beta']
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    @property
    def name(self) -> str:
        """envelope, isoflop or parametric."""
        return str(self._document["approach"])

    @property
    def status(self) -> str:
        """converged, max_steps, at_bound, starts_disagree, not_identified or not_applicable."""
        return str(self._document["status"])

    @property
    def message(self) -> str:
        """One sentence that explains the status."""
        return str(self._document["message"])

    @property
    def caveats(self) -> tuple[str, ...]:
        """What to know before quoting the numbers."""
        return tuple(self._document["diagnostics"])

    @property
    def level(self) -> float:
        """Of the intervals: 0.9 is 90%."""
        return float(self._document["interval"]["level"])

    @property
    def exponent(self) -> ScalarEstimate:
        """a of N_opt ~ C^a: how the best number of parameters grows with compute (Kaplan .73, Chinchilla about .5)."""
        return self._scalar("params_exponent", self._document["params_exponent"])

    @property
    def tokens_exponent(self) -> ScalarEstimate:
        """b of D_opt ~ C^b: how the best number of training tokens grows with compute."""
        return self._scalar("tokens_exponent", self._document["tokens_exponent"])

    @property
    def coefficient(self) -> float | None:
        """k of N_opt = k C^a, C in FLOPs."""
        value = self._document["params_coefficient"]
        return None if value is None else float(value)

    @property
    def tokens_coefficient(self) -> float | None:
        """k of D_opt = k C^b, C in FLOPs."""
        value = self._document["tokens_coefficient"]
        return None if value is None else float(value)

    @property
    def at_mean_compute(self) -> Mapping[str, ScalarEstimate]:
        """`params_opt`, `tokens_opt` (counts) and `loss_opt` (nats per token) at the runs' geometric mean compute."""
        found = self._document["at_mean_compute"]
        names = ("params_opt", "tokens_opt", "loss_opt")
        return {name: scalar_of(found[name], self.level, self.message) for name in names}

    @property
    def law(self) -> str | None:
        """The law that was fitted (parametric only)."""
        return self._document["law"]

    @cached_property
    def parameters(self) -> Mapping[str, ScalarEstimate]:
        """The fitted law's parameters by name, E, A, B in nats per token; empty where no law was fitted."""
        values = self._document["parameters"] or {}
        return NamedScalars({name: self._scalar(name, value) for name, value in values.items()}, self.message)

    @property
    def profile_intervals(self) -> Mapping[str, Any]:
        """Profile-likelihood intervals of the parameters, next to the bootstrap's (parametric only)."""
        profile = self._document.get("profile")
        found = {} if profile is None else profile["intervals"]
        return {name: interval_of(ends) for name, ends in found.items()}

    @property
    def budgets(self) -> tuple[Mapping[str, Any], ...]:
        """The valley of each compute budget (IsoFLOP only): its minimum, or why there is none."""
        return tuple(self._document["budgets"])

    def _scalar(self, name: str, value: float | None) -> ScalarEstimate:
        band = self._document["interval"]
        interval = interval_of(band.get(name))
        message = self.message if value is None else band["message"] if interval is None else None
        error = self._document["standard_errors"].get(name)
        return ScalarEstimate(value, None if value is None else interval, self.level, error, message)

    def __repr__(self) -> str:
        if self.exponent.estimate is None:
            return f"{self.name}: {self.status}: {self.message}"
        return f"{self.name}: N ~ C^{self.exponent!r}, D ~ C^{self.tokens_exponent!r}; {self.status}"
