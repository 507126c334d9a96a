"""Tests of observations: what is kept, what is dropped and why, what is derived, from tables and from run records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from helpers.synthetic import synthetic_records
from scaling_lab.analysis.data.observations import Observations, cluster_budgets
from scaling_lab.analysis.data.record_observations import observations_from_records, smooth
from scaling_lab.analysis.data.table_observations import from_table
from scaling_lab.analysis.data.tables.table import Table, table_from_frame
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunStatus


def table(**columns: object) -> Table:
    n = np.geomspace(1e7, 1e9, 8)
    base: dict[str, object] = {
        "run_id": list("abcdefgh"),
        "params": n,
        "tokens": 20 * n,
        "loss": np.linspace(4, 3, 8),
    }
    base |= {"flops": 120 * n**2} | columns
    return table_from_frame(pd.DataFrame({k: v for k, v in base.items() if v is not None}), "t.csv")


def test_bad_cells_are_dropped_each_with_its_reason() -> None:
    loss: list[object] = [4.0, "oops", np.nan, -1.0, np.inf, 3.5, 3.4, 3.3, 3.2, 3.1, 3.0, 2.9]
    n = np.full(12, 1e8)
    obs = from_table(
        table_from_frame(
            pd.DataFrame({"run_id": list("abcdefghijkl"), "params": n, "tokens": n, "loss": loss}), "t.csv"
        )
    )
    assert {d.run_id: d.reason for d in obs.dropped} == {
        "b": "loss is not a number: 'oops'",
        "c": "loss is missing",
        "d": "loss is not positive: -1.0",
        "e": "loss is not finite: inf",
    }
    assert [d.row for d in obs.dropped] == [2, 3, 4, 5]
    assert obs.n_runs == obs.n_points == 8
    assert "b" not in obs.run_names


def test_strict_makes_a_bad_row_an_error() -> None:
    with pytest.raises(UserError, match=r"strict=true.*row 2 \(b\): loss is not positive"):
        from_table(table(loss=[4, -1, 4, 4, 4, 4, 4, 4]), strict=True)


@pytest.mark.parametrize("missing", ["params", "tokens", "flops"])
def test_one_of_params_tokens_flops_is_derived_in_float64_with_a_note(missing: str) -> None:
    n = np.array([7 * 10**10] * 8)  # as integers: 6 N D overflows int64
    d = np.array([14 * 10**11] * 8)
    columns = {"params": n, "tokens": d, "flops": 6.0 * 7e10 * 1.4e12 * np.ones(8)} | {missing: None}
    obs = from_table(table(**columns))
    np.testing.assert_allclose(obs.compute_flops, 5.88e23, rtol=1e-12)
    np.testing.assert_allclose(obs.n_params, 7e10, rtol=1e-12)
    np.testing.assert_allclose(obs.n_tokens, 1.4e12, rtol=1e-12)
    assert any(w.startswith(missing) for w in obs.warnings)
    assert obs.is_six_nd


def test_two_missing_counts_or_a_missing_loss_name_what_is_there() -> None:
    with pytest.raises(UserError, match=r"t.csv has no column 'tokens'.*run_id, params, loss"):
        from_table(table(tokens=None, flops=None))
    with pytest.raises(UserError, match=r"columns.loss=valued_loss"):
        from_table(table(loss=None, valued_loss=np.ones(8)))


def test_too_few_usable_rows_say_how_many_and_why() -> None:
    with pytest.raises(UserError, match=r"5 usable row\(s\) of 8.*row 1: loss is missing"):
        from_table(table(loss=[np.nan] * 3 + [3.0] * 5))


def test_without_run_id_each_row_is_a_run_and_repeated_ids_are_curves() -> None:
    assert from_table(table(run_id=None)).n_runs == 8
    obs = from_table(table(run_id=list("aabbccdd"), params=np.repeat([1e7, 2e7, 4e7, 8e7], 2), flops=None))
    assert (obs.n_runs, obs.n_points, obs.final().n_points) == (4, 8, 4)
    np.testing.assert_array_equal(obs.final().n_tokens, obs.n_tokens[1::2])
    assert obs.final().curves.n_tokens.size == 8


def test_the_last_row_of_a_run_is_by_tokens_not_by_order() -> None:
    obs = from_table(
        table(
            run_id=list("aaaabbbb"),
            params=[1e8] * 8,
            tokens=1e9 * np.array([3, 1, 4, 2, 9, 8, 7, 6]),
            flops=None,
        )
    )
    np.testing.assert_array_equal(obs.final().n_tokens, [4e9, 9e9])


def test_exact_duplicates_are_kept_and_reported() -> None:
    one = {"run_id": ["a"] * 6, "params": [1e8] * 6, "tokens": [1e9] * 6, "loss": [3.0] * 6}
    obs = from_table(table_from_frame(pd.DataFrame(one), "t.csv"))
    assert obs.n_points == 6
    assert "5 exact duplicate row(s) are kept." in obs.warnings


def test_a_convention_that_contradicts_the_flops_is_reported() -> None:
    obs = from_table(table(flops=np.full(8, 1e18)), convention="six_n_total")
    assert any("six_n_total implies flops = 6 params tokens" in w for w in obs.warnings)
    with pytest.raises(UserError, match="convention='six'"):
        from_table(table(), convention="six")


def test_budgets_are_clusters_within_ten_percent_and_do_not_chain() -> None:
    flops = np.array([1e18, 1.09e18, 0.95e18, 4e18, 4.1e18, 4.3e18])
    budgets = cluster_budgets(flops)
    assert np.unique(budgets[:3]).size == np.unique(budgets[3:]).size == 1
    # A continuum is cut into clusters no wider than the tolerance.
    many = np.geomspace(1e18, 1e20, 400)
    label = cluster_budgets(many)
    for value in np.unique(label):
        assert many[label == value].max() / many[label == value].min() <= 1.1**2 + 1e-9


def test_further_numeric_columns_are_kept_for_laws() -> None:
    obs = from_table(table(width=np.arange(1, 9), note=list("xxxxyyyy")))
    assert set(obs.extra) == {"width"}
    keep = obs.n_params > 1e8
    np.testing.assert_array_equal(obs.points(keep).extra["width"], np.arange(1, 9)[keep])


def test_records_are_counted_under_any_convention() -> None:
    records = synthetic_records()
    for convention in Convention:
        obs = observations_from_records(records, convention)
        counts = [r.count() for r in records]
        np.testing.assert_allclose(obs.n_params, [c.n_params(convention) for c in counts])
        expected = [c.flops_per_token(convention) * r.spec.train_tokens for c, r in zip(counts, records)]
        np.testing.assert_allclose(obs.compute_flops, expected)
        assert obs.convention == convention.value
        other = observations_from_records(records).under(convention.value)
        np.testing.assert_allclose(other.n_params, obs.n_params)
        np.testing.assert_allclose(other.curves.compute_flops, obs.curves.compute_flops)
    np.testing.assert_allclose(obs.loss_nats, [r.final_val_loss_nats for r in records])


def test_runs_that_did_not_complete_are_listed_with_their_reason() -> None:
    records = synthetic_records()
    records[3] = replace(records[3], status=RunStatus.DIVERGED, reason="loss is nan at step 7")
    records[5] = replace(records[5], final_val_loss_nats=None)
    obs = observations_from_records(records)
    assert obs.n_runs == len(records) - 2
    assert {(d.run_id, d.reason) for d in obs.dropped} == {
        (records[3].run_id, "diverged: loss is nan at step 7"),
        (records[5].run_id, "no final validation loss"),
    }
    with pytest.raises(UserError, match="none of the 1 run records"):
        observations_from_records([records[3]])


def test_curves_are_validation_points_or_smoothed_training_loss() -> None:
    records = synthetic_records()
    validation = observations_from_records(records, curve="validation").curves
    assert validation.kind == "validation points"
    assert validation.loss_nats.size == sum(p.val_loss_nats is not None for r in records for p in r.curve)
    train = observations_from_records(records, curve="train").curves
    assert "smoothed" in train.kind
    assert train.loss_nats.size == sum(p.train_loss_nats is not None for r in records for p in r.curve)


def test_smoothing_keeps_a_constant_averages_noise_and_weighs_by_steps() -> None:
    steps = np.arange(200.0)
    np.testing.assert_allclose(smooth(np.full(200, 2.5), steps), 2.5)
    noise = np.random.default_rng(0).standard_normal(4000)
    smoothed = smooth(noise, np.arange(4000.0))
    # A Gaussian kernel of sigma 2.5 steps cut at two sigma: variance sum w^2 / (sum w)^2.
    w = np.exp(-0.5 * (np.arange(-5, 6) / 2.5) ** 2)
    assert smoothed.std() == pytest.approx(np.sqrt((w**2).sum()) / w.sum(), rel=0.1)
    np.testing.assert_array_equal(smooth(noise[:50], 100.0 * np.arange(50)), noise[:50])


def test_selecting_runs_keeps_points_and_curves_together() -> None:
    run = np.repeat(["a", "b", "c"], 4)
    obs = Observations.from_arrays(
        n_params=np.repeat([1e7, 2e7, 3e7], 4), n_tokens=np.arange(1, 13), loss_nats=np.ones(12), run_id=run
    )
    part = obs.final().runs(np.array([True, False, True]))
    assert list(part.run_names) == ["a", "c"]
    np.testing.assert_array_equal(part.n_params, [1e7, 3e7])
    np.testing.assert_array_equal(np.unique(part.curves.n_params), [1e7, 3e7])
    np.testing.assert_array_equal(part.run_id, ["a", "c"])


def test_a_table_of_a_million_rows_is_read_without_a_row_loop() -> None:
    import time

    rng = np.random.default_rng(0)
    n = 10 ** rng.uniform(7, 9, 1000)
    frame = pd.DataFrame({"run_id": np.repeat(np.arange(1000), 1000), "params": np.repeat(n, 1000)})
    frame["tokens"] = np.tile(np.geomspace(1e8, 1e10, 1000), 1000)
    frame["loss"] = 2.0 + 1e3 / frame.params**0.3
    began = time.process_time()
    obs = from_table(Table("big", frame, np.arange(1, len(frame) + 1)))
    final = obs.final()
    assert (obs.n_points, final.n_points) == (1_000_000, 1000)
    assert time.process_time() - began < 10
