"""Tests of the report's tables of profiles, skills and laws: what they show is what the analysis holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.inference.calibration import LAWS
from scaling_lab.analysis.inference.profiles import Profile, ProfileEnds
from scaling_lab.reporting import tables_checks
from scaling_lab.reporting.page import write_report


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


def test_skills_show_each_columns_optimum_and_their_ratio(analysis: Analysis) -> None:
    assert analysis.skills is not None
    table = tables_checks.skills(analysis.skills)
    assert [(r.cells[0], r.cells[1]) for r in table.rows][:2] == [
        ("rules", "IsoFLOP"),
        ("rules", "parametric"),
    ]
    assert {r.cells[0] for r in table.rows} == {"rules", "facts"}
    assert all(" to " in r.cells[2] for r in table.rows)
    (isoflop, _) = ratios = tables_checks.skill_ratios(analysis.skills).rows
    assert len(ratios) == 2
    # N_opt goes as the amplitude of N's term to the 1 / (alpha + beta).
    truth = (0.7 / 1.6) ** (1 / (LAWS["quickstart"].alpha + LAWS["quickstart"].beta))
    assert isoflop.cells[0] == "rules over facts"
    assert float(isoflop.cells[2]) == pytest.approx(truth, rel=0.1)
    assert isoflop.cells[4] == "yes"


def test_laws_are_in_the_order_of_their_error(analysis: Analysis) -> None:
    assert analysis.law_comparison is not None
    rows = tables_checks.laws(analysis.law_comparison).rows
    errors = [float(r.cells[3].rstrip("%")) for r in rows]
    assert errors == sorted(errors)
    assert len(rows) == 2
    assert rows[0].cells[1] == "5"


def test_profiles_stand_beside_the_bootstrap_and_open_ends_are_said(analysis: Analysis) -> None:
    table = tables_checks.profile(analysis.profile, analysis)
    assert table is not None
    rows = {r.cells[0]: r for r in table.rows}
    assert {"E", "A", "B", "α", "β", "a, the exponent of N", "b, the exponent of D"} == set(rows)
    assert all(" to " in r.cells[2] and " to " in r.cells[3] for r in rows.values())
    open_ended = Profile(
        0.9, "robust", {"E": ProfileEnds(None, 1.2, "These data do not bound E from below.")}
    )
    shown = tables_checks.profile(open_ended, analysis)
    assert shown is not None
    assert shown.rows[0].cells[2] == "unbounded to 1.2"
    assert shown.rows[0].mark == "warn"
    assert shown.rows[0].cells[4] == "These data do not bound E from below."
    assert tables_checks.profile(Profile(0.9, "robust", {}, "No profile intervals: why."), analysis) is None


def test_the_page_has_them_all(analysis: Analysis, tmp_path: Path) -> None:
    page = write_report(analysis, (), tmp_path).read_text()
    for heading in (
        "Optima per skill",
        "Other laws on the same runs",
        "The same parameters by profile likelihood",
    ):
        assert heading in page
    assert (tmp_path / "figures" / "skills.svg").exists()
