"""Tests of the published results: numbers that papers print, from their own data, and how differences are reported."""

from __future__ import annotations

import json

import pytest

from scaling_lab.analysis.estimate import Interval
from scaling_lab.analysis.reproduce import (
    ComparisonRow,
    ReproduceSettings,
    Reproduction,
    packed,
    publication_names,
    reproduce,
)
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError

NAMES = ("besiroglu2024", "gemstones2025", "hoffmann2022", "misfitting2025", "muennighoff2023", "porian2024")


@pytest.fixture(scope="module")
def made() -> dict[str, Reproduction]:
    return {name: reproduce(name, resamples=800) for name in publication_names()}


def test_the_list_of_publications() -> None:
    assert publication_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_difference_has_a_reason(made: dict[str, Reproduction], name: str) -> None:
    """Every comparison that differs from the paper has an explanation."""
    compared = 0
    for row in made[name].rows:
        compared += row.published is not None
        if row.verdict in ("differs", "OUTSIDE", "as printed, OUTSIDE", "lower", "HIGHER"):
            assert row.remark, row.quantity
        assert row.verdict != "HIGHER", f"{row.quantity}: a worse optimum than the published one"
    assert compared >= 5
    assert made[name].table is None or made[name].table.is_file()


def test_besiroglu(made: dict[str, Reproduction]) -> None:
    r = made["besiroglu2024"]
    assert all(row.inside for row in r.parts[0].rows)
    assert 0.512 <= r.row("a = beta/(alpha+beta)").ours <= 0.516
    assert 0.016 <= r.row("SE(a)", 1).ours <= 0.023
    for row in r.parts[1].rows:
        # Resampling noise at 800: 2.5% for near-normal samples, A and B have long tails.
        assert row.ours == pytest.approx(
            float(row.published or 0), rel=0.25 if row.quantity in ("SE(A)", "SE(B)") else 0.12
        )
    optimum = r.row("objective at our optimum", 2).ours
    assert optimum <= 0.00101828
    # The optimum is lower than the paper's point, and that is lower than Hoffmann's constants.
    theirs = r.row("objective at the paper's rounded point", 2).ours
    assert optimum < theirs < r.row("objective at Hoffmann's unrounded constants", 2).ours
    assert r.row("a with all 245 points", 2).ours == pytest.approx(0.5646, abs=5e-5)


def test_hoffmann(made: dict[str, Reproduction]) -> None:
    r = made["hoffmann2022"]
    # By hand: a = .28/.62 and .28491/(.33917 + .28491).
    assert r.row("approach 3, a, printed constants").ours == pytest.approx(0.28 / 0.62, abs=1e-12)
    assert r.row("approach 3, a, unrounded constants").ours == pytest.approx(0.28491 / 0.62408, abs=1e-12)
    assert all(row.as_printed for row in r.parts[0].rows[:4])
    for row in r.parts[1].rows:
        assert row.ours == pytest.approx(float(row.published or 0), rel=0.05), row.quantity
    assert r.row("tokens of a 67B model", 1).verdict == "differs"
    trap = {row.quantity: row.ours for row in r.parts[2].rows}
    assert [round(v) for v in trap.values()] == [20, 22, 93, 59, 18]


def test_porians_steps_lie_in_the_published_intervals(made: dict[str, Reproduction]) -> None:
    r = made["porian2024"]
    chain, parabola, further = r.parts[0], r.parts[2], r.parts[-1]
    assert [row.published for row in chain.rows] == ["0.835", "0.706", "0.602", "0.571", "0.497"]
    assert all(row.inside for row in (*chain.rows, *further.rows))
    exponents = [row.ours for row in chain.rows]
    assert exponents == sorted(exponents, reverse=True)
    # The parabola on the same points falls outside the intervals, which is the purpose of this table.
    assert sum(row.inside is False for row in parabola.rows) >= 3


def test_gemstones(made: dict[str, Reproduction]) -> None:
    keep, drop, _, parametric = made["gemstones2025"].parts
    assert [round(row.ours, 4) for row in keep.rows] == [0.4579, 0.4994]
    assert [round(row.ours, 4) for row in drop.rows] == [0.4424, 0.4886]
    objective, a, small_objective, small_a = (row.ours for row in parametric.rows)
    assert objective <= 0.0065926
    assert small_objective <= 0.00069240
    assert a == pytest.approx(0.6974, abs=1e-4)
    assert small_a == pytest.approx(0.6958, abs=1e-4)


def test_misfitting(made: dict[str, Reproduction]) -> None:
    r = made["misfitting2025"]
    assert r.row("objective").ours <= 0.0050217
    for row in r.parts[0].rows:
        assert row.ours == pytest.approx(float(row.published or 0), rel=2e-3), row.quantity
    for row in r.parts[1].rows:
        assert row.ours == pytest.approx(float(row.published or 0), rel=1e-4), row.quantity
    lo, hi = (row.ours for row in r.parts[2].rows[:2])
    assert lo == pytest.approx(0.61, abs=0.03)
    assert hi == pytest.approx(0.90, abs=0.03)


