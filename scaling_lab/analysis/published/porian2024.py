"""Porian et al. 2024: from Kaplan's exponent to Chinchilla's, one cause at a time."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scaling_lab.analysis.approaches import IsoFlopSettings
from scaling_lab.analysis.estimate import BudgetStatus, Estimate, Interval
from scaling_lab.analysis.reproduce import (
    ComparisonRow,
    ComparisonTable,
    Publication,
    ReproduceSettings,
    estimate_packed,
    packed,
    params_exponent,
)
from scaling_lab.analysis.settings import AnalysisSettings, ApproachSettings

_TABLE = "porian_isoflop_refinedweb.csv"
_PUBLISHED = "porian_isoflop_refinedweb_published.csv"
# The paper's sequence of experiments on RefinedWeb: each step corrects one cause. Names are those of the release.
_CHAIN = {
    "rw_base_long_kaplan_kaplan_train": "as Kaplan: without the last layer",
    "rw_base_long_kaplan_standard_val": "+ the last layer's FLOPs counted",
    "rw_base_short_kaplan_standard_val": "+ warm-up short enough for small models",
    "rw_base_short_chinchilla_standard_val": "+ cosine matched to the horizon",
    "rw_tuned_short_const_standard_val": "+ optimizer tuned (no decay)",
}
_FURTHER = {
    "rw_base_long_kaplan_attention_train": "attention counted, otherwise step 2",
    "rw_base_short_kaplan_attention_train": "attention counted, step 3",
    "rw_base_short_chinchilla_attention_train": "attention counted, step 4",
    "rw_tuned_short_const_attention_train": "attention counted, step 5",
    "rw_tuned_long_const_kaplan_train": "tuned, but last layer not counted, long warm-up",
}
# The authors' method to find minima, and other common ones.
_AKIMA = IsoFlopSettings(minimum="akima")
_PARABOLA = IsoFlopSettings(minimum="parabola")
_WHOLE = IsoFlopSettings(minimum="parabola", window_log_params=None)
_SHARED = IsoFlopSettings(minimum="shared")


@dataclass(frozen=True)
class Porian2024(Publication):
    """Exponents of ten experiments by Akima interpolation, as in the paper, and by other methods on the same points."""

    kind = "porian2024"
    title = "From Kaplan's .84 to Chinchilla's .50 on RefinedWeb"
    reference = "Porian et al. 2024, Resolving Discrepancies in Compute-Optimal Scaling, arXiv 2406.19146"
    data = "10 experiments of up to 12 budgets, losses at exactly each budget, from the authors' release"
    table = _TABLE

    def parts(self, settings: ReproduceSettings) -> Sequence[ComparisonTable]:
        with packed(_PUBLISHED).open(encoding="utf-8", newline="") as file:
            published = {row["experiment"]: row for row in csv.DictReader(file)}
        example = next(iter(_CHAIN))
        options = f"where.experiment={example} approach.isoflop.minimum="
        return (
            ComparisonTable(
                "the sequence, exponent a, minima by Akima as in the paper",
                tuple(_akima_row(n, published[e], e) for e, n in _CHAIN.items()),
                f"{options}akima",
            ),
            ComparisonTable(
                "the same, compared with the authors' fit without weights",
                tuple(_unweighted_row(n, published[e], e) for e, n in _CHAIN.items()),
                f"{options}akima",
            ),
            ComparisonTable(
                "the same points, minima by a parabola over sizes within a factor of twelve of the best",
                tuple(_other_row(n, published[e], e, _PARABOLA) for e, n in _CHAIN.items()),
                f"{options}parabola",
            ),
            ComparisonTable(
                "the same points, a parabola through all sizes, as in Hoffmann et al.",
                tuple(_other_row(n, published[e], e, _WHOLE) for e, n in _CHAIN.items()),
                f"{options}parabola approach.isoflop.window_log_params=null",
            ),
            ComparisonTable(
                "the same points, valleys of one shared asymmetric shape (our default)",
                tuple(_other_row(n, published[e], e, _SHARED) for e, n in _CHAIN.items()),
                f"{options}shared",
            ),
            ComparisonTable(
                "five other experiments, minima by Akima",
                tuple(_akima_row(n, published[e], e) for e, n in _FURTHER.items()),
            ),
        )


def _akima_row(name: str, published: Mapping[str, str], experiment: str) -> ComparisonRow:
    estimate = _estimate(experiment, _AKIMA)
    remark = "The authors weight budgets by simulated seed noise; ours have equal weights." + _budgets_remark(
        estimate, published
    )
    return _row(name, params_exponent(estimate), published, remark)


def _unweighted_row(name: str, published: Mapping[str, str], experiment: str) -> ComparisonRow:
    """Comparison with the authors' fit without weights (`a_basic` of the release)."""
    estimate = _estimate(experiment, _AKIMA)
    text = f"{float(published['a_basic']):.4f}"
    remark = (
        _budgets_remark(estimate, published)
        or " The budgets are the same; the release does not explain the remaining difference."
    )
    return ComparisonRow(name, params_exponent(estimate), text, source="release", remark=remark.strip())


def _budgets_remark(estimate: Estimate, published: Mapping[str, str]) -> str:
    """A sentence that names budgets that we leave out and the authors use; empty if there are none."""
    left_out = [b for b in estimate.budgets if b.status is not BudgetStatus.OK]
    used, theirs = len(estimate.budgets) - len(left_out), int(published["n_flops"])
    if used == theirs:
        return ""
    named = ", ".join(f"{b.budget_flops:.3g} ({b.status.value})" for b in left_out)
    return f" They use {theirs} budgets here, we use {used}, without {named}: there the best sampled size is the smallest or largest."


def _other_row(
    name: str, published: Mapping[str, str], experiment: str, settings: IsoFlopSettings
) -> ComparisonRow:
    estimate = _estimate(experiment, settings)
    row = _row(name, params_exponent(estimate), published, None)
    if row.inside:
        return row
    remark = (
        "On the same points the method to find minima changes a by .01 to .07: valleys are asymmetric, and distant sizes"
        " bias a fit through many sizes. The published intervals reflect seed noise only."
    )
    return _row(name, row.ours, published, remark)


def _row(name: str, ours: float, published: Mapping[str, str], remark: str | None) -> ComparisonRow:
    interval = Interval(float(published["a_lo95"]), float(published["a_hi95"]))
    return ComparisonRow(name, ours, f"{float(published['a']):.3f}", interval, "95%", "release", remark)


def _estimate(experiment: str, isoflop: IsoFlopSettings) -> Estimate:
    settings = AnalysisSettings(where={"experiment": experiment}, approach=ApproachSettings(isoflop=isoflop))
    return estimate_packed(_TABLE, "isoflop", settings)
