"""Hoffmann et al. 2022 (Chinchilla): what follows from the printed constants and tables.

The runs are not public, so Approaches 1 and 2 cannot be recomputed, but the printed numbers can be checked against each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling_lab.analysis.estimate import Interval
from scaling_lab.analysis.frontiers import fit_lines
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.reproduce import (
    ComparisonRow,
    ComparisonTable,
    Publication,
    ReproduceSettings,
    estimate_packed,
)
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.counts import FLOPS_PER_PARAM_TOKEN

# Hoffmann et al. 2022 (arXiv 2203.15556), appendix D.3: as printed.
_ROUNDED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# Table 3, Approach 1: parameters, FLOPs, tokens, as printed.
_TABLE_3 = (
    ("400M", 400e6, 1.92e19, "8.0e9"),
    ("1B", 1e9, 1.21e20, "20.2e9"),
    ("10B", 10e9, 1.23e22, "205.1e9"),
    ("67B", 67e9, 5.76e23, "1.5e12"),
    ("175B", 175e9, 3.85e24, "3.7e12"),
    ("280B", 280e9, 9.90e24, "5.9e12"),
    ("520B", 520e9, 3.43e25, "11.0e12"),
    ("1T", 1e12, 1.27e26, "21.2e12"),
    ("10T", 10e12, 1.30e28, "216.2e12"),
)
# The compute of Gopher and of Chinchilla.
_GOPHER_FLOPS = 5.76e23


@dataclass(frozen=True)
class Hoffmann2022(Publication):
    """Tables 2 and 3 from the printed constants, and the effect of rounding the constants."""

    kind = "hoffmann2022"
    title = "Chinchilla's tables from its own constants"
    reference = "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, arXiv 2203.15556"
    data = "the printed constants and tables; the runs themselves were not published"

    def parts(self, settings: ReproduceSettings) -> Sequence[ComparisonTable]:
        unrounded = dict(get_law("chinchilla").example)
        return (
            ComparisonTable("table 2: exponents of N_opt ~ C^a, D_opt ~ C^b", _table_2(unrounded)),
            ComparisonTable("table 3: tokens = FLOPs / 6 N", _table_3()),
            ComparisonTable(
                f"the rounding trap: tokens per parameter at {_GOPHER_FLOPS:g} FLOPs", _rounding(unrounded)
            ),
        )


def _table_2(unrounded: Mapping[str, float]) -> tuple[ComparisonRow, ...]:
    n, c = np.log([row[1] for row in _TABLE_3]), np.log([row[2] for row in _TABLE_3])
    d = np.log([float(row[3]) for row in _TABLE_3])
    weight = np.ones(n.size)
    a1, b1 = (float(fit_lines(c, y, weight)[0]) for y in (n, d))
    through = "A power law through the nine rows of table 3."
    law = get_law("chinchilla")
    printed, full = law.frontier(_ROUNDED), law.frontier(unrounded)
    assert printed is not None
    assert full is not None
    narrow = (
        "The paper's own unrounded optimum lies outside its interval, which is too narrow: 240 points cannot determine a to"
        " .001 (Besiroglu et al. 2024)."
    )
    rounded = "Rounding alpha and beta to two digits changes a by .005."
    a3, b3 = (Interval(0.454, 0.455), "10-90%"), (Interval(0.542, 0.543), "10-90%")
    return (
        ComparisonRow("approach 1, a", a1, "0.50", Interval(0.488, 0.502), "10-90%", remark=through),
        ComparisonRow("approach 1, b", b1, "0.50", Interval(0.501, 0.512), "10-90%", remark=f"{through} The paper's .50 is outside, too."),
        ComparisonRow("approach 3, a, unrounded constants", float(full.params_exponent), "0.46", *a3, remark=narrow),
        ComparisonRow("approach 3, b, unrounded constants", float(full.tokens_exponent), "0.54", *b3, remark=narrow),
        ComparisonRow("approach 3, a, printed constants", float(printed.params_exponent), "0.46", *a3, remark=rounded),
        ComparisonRow("approach 3, b, printed constants", float(printed.tokens_exponent), "0.54", *b3, remark=rounded),
    )  # fmt: skip


def _table_3() -> tuple[ComparisonRow, ...]:
    rows = []
    for name, n, flops, tokens in _TABLE_3:
        ours = flops / (FLOPS_PER_PARAM_TOKEN * n)
        low, high = (1 - 0.005 / _mantissa(flops), 1 + 0.005 / _mantissa(flops))
        within = low <= float(tokens) / ours <= high
        remark = (
            "Equal within the rounding of the FLOPs, which are printed to three digits."
            if within
            else f"The row is inconsistent: 6 N D = {FLOPS_PER_PARAM_TOKEN * n * float(tokens):.3g}, not"
            f" {flops:.3g}, the compute of Gopher; {ours / 1e12:.2f}T tokens would be consistent."
        )
        rows.append(ComparisonRow(f"tokens of a {name} model", ours, tokens, remark=remark))
    return tuple(rows)


def _rounding(unrounded: Mapping[str, float]) -> tuple[ComparisonRow, ...]:
    six_n_d = AnalysisSettings(where={"dropped_by_besiroglu": 0})
    refit = estimate_packed("chinchilla_epoch245.csv", "parametric", six_n_d).frontier
    assert refit is not None
    refitted = float(refit.tokens(_GOPHER_FLOPS) / refit.params(_GOPHER_FLOPS))
    chinchilla = "70B parameters and 1.4T tokens: Chinchilla as trained, by Approaches 1 and 2."
    return (
        ComparisonRow("Chinchilla as trained", 1.4e12 / 70e9, "20", remark=chinchilla),
        ComparisonRow("approach 1, table 3's exponents and 67B row", 1.5e12 / 67e9),
        ComparisonRow(
            "approach 3, printed constants", _tokens_per_param(_ROUNDED), "93", source="reference",
            remark="alpha = .34 and beta = .28 are rounded by 1%, which at this compute changes D/N by a factor of 1.6: do not"
            " compute an optimum from rounded constants.",
        ),
        ComparisonRow(
            "approach 3, unrounded constants", _tokens_per_param(unrounded), "59", source="reference",
            remark="Still three times Chinchilla's 20: the fit had not converged (Besiroglu et al. 2024).",
        ),
        ComparisonRow(
            "approach 3, refitted to their figure's 240 points", refitted, "18", source="reference",
            remark="At the optimum of their objective, Approach 3 agrees with Approaches 1 and 2 (`published=besiroglu2024`).",
        ),
    )  # fmt: skip


def _tokens_per_param(parameters: Mapping[str, float]) -> float:
    optimum = get_law("chinchilla").frontier(parameters)
    assert optimum is not None
    n = optimum.params_coefficient * _GOPHER_FLOPS**optimum.params_exponent
    d = optimum.tokens_coefficient * _GOPHER_FLOPS**optimum.tokens_exponent
    return float(d / n)


def _mantissa(x: float) -> float:
    return float(x / 10.0 ** np.floor(np.log10(x)))
