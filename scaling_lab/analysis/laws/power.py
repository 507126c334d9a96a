"""Power laws in one variable, L(N), L(D) and L(C), with and without an irreducible loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scaling_lab.analysis.laws.sums import LogSumLaw, Slope, Term


@dataclass(frozen=True)
class _Power(LogSumLaw):
    """L(x) = E + A / x^alpha; without `irreducible`, L(x) = A / x^alpha = (x_c / x)^alpha with x_c = A^(1/alpha)."""

    irreducible: bool = True

    @property
    def has_irreducible(self) -> bool:
        return self.irreducible

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("A", Slope("alpha", (1.0,))),)

    def _example(self, scale: float, alpha: float) -> dict[str, float]:
        floor = {"E": 1.7} if self.irreducible else {}
        return {**floor, "A": float(scale**alpha), "alpha": alpha}


@dataclass(frozen=True)
class PowerN(_Power):
    """Loss of models trained to convergence, as a function of their size."""

    name = "power_n"
    title = "Power law L(N)"
    source = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.1 (no E); Henighan et al. 2020, arXiv 2010.14701 (with E)"
    formula = "L(N) = E + A / N^alpha"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_params",)

    @property
    def example(self) -> Mapping[str, float]:
        return self._example(8.8e13, 0.076)


@dataclass(frozen=True)
class PowerD(_Power):
    """Loss of large models stopped early, as a function of their training tokens."""

    name = "power_d"
    title = "Power law L(D)"
    source = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.2 (no E); Henighan et al. 2020, arXiv 2010.14701 (with E)"
    formula = "L(D) = E + A / D^alpha"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("n_tokens",)

    @property
    def example(self) -> Mapping[str, float]:
        return self._example(5.4e13, 0.095)


@dataclass(frozen=True)
class PowerC(_Power):
    """Loss of compute-optimal models, as a function of training FLOPs."""

    name = "power_c"
    title = "Power law L(C)"
    source = "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.3 (no E); Henighan et al. 2020, arXiv 2010.14701 (with E)"
    formula = "L(C) = E + A / C^alpha"

    @property
    def columns(self) -> tuple[str, ...]:
        return ("compute_flops",)

    @property
    def example(self) -> Mapping[str, float]:
        # C_c = 3.1e8 PF-days of 8.64e19 FLOPs (Kaplan et al. 2020, appendix A).
        return self._example(3.1e8 * 8.64e19, 0.050)
