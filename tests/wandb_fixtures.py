"""Owns what the W&B tests share: a client that knows nobody's login and nobody's files, and the parts of a mirror."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_server import WandbServer

from scaling_lab.train import tracking, wandb_client


@pytest.fixture
def fresh_wandb(monkeypatch, tmp_path):
    """The real client as on a new machine; whatever it started is ended after the test."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / f"wandb-{name.lower()}"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    wandb_client.ask_again()
    tracking._said.clear()
    yield
    tracking.wait_for_mirrors(20)
    wandb_client.ask_again()
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None:
        # Its settings, the server's address among them, are read once for each service process.
        wandb.teardown()


@pytest.fixture
def server(fresh_wandb, monkeypatch):
    with WandbServer() as standing:
        standing.use(monkeypatch)
        yield standing
        standing.failing = None  # so that the client ends quickly
        assert not standing.unknown, standing.unknown


def offline_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("run-*.wandb"))
