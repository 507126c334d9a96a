"""Tests of the report's tables of profiles, skills and laws: they show the numbers of the analysis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.finding import FindingStatus
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.inference.calibration import LAWS
from scaling_lab.analysis.inference.profiles import Profile, ProfileEnds
from scaling_lab.analysis.studies.profile import as_finding
from scaling_lab.reporting.page import write_report
from scaling_lab.reporting.tables import finding_table


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    law, rng = LAWS["quickstart"], np.random.default_rng(0)
    c = np.repeat([1e11, 4e11, 1.6e12], 7)
    n = law.params_opt(c) * np.tile(np.geomspace(0.25, 4, 7), 3)

    def loss(amplitude: float) -> np.ndarray:
        noise = 0.005 * rng.standard_normal(n.size)
        return law.E + amplitude * law.A * n**-law.alpha + law.B * (c / 6 / n) ** -law.beta + noise

    observations = Observations.from_arrays(
        n_params=n, n_tokens=c / 6 / n, loss_nats=loss(1.0), extra={"rules": loss(0.7), "facts": loss(1.6)}
    )
    settings = AnalysisSettings(
        bootstrap=BootstrapSettings(resamples=60),
        sensitivity=False,
        backtest=False,
        metrics=("rules", "facts"),
        compare_laws=("kaplan_nd",),
    )
    return analyze(observations, settings)


def rows_of(analysis: Analysis, study: str, table: str) -> list[tuple[str, ...]]:
    """The cells of a finding's table as the page shows them."""
    finding = analysis.finding(study)
    assert finding is not None
    return [row.cells for row in finding_table(finding.table(table)).rows]


def test_skills_show_each_columns_optimum_and_their_ratio(analysis: Analysis) -> None:
    rows = rows_of(analysis, "skills", "optima")
    assert [row[:2] for row in rows][:2] == [("rules", "IsoFLOP"), ("rules", "parametric")]
    assert {row[0] for row in rows} == {"rules", "facts"}
    assert all(" to " in row[2] for row in rows)
    (isoflop, _) = ratios = rows_of(analysis, "skills", "ratios")
    assert len(ratios) == 2
    # N_opt goes as the amplitude of N's term to the 1 / (alpha + beta).
    truth = (0.7 / 1.6) ** (1 / (LAWS["quickstart"].alpha + LAWS["quickstart"].beta))
    assert isoflop[0] == "rules over facts"
    assert float(isoflop[2].split()[0]) == pytest.approx(truth, rel=0.1)
    assert " to " in isoflop[2]
    assert isoflop[3] == "yes"
    finding = analysis.finding("skills")
    assert finding is not None
    assert finding.quantity("N_opt of rules over facts").estimate == pytest.approx(truth, rel=0.1)
    assert "they differ" in finding.answer


def test_laws_are_in_the_order_of_their_error(analysis: Analysis) -> None:
    rows = rows_of(analysis, "law_comparison", "laws")
    errors = [float(row[3].rstrip("%")) for row in rows]
    assert errors == sorted(errors)
    assert len(rows) == 2
    assert rows[0][1] == "5"
    finding = analysis.finding("law_comparison")
    assert finding is not None
    assert f"mean error of {rows[0][3]}" in finding.answer


def test_profiles_are_shown_with_the_bootstrap_and_open_ends_are_named(analysis: Analysis) -> None:
    rows = {row[0]: row for row in rows_of(analysis, "profile", "intervals")}
    assert {"E", "A", "B", "α", "β", "a, the exponent of N", "b, the exponent of D"} == set(rows)
    assert all(" to " in row[2] and " to " in row[3] for row in rows.values())
    estimate, band = analysis.estimate("parametric"), analysis.band("parametric")
    message = "These data do not bound E from below."
    open_ended = as_finding(Profile(0.9, "robust", {"E": ProfileEnds(None, 1.2, message)}), estimate, band)
    shown = finding_table(open_ended.table("intervals"))
    assert shown.rows[0].cells[2] == "unbounded to 1.2"
    assert shown.rows[0].mark == "warn"
    assert shown.rows[0].cells[4] == message
    assert open_ended.caveats == (message,)
    none = as_finding(Profile(0.9, "robust", {}, "No profile intervals: why."), estimate, band)
    assert none.tables == ()
    assert none.status is FindingStatus.NOT_ANSWERED
    assert none.reason == "No profile intervals: why."


def test_the_page_has_all_tables(analysis: Analysis, tmp_path: Path) -> None:
    page = write_report(analysis, (), tmp_path).read_text()
    for heading in (
        "Optima per skill",
        "Other laws on the same runs",
        "The same parameters by profile likelihood",
    ):
        assert heading in page
    assert (tmp_path / "figures" / "skills.svg").exists()
