"""The Gemstones law of McLeish et al.: width and depth of the model instead of its size, or together with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scaling_lab.analysis.estimate import Array
from scaling_lab.analysis.laws.sums import LogSumLaw, Slope, Term


@dataclass(frozen=True)
class Gemstones(LogSumLaw):
    """L(w, d, D) = E + A / w^alpha + B / d^beta + T / D^zeta, plus P / N^gamma if `with_params`.

    It has no closed-form frontier in N, because the possible sizes depend on how width and depth determine N.
    """

    name = "gemstones"
    title = "Gemstones L(width, depth, D)"
    source = "McLeish et al. 2025, arXiv 2502.06857 (width, depth and tokens; optionally parameters)"
    formula = "L(w, d, D) = E + A / w^alpha + B / d^beta + T / D^zeta [+ P / N^gamma]"

    with_params: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return ("width", "depth", "n_tokens") + (("n_params",) if self.with_params else ())

    @property
    def terms(self) -> tuple[Term, ...]:
        specification = [("A", "alpha"), ("B", "beta"), ("T", "zeta")]
        if self.with_params:
            specification.append(("P", "gamma"))
        count = len(specification)
        return tuple(
            Term(amplitude, Slope(exponent, tuple(float(i == k) for i in range(count))))
            for k, (amplitude, exponent) in enumerate(specification)
        )

    @property
    def example(self) -> Mapping[str, float]:
        # Plausible values (not from the paper): each term is 10 to 50% of the loss over the typical ranges.
        values = {"E": 1.6, "A": 60.0, "B": 1.5, "T": 3000.0, "alpha": 0.65, "beta": 0.6, "zeta": 0.38}
        return {**values, "P": 300.0, "gamma": 0.33} if self.with_params else values

    def example_columns(self, n: int = 120, seed: int = 0) -> dict[str, Array]:
        """As in the base class, with more points: the law has up to nine parameters."""
        return super().example_columns(n, seed)
