"""Tests of other losses of a sweep: `metric=` and `metrics=` on run records whose evaluation sets follow known laws."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic import QUICKSTART_LAW, Law, make_record, synthetic_records
from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze, observations_of_sweep
from scaling_lab.analysis.approaches import EnvelopeSettings, ParametricSettings
from scaling_lab.analysis.data.observations import FLOOR
from scaling_lab.analysis.data.record_losses import is_loss, loss_names, with_loss
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.analysis.data.sweep_records import SweepRecords
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.analysis.laws import get_law
from scaling_lab.analysis.settings import ApproachSettings
from scaling_lab.analysis.studies.shared.skill_optima import Skills, skill_optima
from scaling_lab.analysis.studies.tuning import records_with_loss
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.storage.store import RunStore

# The optimum for facts has more parameters than that for the text of the sweep; the optimum for code has fewer.
FACTS = Law(E=1.3, A=160.0, B=965.0, alpha=0.50, beta=0.57)
CODE = Law(E=0.6, A=55.3, B=2800.0, alpha=0.50, beta=0.57)
QUICK = AnalysisSettings(
    bootstrap=BootstrapSettings(resamples=60), sensitivity=False, backtest=False, profile=False
)


def skills_of(analysis: Analysis) -> Skills:
    """The numbers behind the finding."""
    found = skill_optima(analysis.observations, analysis.settings, analysis.mean_compute_flops)
    assert found is not None
    return found


def noiseless(record: RunRecord, law: Law) -> RunRecord:
    """The same run with the losses of another law."""
    return make_record(record.spec, law, np.random.default_rng(0), noise=0.0, curve_points=40)


def with_sets(record: RunRecord, **laws: Law) -> RunRecord:
    """The record with other evaluation sets, as `train` writes them: at each evaluation, with the last one in `metrics`."""
    others = {name: noiseless(record, law) for name, law in laws.items()}
    curve = tuple(
        replace(p, evals={name: float(o.curve[i].val_loss_nats or 0) for name, o in others.items()})
        if p.val_loss_nats is not None
        else p
        for i, p in enumerate(record.curve)
    )
    metrics = {f"eval.{name}": float(o.final_val_loss_nats or 0) for name, o in others.items()}
    metrics |= {"exact_match": 0.25, "bits_per_byte": 2.0, "value_loss_nats": 1.0}
    return replace(record, curve=curve, metrics=metrics, val_floor_nats=0.5)


@cache
def plain() -> list[RunRecord]:
    return synthetic_records(QUICKSTART_LAW, noise=0.0, curve_points=40)


@cache
def records() -> list[RunRecord]:
    return [with_sets(r, code=CODE, facts=FACTS) for r in plain()]


def test_a_metric_is_analyzed_as_if_it_were_the_validation_loss() -> None:
    found = observations_of_sweep(records(), replace(QUICK, metric="eval.facts"))
    wanted = observations_from_records([noiseless(r, FACTS) for r in plain()], curve="validation")
    np.testing.assert_array_equal(found.loss_nats, wanted.loss_nats)
    np.testing.assert_array_equal(found.curves.loss_nats, wanted.curves.loss_nats)
    np.testing.assert_array_equal(found.curves.compute_flops, wanted.curves.compute_flops)
    assert np.isnan(found.loss_sem_nats).all()
    assert FLOOR not in found.extra  # of the validation set, not of this one
    assert FLOOR in observations_of_sweep(records(), QUICK).extra
    settings = replace(QUICK, metric="eval.facts")
    fit = analyze(found, settings).estimate("parametric").fits[0].parameters
    assert fit["E"] == pytest.approx(FACTS.E, abs=1e-3)
    assert fit["alpha"] == pytest.approx(FACTS.alpha, abs=1e-3)


def test_a_metric_named_loss_is_the_loss() -> None:
    one, two = (observations_of_sweep(records(), replace(QUICK, metric=m)) for m in ("loss", None))
    np.testing.assert_array_equal(one.loss_nats, two.loss_nats)
    np.testing.assert_array_equal(one.curves.loss_nats, two.curves.loss_nats)


def test_skills_of_a_sweep_are_those_of_each_loss_alone() -> None:
    names = ("loss", "eval.code", "eval.facts")
    settings = replace(QUICK, metrics=names)
    skills = skills_of(analyze(observations_of_sweep(records(), settings), settings))
    for skill, law in zip(skills.columns, (QUICKSTART_LAW, CODE, FACTS)):
        alone = replace(QUICK, metric=skill.column)
        wanted = analyze(observations_of_sweep(records(), alone), alone)
        for one, other in zip(skill.estimates, wanted.estimates):
            assert one.frontier is not None
            assert other.frontier is not None
            assert one.frontier.params.exponent == other.frontier.params.exponent
        fit = skill.estimates[2].fits[0].parameters
        assert fit["A"] == pytest.approx(law.A, rel=0.05)
        assert fit["B"] == pytest.approx(law.B, rel=0.05)
    ratio = next(
        r for r in skills.ratios if r.columns == ("eval.code", "eval.facts") and r.approach == "parametric"
    )
    c = skills.compute_flops
    assert ratio.ratio == pytest.approx(CODE.params_opt(c) / FACTS.params_opt(c), rel=0.02)
    assert ratio.differ


def test_runs_without_the_metric_are_dropped_with_the_reason() -> None:
    lacking = [replace(r, metrics={}) if i < 2 else r for i, r in enumerate(records())]
    found = observations_of_sweep(lacking, replace(QUICK, metric="eval.code"))
    assert [(d.run_id, d.reason) for d in found.dropped] == [
        (r.run_id, "no eval.code") for r in records()[:2]
    ]
    assert found.n_runs == len(records()) - 2
    settings = replace(QUICK, metrics=("eval.code",))
    skills = skills_of(analyze(observations_of_sweep(lacking, settings), settings))
    assert (skills.columns[0].n_runs, skills.columns[0].n_left_out) == (len(records()) - 2, 2)


def test_a_loss_evaluated_only_at_the_end_has_no_curves() -> None:
    ends = [
        replace(r, curve=tuple(replace(p, evals=None) for p in r.curve), metrics=r.metrics) for r in records()
    ]
    found = observations_of_sweep(ends, replace(QUICK, metric="eval.code"))
    assert found.separate_curves is None
    assert analyze(found, QUICK).estimate("isoflop").frontier is not None
    settings = replace(QUICK, metrics=("eval.code",))
    skills = skills_of(analyze(observations_of_sweep(ends, settings), settings))
    assert skills.columns[0].estimates[1].frontier is not None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"metric": "eval.cod"}, r"metric='eval.cod' is not known. Did you mean 'eval.code'\? Choices: eval.code, "),
        ({"metrics": ("eval.facts", "speed")}, r"metrics='speed' is not known.*eval.facts, loss, value_loss_nats"),
        ({"metric": "exact_match"}, r"metric=exact_match is a score, not a loss in nats.*loss, eval.code"),
        ({"metric": "eval.code", "metrics": ("loss",)}, r"metrics=loss is not possible with metric=eval.code"),
        ({"metrics": ("bits_per_byte",)}, r"metrics=bits_per_byte is a score"),
        (
            {"metric": "eval.code", "approach": ApproachSettings(envelope=EnvelopeSettings(curve="train"))},
            r"approach.envelope.curve=train is the training loss",
        ),
    ],
)  # fmt: skip
def test_a_name_that_is_not_a_loss_of_the_sweep_is_one_clear_error(
    option: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        observations_of_sweep(records(), replace(QUICK, **option))  # type: ignore[arg-type]


def test_the_excess_of_mistuning_is_measured_on_the_same_loss() -> None:
    tuned = records_with_loss(SweepRecords(tuple(records()), tuple(records()[:3])), "eval.code")
    for part, originals in ((tuned.law, records()), (tuned.lr_sweep, records()[:3])):
        assert [r.final_val_loss_nats for r in part] == [r.metrics["eval.code"] for r in originals]
    with pytest.raises(UserError, match=r"metric \(with tuning\)='eval.code' is not known"):
        records_with_loss(SweepRecords(tuple(records()), tuple(plain())), "eval.code")


def test_the_data_constrained_law_sees_a_sweeps_unique_tokens() -> None:
    truth = get_law("muennighoff")
    rng = np.random.default_rng(0)
    records = []
    for record in synthetic_records(QUICKSTART_LAW, sizes=12, noise=0.0, curve_points=10):
        windows = max(1, int(record.spec.train_tokens / np.exp(rng.uniform(0, 4)) / 64))
        unique = None if rng.random() < 0.3 else 64 * windows
        records.append(replace(record, spec=replace(record.spec, unique_tokens=unique)))
    columns = {
        "n_params": np.array([r.spec.n_params() for r in records]),
        "n_tokens": np.array([float(r.spec.train_tokens) for r in records]),
        "unique_tokens": np.array([float(r.spec.unique_tokens or r.spec.train_tokens) for r in records]),
    }
    losses = truth.loss_nats(truth.example, columns)
    records = [replace(r, final_val_loss_nats=float(loss)) for r, loss in zip(records, losses)]
    settings = replace(QUICK, approach=ApproachSettings(parametric=ParametricSettings(law="muennighoff")))
    observations = observations_of_sweep(records, settings)
    np.testing.assert_array_equal(observations.extra["unique_tokens"], columns["unique_tokens"])
    fit = analyze(observations, settings).estimate("parametric").fits[0].parameters
    assert fit["R_D_star"] == pytest.approx(truth.example["R_D_star"], rel=0.02)
    assert fit["E"] == pytest.approx(truth.example["E"], abs=0.05)
    with pytest.raises(UserError, match="unique_tokens"):
        analyze(observations_of_sweep(plain(), settings), settings)


def test_losses_are_distinguished_from_scores() -> None:
    assert loss_names(records()) == ("loss", "eval.code", "eval.facts", "value_loss_nats")
    assert not is_loss("exact_match")
    same = with_loss(with_loss(records()[0], "eval.code"), "eval.code")
    assert same == with_loss(records()[0], "eval.code")
    assert {p.train_loss_nats for p in same.curve} == {None}


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scaling_lab.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    store = RunStore.for_sweep("results", "synthetic")
    for record in records():
        claim = store.claim(record.spec)
        assert claim is not None
        store.start_curve(record.run_id, record.curve).close()
        assert store.write_record(record)
        claim.release()
    quick = ["bootstrap.resamples=60", "sensitivity=false", "backtest=false", "profile=false", "--json"]
    common = ["analyze", "sweep=synthetic", *quick]
    assert main([*common, "metric=eval.facts", "metrics=[eval.code,value_loss_nats]"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = observations_of_sweep(records(), replace(QUICK, metric="eval.facts"))
    assert found["observations"]["n_runs"] == wanted.n_runs == len(records())
    alone = analyze(wanted, replace(QUICK, metric="eval.facts"))
    for told, estimate in zip(found["estimates"], alone.estimates):
        assert estimate.frontier is not None
        assert told["params_exponent"] == pytest.approx(estimate.frontier.params.exponent, rel=1e-9)
    assert [c["column"] for c in found["skills"]["columns"]] == ["eval.code", "value_loss_nats"]
    assert main([*common, "metric=exact_match"]) == 2
    err = capsys.readouterr().err
    assert "is a score" in err
    assert len(err.strip().splitlines()) == 1
    assert main(["predict", "sweep=synthetic", "metric=eval.code", "compute_flops=1e13", *quick[:1]]) == 0
