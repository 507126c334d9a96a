"""The W&B mirror with the real client, offline: what arrives, and that nothing it does can hurt a run."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import pytest
from test_train import tiny, train

from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunStatus
from scaling_lab.core.spec import Execution, PlannedRun
from scaling_lab.core.store import RunStore
from scaling_lab.train import tracking
from scaling_lab.train.tracking import NoTracker, WandbTracker, make_tracker, run_config, wandb_mode


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def offline_records(folder: Path) -> list[object]:
    """Every protobuf record of the one offline run below `folder`, parsed from its file.

    The file is a 7-byte header and LevelDB-log blocks of 32 KiB: crc (4), length (2), type (1), payload.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    data, position, out, partial = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        payload = data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind == 0:
            break
        partial = payload if kind in (1, 2) else partial + payload
        if kind in (1, 4):
            out.append(wandb_internal_pb2.Record.FromString(partial))
    return out


def test_an_offline_run_holds_the_whole_curve(tmp_path):
    store, spec = RunStore(tmp_path / "sweep"), tiny(40, sweep="mysweep")
    record = train(store, spec, tracker=make_tracker({"kind": "wandb", "project": "p"}, store.folder))
    assert record.status is RunStatus.COMPLETED
    records = offline_records(store.folder / "wandb")
    (run,) = [r.run for r in records if r.HasField("run")]
    assert (run.project, run.run_group, run.job_type) == ("p", "mysweep", "isoflop")
    assert run.run_id == f"mysweep-{spec.run_id()}"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["N"] == spec.n_params()
    assert config["C"] == spec.train_flops()
    assert config["D"] == spec.train_tokens
    history = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.HasField("history")
    ]
    assert [h["train_flops"] for h in history] == [p.train_flops for p in record.curve]
    assert [h["train_loss_nats"] for h in history] == [p.train_loss_nats for p in record.curve]
    assert [h["val_loss_nats"] for h in history if "val_loss_nats" in h] == [
        p.val_loss_nats for p in record.curve if p.val_loss_nats is not None
    ]
    steps = {r.metric.step_metric for r in records if r.HasField("metric") and r.metric.glob_name == "*"}
    assert steps == {"train_flops"}


def test_config_has_every_convention():
    spec = tiny()
    config = run_config(PlannedRun(spec, Execution()), "abc")
    for convention in Convention:
        assert config[f"N/{convention.value}"] == spec.count().n_params(convention)
        assert config[f"C/{convention.value}"] == spec.count().flops_per_token(convention) * spec.train_tokens


def test_without_the_package_the_run_is_complete(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with caplog.at_level(logging.WARNING):
        record = train(RunStore(tmp_path), tiny(20), tracker=WandbTracker(tmp_path / "w"))
    assert record.status is RunStatus.COMPLETED
    assert "tracker=wandb stopped" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    (tmp_path / "w").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        record = train(RunStore(tmp_path / "s"), tiny(20), tracker=WandbTracker(tmp_path / "w"))
    assert record.status is RunStatus.COMPLETED
    assert "tracker=wandb stopped" in caplog.text


def test_a_tracker_that_hangs_does_not_hold_the_run_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(WandbTracker, "_open", lambda *args: time.sleep(30))
    began = time.monotonic()
    record = train(RunStore(tmp_path), tiny(20), tracker=WandbTracker(tmp_path / "w"))
    assert record.status is RunStatus.COMPLETED
    assert time.monotonic() - began < 25
    assert "did not finish" in caplog.text


def test_mode_is_offline_where_nobody_is_logged_in(monkeypatch, tmp_path):
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("disabled") == "disabled"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"


def test_trackers_by_name(tmp_path):
    assert isinstance(make_tracker(None, tmp_path), NoTracker)
    with pytest.raises(UserError, match="tracker='tensorboard'"):
        make_tracker({"kind": "tensorboard"}, tmp_path)
    with pytest.raises(UserError, match=r"tracker.mode='on'"):
        make_tracker({"kind": "wandb", "mode": "on"}, tmp_path)
