"""Tests of the predicted exponents in D of facts: by hand, in the limit, recovered from their own curves, and from training."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import train
from helpers.specs import tiny
from helpers.synthetic import QUICKSTART_LAW, make_record, make_spec
from scaling_lab.analysis.analysis import find_in_records
from scaling_lab.analysis.data.sweep_records import split_by_role
from scaling_lab.analysis.finding import FindingStatus
from scaling_lab.analysis.studies.fact_exponents import compare, comparisons, exponent_of, fitted_scale
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.evaluation import EvalSpec
from scaling_lab.core.record import RunRecord
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.generation.zipf_exposure import (
    asymptotic_exponent,
    expected_share_known,
    expected_share_unknown,
    unknown_exponent,
)
from scaling_lab.core.sources.zipf_facts import ZipfFacts
from scaling_lab.core.spec import OptimizerSpec
from scaling_lab.core.storage.store import RunStore

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "zipf_facts_exponents.py"
FACTS = ZipfFacts(facts=2000, slope=0.5, symbols=50)
HORIZONS = (1e4, 2e4, 4e4, 8e4, 1.6e5)


def test_the_local_exponent_by_hand() -> None:
    """Two facts of 2/3 and 1/3. Unknown after D: 2/3 (1/3)^D + 1/3 (2/3)^D, at D = 1 4/9, both terms 2/9."""
    source = ZipfFacts(facts=2, symbols=2, slope=0.0)
    assert expected_share_unknown(source, 1) == pytest.approx(4 / 9)
    assert unknown_exponent(source, 1) == pytest.approx((math.log(3) + math.log(1.5)) / 2)
    # At D = 2: 2/3 * 1/9 + 1/3 * 4/9 = 2/27 + 4/27.
    wanted = 2 * (2 * math.log(3) + 4 * math.log(1.5)) / 6
    assert unknown_exponent(source, 2) == pytest.approx(wanted)


@pytest.mark.parametrize("statements", [0.5, 300, 1e5])
def test_the_local_exponent_is_the_slope_of_the_exact_share(statements: float) -> None:
    unknown = [1 - expected_share_known(FACTS, statements * step) for step in (0.999, 1.001)]
    wanted = -math.log(unknown[1] / unknown[0]) / math.log(1.001 / 0.999)
    assert unknown_exponent(FACTS, statements) == pytest.approx(wanted, rel=1e-4)
    assert expected_share_unknown(FACTS, statements) == pytest.approx(
        1 - expected_share_known(FACTS, statements), rel=1e-9
    )


@pytest.mark.parametrize(("slope", "facts"), [(0.7, 262_144), (1.0, 262_144), (1.5, 10_000)])
def test_many_facts_have_the_exponent_of_infinitely_many(slope: float, facts: int) -> None:
    """Away from both ends of the curve. Probabilities are integers over 2^32, at least 1: steep laws with many facts end in a flat tail."""
    source = ZipfFacts(facts=facts, slope=slope, symbols=512)
    assert asymptotic_exponent(slope) == pytest.approx(slope / (1 + slope))
    assert unknown_exponent(source, 3e4) == pytest.approx(asymptotic_exponent(slope), abs=0.01)
    # With few facts left the curve falls faster than any power.
    assert unknown_exponent(ZipfFacts(facts=100, slope=slope), 1e6) > 3


def curve(scale: float, unit: float = 1.0) -> list[float]:
    return [unit * expected_share_unknown(FACTS, d / FACTS.statement_tokens / scale) for d in HORIZONS]


@pytest.mark.parametrize("scale", [0.5, 1.0, 7.0, 60.0])
def test_the_scale_is_recovered_from_a_predicted_curve(scale: float) -> None:
    statements = np.array(HORIZONS) / FACTS.statement_tokens
    assert fitted_scale(FACTS, statements, curve(scale)) == pytest.approx(scale, rel=1e-3)
    found = compare(FACTS, HORIZONS[::-1], "1 - exact_match", curve(scale)[::-1])
    assert list(found.train_tokens) == list(HORIZONS)
    assert found.scale == pytest.approx(scale, rel=1e-3)
    assert found.exponent.value == pytest.approx(found.predicted_exponent, abs=1e-4)
    assert found.rms_log < 1e-3
    assert list(found.scale_of_each) == pytest.approx([scale] * 5, rel=1e-3)
    low, high = found.local_exponents
    assert low < found.predicted_exponent < high
    # An unknown value costs ln(symbols) for each of its tokens.
    values = compare(FACTS, HORIZONS, "value_loss_nats", curve(scale, math.log(50)))
    assert values.scale == pytest.approx(scale, rel=1e-3)


def test_a_steeper_curve_is_not_explained_by_the_scale() -> None:
    steep = compare(FACTS, HORIZONS, "1 - exact_match", [(d / 1e4) ** -0.9 for d in HORIZONS])
    assert steep.exponent.value == pytest.approx(0.9)
    assert steep.exponent.standard_error == pytest.approx(0, abs=1e-9)
    assert steep.predicted_exponent < 0.7
    assert steep.rms_log > 0.2
    # Each run alone gives a smaller scale than the one before; no scale explains the first, which knows nothing.
    assert steep.scale_of_each[0] is None
    later = steep.scale_of_each[1:]
    assert list(later) == sorted(later, reverse=True)
    assert later[0] > 2 * later[-1]


def test_the_standard_error_by_hand() -> None:
    # ln y over ln x = 0, 1, 2: 0, -1, -1. The line through them falls by 1/2; residuals 1/6, -1/3, 1/6.
    found = exponent_of(np.exp([0, 1, 2]), np.exp([0, -1, -1]))
    assert found.value == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2))


def test_data_without_an_exponent_is_refused() -> None:
    with pytest.raises(UserError, match="2 horizons, an exponent needs at least 3"):
        compare(FACTS, [1e4, 2e4, 2e4], "1 - exact_match", [0.5, 0.4, 0.4])
    with pytest.raises(UserError, match=r"1 - exact_match is 0 at D=2e\+04 tokens: raise eval.tokens"):
        compare(FACTS, [1e4, 2e4, 4e4], "1 - exact_match", [0.5, 0.0, 0.1])
    with pytest.raises(UserError, match="no scale from 0.01 to 1e\\+06"):
        compare(FACTS, [1e4, 2e4, 4e4], "1 - exact_match", [1.0, 1.0, 1.0])


def trained(width: int, tokens: float, share: float) -> RunRecord:
    """A finished run with the scores of a model that does not know this share of the values."""
    rng = np.random.default_rng(0)
    shape = GPTShape(width=width, depth=1, heads=1, context=40)
    spec = make_spec(shape, 1e9, 0, 40, Convention.SIX_N_WITH_HEAD, "facts")
    spec = replace(spec, data=FACTS, train_tokens=int(tokens), role="lr_sweep")
    record = make_record(spec, QUICKSTART_LAW, rng, noise=0.0, curve_points=2)
    return replace(
        record, metrics={"exact_match": 1 - share, "value_loss_nats": share * math.log(FACTS.symbols)}
    )


def test_the_study_takes_the_largest_size_that_has_enough_horizons() -> None:
    shares = dict(zip(HORIZONS, curve(7.0)))
    small = [trained(16, d, 0.9 * shares[d]) for d in HORIZONS]
    large = [trained(32, d, shares[d]) for d in HORIZONS[::-1]]
    largest = [trained(64, d, 0.5) for d in HORIZONS[:2]]
    (found,) = find_in_records(split_by_role([*small, *large, *largest]))
    assert found.name == "fact_exponents"
    expected = compare(FACTS, HORIZONS, "1 - exact_match", curve(7.0))
    row = found.table("exponents").rows[0]
    assert row[2] == pytest.approx(expected.exponent.value)
    assert row[7] == pytest.approx(7.0, rel=1e-3)
    quantity = found.quantities[0]
    assert quantity.estimate == pytest.approx(expected.exponent.value)
    assert quantity.published[0].value == pytest.approx(0.5 / 1.5)
    assert f"falls as D^-{expected.exponent.value:.3f}" in found.answer
    assert found.chart is not None
    assert [panel.title[:6] for panel in found.chart.panels] == ["values", "loss o"]
    assert find_in_records(split_by_role(largest)) == ()


def test_scores_without_an_exponent_are_a_finding_without_an_answer() -> None:
    none_unknown = [trained(16, d, 0.5 if d < HORIZONS[2] else 0.0) for d in HORIZONS]
    (found,) = find_in_records(split_by_role(none_unknown))
    assert found.status is FindingStatus.NOT_ANSWERED
    assert "1 - exact_match is 0 at D=4e+04 tokens: raise eval.tokens" in str(found.reason)


def test_the_script_refuses_a_folder_without_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--read", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert "does not exist: run the script without --read first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_measured_exponents_order_as_predicted(tmp_path: Path) -> None:
    """A small model at three horizons and two slopes: the steeper law has the larger exponent, by both scores."""
    context, batch = 24, 240
    records = []
    for slope in (0.2, 1.0):
        source = ZipfFacts(facts=4096, slope=slope, symbols=64)
        shape = GPTShape(width=32, depth=2, heads=2, context=context, vocab_size=source.vocab_size)
        for steps in (250, 500, 1000):
            spec = tiny(
                steps, data=source, shape=shape, batch_tokens=batch, train_tokens=batch * steps,
                optimizer=OptimizerSpec(peak_lr=0.01, weight_decay=0.0),
                eval=EvalSpec(tokens=120_000, points=1, max_cost_fraction=9.0),
            )  # fmt: skip
            records.append(train(RunStore(tmp_path), spec))
    found = {(each.score, each.source.slope): each for each in comparisons(records)}
    assert len(found) == 4
    for score in ("1 - exact_match", "value_loss_nats"):
        flat, steep = found[score, 0.2], found[score, 1.0]
        assert flat.predicted_exponent + 0.1 < steep.predicted_exponent
        assert 0 < flat.exponent.value < steep.exponent.value - 0.1, (flat.exponent, steep.exponent)