def test_muennighoff(made: dict[str, Reproduction]) -> None:
    r = made["muennighoff2023"]
    assert r.parts[0].rows[0].ours == pytest.approx(2.2256440889984477, abs=1e-9)
    assert r.parts[0].rows[1].ours == pytest.approx(2.2269634075087867, abs=1e-9)
    assert all(row.as_printed for row in r.parts[1].rows[:3])
    # Closed forms: 1 + R*(1 - e^(-3/R*)) and e^(-3/R*), with R* = 15.387756.
    assert r.row("4 epochs are worth, in fresh epochs", 2).ours == pytest.approx(3.72567, abs=1e-5)
    assert r.row("the next token after 4 epochs, in fresh tokens", 2).ours == pytest.approx(
        0.822867, abs=1e-5
    )
    assert r.row("infinitely many epochs are worth, in fresh epochs", 2).ours == pytest.approx(
        16.387756, abs=1e-5
    )


@pytest.mark.parametrize(
    ("row", "as_printed", "inside", "verdict"),
    [
        (ComparisonRow("x", 0.51349, "0.513"), True, None, "as printed"),
        (ComparisonRow("x", 0.5136, "0.513"), False, None, "differs"),
        (ComparisonRow("x", 0.5136, "0.513", Interval(0.5, 0.52), "95%"), False, True, "inside"),
        (ComparisonRow("x", 0.53, "0.513", Interval(0.5, 0.52), "95%"), False, False, "OUTSIDE"),
        (
            ComparisonRow("x", 0.457, "0.46", Interval(0.454, 0.455), "95%"),
            True,
            False,
            "as printed, OUTSIDE",
        ),
        (ComparisonRow("x", 1.449e12, "1.4e12"), True, None, "as printed"),
        (ComparisonRow("x", 1.451e12, "1.4e12"), False, None, "differs"),
        (ComparisonRow("x", 0.9, "1.0", lower_is_better=True), False, None, "lower"),
        (ComparisonRow("x", 1.1, "1.0", lower_is_better=True), False, None, "HIGHER"),
        (ComparisonRow("x", 1.0), None, None, ""),
    ],
)
def test_how_a_row_is_judged(
    row: ComparisonRow, as_printed: bool | None, inside: bool | None, verdict: str
) -> None:
    assert (row.as_printed, row.inside, row.verdict) == (as_printed, inside, verdict)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'porian2024'"):
        reproduce("porian2042")
    for bad in (
        {},
        {"published": "x"},
        {"published": "all", "resamples": 3},
        {"published": "all", "seed": -1},
    ):
        with pytest.raises(UserError):
            ReproduceSettings(**bad)
    with pytest.raises(ValueError, match="both an interval and its kind"):
        ComparisonRow("x", 1.0, "1.0", Interval(0.0, 2.0))


def test_packed_tables_are_small_and_state_their_provenance() -> None:
    text = packed("README.md").read_text()
    tables = sorted(packed("README.md").parent.glob("*.csv"))
    assert sum(p.stat().st_size for p in tables) < 450_000
    for path in tables:
        assert f"`{path.name}`" in text


def test_the_command_prints_the_table_the_reason_and_the_next_command(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "published=hoffmann2022"]) == 0
    out = capsys.readouterr().out
    for part in ("rounding trap", "92.6", "93*", "as printed, OUTSIDE", "(1) ", "arXiv 2203.15556"):
        assert part in out
    assert out.splitlines()[-1].startswith("next: scaling-lab ")
    assert list(tmp_path.iterdir()) == []


def test_all_as_json_in_the_same_numbers(capsys, made: dict[str, Reproduction]) -> None:
    assert main(["reproduce", "published=all", "resamples=800", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in document["publications"]] == list(NAMES)
    for publication in document["publications"]:
        rows = [row for part in publication["parts"] for row in part["rows"]]
        assert [row["ours"] for row in rows] == [row.ours for row in made[publication["name"]].rows]
        for row in rows:
            assert (row["published"] is None) == (row["difference"] is None)


def test_the_next_command_gives_the_same_number(capsys, made: dict[str, Reproduction]) -> None:
    """The suggested command runs and gives the number of the row."""
    r = made["porian2024"]
    argv = ["analyze", f"runs={r.table}", *str(r.parts[0].options).split(), "bootstrap.resamples=0"]
    assert main([*argv, "sensitivity=false", "backtest=false", "--json"]) == 0
    isoflop = json.loads(capsys.readouterr().out)["estimates"][1]
    assert isoflop["params_exponent"] == r.parts[0].rows[0].ours
