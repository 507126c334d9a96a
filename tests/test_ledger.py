"""Tests of the fast reader of run stores: it gives the records of the store's own reader, whatever happened to a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic import diverged, synthetic_records
from scaling_lab.analysis.data.ledger import CurveColumns, curve_columns, load_ledger
from scaling_lab.analysis.data.record_observations import observations_from_records
from scaling_lab.core.record import EvalPoint, RunRecord
from scaling_lab.core.storage.store import RunStore

RECORDS = synthetic_records(budgets=(1e11, 4e11), sizes=4, curve_points=40)


def written(root: Path, records: list[RunRecord] = RECORDS) -> RunStore:
    """A store with these records, written by the code that `train` uses."""
    store = RunStore.for_sweep(root, "synthetic")
    for record in records:
        claim = store.claim(record.spec)
        assert claim is not None
        store.start_curve(record.run_id, record.curve).close()
        assert store.write_record(record)
        claim.release()
    return store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder to copy from, because writing it is slow (every file is synced to disk)."""
    return written(tmp_path_factory.mktemp("original")).folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> RunStore:
    return RunStore(shutil.copytree(original, tmp_path / "synthetic"))


def same(store: RunStore, batch_bytes: int = 1 << 20) -> list[RunRecord]:
    """The records of the fast reader, checked against those of the slow reader."""
    slow, slow_problems = store.load_records()
    fast, fast_problems = load_ledger(store, batch_bytes=batch_bytes)
    assert fast_problems == slow_problems
    assert [r.run_id for r in fast] == [r.run_id for r in slow]
    assert fast == slow
    return fast


@pytest.mark.parametrize("batch_bytes", [1, 20_000, 1 << 24])
def test_the_fast_reader_gives_the_stores_records(tmp_path: Path, batch_bytes: int) -> None:
    failed = diverged(RECORDS[0])
    records = same(written(tmp_path, [failed, *RECORDS[1:]]), batch_bytes)
    assert all(isinstance(r.curve, CurveColumns) for r in records)
    by_id = {r.run_id: r for r in records}
    for record in (failed, *RECORDS[1:]):
        found = by_id[record.run_id].curve
        assert tuple(found) == record.curve
        assert found[0] == record.curve[0]
        assert found[-1] == record.curve[-1]
        assert found[2:5] == record.curve[2:5]
        assert {type(v) for p in found for v in (p.step, p.tokens)} == {int}


