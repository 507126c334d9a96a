"""Tests of `scaling-lab status`: states, progress and ETA from the claims, last errors, large sweeps, --watch."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.synthetic import synthetic_records
from scaling_lab.cli.display.sweep_status import SweepStatus, grouped_reasons, read_status
from scaling_lab.cli.main import main
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore

RECORDS = synthetic_records(budgets=(1e11, 4e11), sizes=4, curve_points=4)[:8]


def finish(store: RunStore, record: RunRecord) -> None:
    claim = store.claim(record.spec)
    assert claim is not None
    store.start_curve(record.run_id, record.curve).close()
    assert store.write_record(record)
    claim.release()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """Eight runs: two completed, one failed, one interrupted, one claimed, one half done, two planned."""
    monkeypatch.chdir(tmp_path)
    store = RunStore.for_sweep("results", "s")
    plan = Plan(
        "s", tuple(PlannedRun(r.spec, r.execution) for r in RECORDS), RECORDS[0].spec.convention, "abc"
    )
    store.write_plan(plan)
    for record in RECORDS[:2]:
        finish(store, record)
    finish(
        store,
        replace(RECORDS[2], status=RunStatus.FAILED, reason="no memory\nleft", final_val_loss_nats=None),
    )
    for record in RECORDS[3:6]:
        claim = store.claim(record.spec)
        assert claim is not None
        if record is RECORDS[3]:
            claim.release()
        if record is RECORDS[5]:
            claim.heartbeat(
                record.spec.steps // 2, record.spec.steps, tokens_per_s=1000.0, train_loss_nats=3.0
            )
    return store


def test_states_progress_and_eta(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "sweep=s", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {
        "completed": 2, "failed": 1, "interrupted": 1, "running": 1, "claimed": 1, "planned": 2,
    }  # fmt: skip
    specs = [r.spec for r in RECORDS]
    half = specs[5].steps // 2 / specs[5].steps
    done = sum(s.train_flops() for s in specs[:3]) + half * specs[5].train_flops()
    total = sum(s.train_flops() for s in specs)
    speed = 1000.0 * specs[5].flops_per_token()
    assert found["progress"]["flops_done"] == pytest.approx(done)
    assert found["progress"]["flops_per_s"] == pytest.approx(speed)
    assert found["progress"]["eta_s"] == pytest.approx((total - done) / speed)
    assert found["last_error"] == {"run_id": specs[2].run_id(), "reason": "no memory\nleft"}
    claim = next(run for run in found["runs"] if run["state"] == "running")["claim"]
    assert claim["pid"] == os.getpid()
    assert time.time() - claim["heartbeat_unix_s"] < 60
    assert main(["status", "sweep=s"]) == 0
    out = capsys.readouterr().out
    for part in (
        "failed: no memory left",
        f"{done / total:.0%} of the FLOPs",
        "ETA",
        f" {os.getpid()} ",
        "retry=failed",
    ):
        assert part in out
    assert main(["status", "sweep=s", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_watch_follows_until_all_runs_have_ended(
    store: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling_lab.cli.commands.status.WATCH_EVERY_S", 0.05)

    def finish_all() -> None:
        time.sleep(0.3)
        for record in RECORDS[3:]:
            store.start_curve(record.run_id, record.curve).close() if record in RECORDS[3:6] else None
            store.write_record(record) if record in RECORDS[3:6] else finish(store, record)

    worker = threading.Thread(target=finish_all)
    worker.start()
    assert main(["status", "sweep=s", "--watch"]) == 0
    worker.join()
    out = capsys.readouterr().out
    assert "3 of 8 runs finished" in out
    assert "7 completed, 1 failed" in out
    assert "next: scaling-lab analyze sweep=s" in out


def test_completed_runs_are_not_read_again(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = store.read_plan()
    first = read_status(store, plan)
    looked: list[str] = []
    real = RunStore.state
    monkeypatch.setattr(RunStore, "state", lambda self, run_id: looked.append(run_id) or real(self, run_id))
    assert read_status(store, plan, first).counts == first.counts
    assert not {r.run_id for r in RECORDS[:2]} & set(looked)
    assert RECORDS[2].run_id in looked  # a failed one may be tried again


def test_a_large_sweep_shows_what_matters(
    store: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("scaling_lab.cli.commands.status.status_table.__defaults__", (4,))
    assert main(["status", "sweep=s"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(table) == 5
    assert "and 2 completed, 2 planned" in table[-1]
    assert any(RECORDS[2].run_id in line for line in table)


def test_the_same_reason_is_shown_once(store: RunStore) -> None:
    rows = read_status(store, store.read_plan()).rows
    bad = [row for row in rows if row.state.state == "failed"]
    many = [replace(bad[0], state=replace(bad[0].state, run_id=f"run-{i}")) for i in range(50)]
    assert grouped_reasons(many, 20) == ["50 runs failed (run-0, ...): no memory left"]
    other = [replace(row, state=replace(row.state, reason=f"reason {i}")) for i, row in enumerate(many)]
    assert len(grouped_reasons(other, 20)) == 21
    assert SweepStatus(()).eta_s is None
