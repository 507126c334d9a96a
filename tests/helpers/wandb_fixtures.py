"""Fixtures of the W&B tests: a client without a login or existing files, a server, and parts of a mirror."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.synthetic import plan_of, synthetic_records
from helpers.wandb_server import WandbServer
from scaling_lab.core.storage.files import write_atomic
from scaling_lab.core.storage.serialization import dumps
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.sink import trackers as tracking
from scaling_lab.tracking.sink import wandb_client


@pytest.fixture
def fresh_wandb(monkeypatch, tmp_path):
    """The real client as on a new machine; everything it started is stopped after the test."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / f"wandb-{name.lower()}"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    wandb_client.forget_failures()
    tracking.reported_reasons.clear()
    yield
    tracking.wait_for_mirrors(20)
    wandb_client.forget_failures()
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None:
        # Its settings, including the server's address, are read once per service process.
        wandb.teardown()


@pytest.fixture
def server(fresh_wandb, monkeypatch):
    with WandbServer() as standing:
        standing.use(monkeypatch)
        yield standing
        standing.failing = None  # so that the client stops quickly
        assert not standing.unknown, standing.unknown


def offline_files(folder: Path) -> list[Path]:
    """The run files below a folder, after the service process that writes them has ended."""
    wandb: Any = sys.modules["wandb"]
    wandb.teardown()
    return sorted(folder.rglob("run-*.wandb"))


def synthetic_sweep(results: Path) -> RunStore:
    """A finished sweep on disk, of a known law: six sizes at three budgets, validated twelve times a run."""
    records = synthetic_records(curve_points=60)
    store = RunStore(results / "synthetic")
    store.write_plan(plan_of(records))
    for record in records:
        store.run_folder(record.run_id).mkdir(parents=True)
        write_atomic(store.run_folder(record.run_id) / "spec.json", dumps(record.spec.to_dict()))
        store.start_curve(record.run_id, record.curve).close()
        assert store.write_record(record)
    return store