# name -> what happens to the text of a whole curve.jsonl
DAMAGE: dict[str, Callable[[str], str]] = {
    "a torn last line": lambda text: text + '{"step": 99, "tok',
    "a whole last line without its end": lambda text: text + text.splitlines()[-1],
    "more lines than the record counts": lambda text: text + text.splitlines()[-1] + "\n",
    "the last line lost": lambda text: text[: text[:-1].rfind("\n") + 1],
    "a torn line in the middle": lambda text: text[:100] + text[105:],
    "a blank line": lambda text: text.replace("\n", "\n\n", 1),
    "two points on a line": lambda text: text.replace("\n", "", 1),
    "an unknown field": lambda text: text.replace('"step"', '"steps"', 1),
    "one more field": lambda text: text.replace('"step"', '"new": 1, "step"', 1),
    "a NaN": lambda text: text.replace('"train_loss_nats": ', '"train_loss_nats": NaN, "lr": ', 1),
    "a null in an optional field": lambda text: text.replace('"lr"', '"val_loss_nats": null, "lr"', 1),
    "an infinite number": lambda text: text.replace('"lr": ', '"lr": 1e999, "lr": ', 1),
    "a count written as a float": lambda text: text.replace(', "train_flops"', '.0, "train_flops"', 1),
    "evaluations that are no numbers": lambda text: text.replace('"lr"', '"evals": {"a": "x"}, "lr"', 1),
    "an evaluation that is none": lambda text: text.replace('"lr"', '"evals": {"a": null}, "lr"', 1),
    "evaluations that are a number": lambda text: text.replace('"lr"', '"evals": 3, "lr"', 1),
    "a number as text": lambda text: text.replace('"step": ', '"step": "3", "x": ', 1),
    "not UTF-8": lambda text: text[:50] + "\udcff" + text[50:],
    "nothing": lambda text: "",
    "only half a line": lambda text: text[:20],
    "a JSON list": lambda text: "[1, 2]\n" + text,
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "null bytes": lambda text: text + "\0" * 64,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_curves_mean_the_same_to_both_readers(store: RunStore, kind: str) -> None:
    path = store.run_folder(RECORDS[2].run_id) / "curve.jsonl"
    text = path.read_text()
    damaged = DAMAGE[kind](text)
    assert damaged != text
    path.write_bytes(damaged.encode("utf-8", errors="surrogateescape"))
    # One bad file in a batch of good ones, so that only its run is read again.
    for record in same(store):
        assert {values.dtype.kind for values in curve_columns(record.curve).values()} <= {"i", "f"}


def test_missing_curves_and_bad_records_affect_one_run_only(store: RunStore) -> None:
    (store.run_folder(RECORDS[0].run_id) / "curve.jsonl").unlink()
    (store.run_folder(RECORDS[1].run_id) / "record.json").write_text('{"run_id": 1}')
    (store.run_folder(RECORDS[3].run_id) / "record.json").unlink()
    records = same(store)
    assert len(records) == len(RECORDS) - 3


def test_a_run_folder_with_another_name_keeps_its_record(store: RunStore) -> None:
    store.run_folder(RECORDS[0].run_id).rename(store.run_folder("renamed"))
    same(store)


def test_an_empty_store_has_no_records(tmp_path: Path) -> None:
    assert load_ledger(RunStore(tmp_path / "nothing")) == ([], [])


def test_a_curve_without_validation_has_none(tmp_path: Path) -> None:
    bare = [
        replace(r, curve=tuple(replace(p, val_loss_nats=None, val_loss_sem_nats=None) for p in r.curve))
        for r in RECORDS
    ]
    records = same(written(tmp_path, bare))
    assert all(p.val_loss_nats is None for r in records for p in r.curve)
    assert np.isnan(curve_columns(records[0].curve)["val_loss_nats"]).all()


def with_evals(record: RunRecord, *names: str) -> RunRecord:
    """The record with other losses at each evaluation."""
    curve = tuple(
        replace(p, evals={name: p.val_loss_nats + i for i, name in enumerate(names)} or None)
        if p.val_loss_nats is not None
        else p
        for p in record.curve
    )
    return replace(record, curve=curve)


def test_other_evaluation_sets_are_columns_to_both_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [("code",), ("code", "rare.facts"), (), ("exact_match",)]
    records = [with_evals(r, *names[i % 4]) for i, r in enumerate(RECORDS)]
    store = written(tmp_path, records)
    found = {r.run_id: r for r in same(store)}
    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "read_curve", None)  # the fast reader needs no other
        load_ledger(store)
    for record, own in zip(records, names * len(records)):
        fast, plain = curve_columns(found[record.run_id].curve), curve_columns(record.curve)
        assert {name for name in plain if name.startswith("evals.")} == {f"evals.{name}" for name in own}
        for name, values in plain.items():
            np.testing.assert_array_equal(fast[name], values)


def test_good_runs_never_need_the_slow_reader(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunStore, run_id: str) -> list[EvalPoint]:
        raise AssertionError(f"{run_id} was read line by line")

    monkeypatch.setattr(RunStore, "read_curve", refuse)
    records, problems = load_ledger(store)
    assert len(records) == len(RECORDS)
    assert not problems


@pytest.mark.parametrize("kind", ["validation", "train", "auto"])
def test_both_readers_give_the_same_observations(store: RunStore, kind: str) -> None:
    slow = observations_from_records(store.load_records()[0], None, kind)  # type: ignore[arg-type]
    fast = observations_from_records(load_ledger(store)[0], None, kind)  # type: ignore[arg-type]
    assert fast.curves.kind == slow.curves.kind
    for name in ("run_index", "n_params", "n_tokens", "compute_flops", "loss_nats"):
        np.testing.assert_array_equal(getattr(fast.curves, name), getattr(slow.curves, name))
    np.testing.assert_array_equal(fast.loss_nats, slow.loss_nats)


def test_columns_of_plain_points_are_the_same_arrays(store: RunStore) -> None:
    record = RECORDS[0]
    fast = next(r for r in load_ledger(store)[0] if r.run_id == record.run_id)
    mine, theirs = curve_columns(record.curve), curve_columns(fast.curve)
    assert list(mine) == list(theirs)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])
        assert mine[name].dtype == theirs[name].dtype


def test_the_fast_reader_parses_every_line_that_the_store_writes(tmp_path: Path) -> None:
    points = (
        EvalPoint(1, 512, 1e9, 1e-3),
        EvalPoint(2, 2**40, 6e23, 1e-320, 1e-300, 3, None, wall_time_s=1),
        EvalPoint(3, 5, 7, 0, 0.1 + 0.2, 1 / 3, 0.0, {"exact_match": 0, "value_loss_nats": 1 / 3}, 1e5),
        EvalPoint(4, 5, 7, 0, 0.1 + 0.2, 1 / 3, 0.0, {"value_loss_nats": 2}),
    )
    record = replace(RECORDS[0], curve=points, curve_points=len(points))
    (found,), problems = load_ledger(written(tmp_path, [record]))
    assert not problems
    assert isinstance(found.curve, CurveColumns)  # by the fast reader
    assert tuple(found.curve) == points
