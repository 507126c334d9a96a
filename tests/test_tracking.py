"""The W&B mirror with the real client: what it writes offline and to a server, and that no failure can harm a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.processes import run_helper
from helpers.runs import train
from helpers.specs import tiny
from helpers.wandb_fixtures import fresh_wandb, offline_files, server, synthetic_sweep  # noqa: F401  fixtures
from scaling_lab.cli.main import main
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import Interrupted, UserError
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.spec import Execution, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_claimed, train_pending
from scaling_lab.tracking.sink import trackers as tracking
from scaling_lab.tracking.sink import wandb_client
from scaling_lab.tracking.sink.trackers import (
    NoTracker,
    WandbTracker,
    make_tracker,
    run_config,
    wait_for_mirrors,
    wandb_mode,
)
from scaling_lab.training.run.member import Member

pytestmark = pytest.mark.usefixtures("fresh_wandb")


def mirrored(tmp_path, spec=None, **options) -> RunRecord:
    """Train a tiny run with a tracker of these options; its mirror is closed when this returns."""
    store = RunStore(tmp_path / "sweep")
    record = train(
        store,
        spec or tiny(40, sweep="sweep"),
        tracker=make_tracker({"kind": "wandb", **options}, store.folder),
    )
    wait_for_mirrors()
    return record


def assert_whole(history: list[dict], record: RunRecord) -> None:
    """The history is exactly the curve: every point once, in order, with FLOPs, tokens and losses in one row."""
    assert [h["train_step"] for h in history] == [p.step for p in record.curve]
    assert [h["_step"] for h in history] == [p.step for p in record.curve]
    assert [h["train_flops"] for h in history] == [p.train_flops for p in record.curve]
    assert [h["tokens"] for h in history] == [p.tokens for p in record.curve]
    assert [h["train_loss_nats"] for h in history] == [p.train_loss_nats for p in record.curve]
    assert [h.get("val_loss_nats") for h in history] == [p.val_loss_nats for p in record.curve]
    assert [h.get("val_loss_sem_nats") for h in history] == [p.val_loss_sem_nats for p in record.curve]


def test_everything_arrives_online(tmp_path, server):  # noqa: F811
    spec = tiny(40, sweep="sweep")
    record = mirrored(tmp_path, spec)
    (run,) = server.runs.values()
    assert (run.name, run.project, run.group) == (f"sweep-{spec.run_id()}", "scaling_lab", "sweep")
    assert (run.job_type, run.display_name, run.exit_code) == ("isoflop", spec.run_id(), 0)
    assert run.tags == ["gpt", "pysource", "C=1e+09"]
    assert_whole(run.history, record)
    config = run.plain_config
    assert (config["N"], config["D"], config["C"]) == (spec.n_params(), spec.train_tokens, spec.train_flops())
    assert config["spec"] == spec.to_dict()
    assert run.summary["final_val_loss_nats"] == record.final_val_loss_nats
    assert run.summary["final_val_loss_sem_nats"] == record.final_val_loss_sem_nats
    assert run.summary["bits_per_byte"] == record.metrics["bits_per_byte"]
    assert run.summary["status"] == "completed"
    # define_metric("*", step_metric="train_flops") as W&B keeps it: "5" is a position, from 1, in the list.
    metrics = run.config["_wandb"]["value"]["m"]
    (every,) = [m for m in metrics if m.get("2") == "*"]
    assert metrics[every["5"] - 1]["1"] == "train_flops"


def test_the_offline_file_holds_the_whole_curve(tmp_path):
    from scaling_lab.tracking.wandb.run_files import read_run_file

    spec = tiny(40, sweep="sweep")
    record = mirrored(tmp_path, spec)  # without a login
    (path,) = offline_files(tmp_path / "sweep" / "wandb")
    run = read_run_file(path)
    assert (run.run_id, run.project, run.group) == (f"sweep-{spec.run_id()}", "scaling_lab", "sweep")
    assert run.job_type == "isoflop"
    assert run.config["N"] == spec.n_params()
    assert run.summary["final_val_loss_nats"] == record.final_val_loss_nats
    assert_whole(run.history, record)


def test_disabled_writes_nothing(tmp_path, server):  # noqa: F811
    mirrored(tmp_path, mode="disabled")
    assert not (tmp_path / "sweep" / "wandb").exists()
    assert not server.operations


def test_config_has_every_convention():
    spec = tiny()
    config = run_config(PlannedRun(spec, Execution()), "abc")
    for convention in Convention:
        assert config[f"N/{convention.value}"] == spec.count().n_params(convention)
        assert config[f"C/{convention.value}"] == spec.count().flops_per_token(convention) * spec.train_tokens


def test_members_of_a_stack_are_separate_runs(tmp_path, server):  # noqa: F811
    store = RunStore(tmp_path / "sweep")
    runs = [PlannedRun(tiny(40, sweep="sweep", seed_init=s), Execution(stack=2)) for s in (1, 2)]
    plan = Plan("sweep", tuple(runs), runs[0].spec.convention, runs[0].spec.data.fingerprint())
    records = train_pending(store, plan, tracker={"kind": "wandb"})
    assert len(records) == len(server.runs) == 2
    for record in records:
        assert_whole(server.run(f"sweep-{record.run_id}").history, record)


# -- one training run is one W&B run
def interrupted_then_done(tmp_path, monkeypatch, stop_after: int) -> RunRecord:
    """A run that is stopped at a checkpoint, and its second attempt."""
    store, spec = RunStore(tmp_path / "sweep"), tiny(120, sweep="sweep")
    planned, real, stopped_at = PlannedRun(spec, Execution()), Member.checkpoint, []

    def checkpoint_and_stop(self):
        written = real(self)
        if self.done >= stop_after and not stopped_at:
            stopped_at.append(self.done)
            os.kill(os.getpid(), signal.SIGTERM)
        return written

    monkeypatch.setattr(Member, "checkpoint", checkpoint_and_stop)
    tracker = {"kind": "wandb"}
    with pytest.raises(Interrupted):
        train_claimed(planned, store, store.claim(spec), None, tracker, checkpoint_every_s=0.0)
    wait_for_mirrors()
    time.sleep(1.1)  # wandb names an offline folder by the second
    record = train_claimed(planned, store, store.claim(spec), None, tracker)
    wait_for_mirrors()
    assert 0 < stopped_at[0] < spec.steps
    return record


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path, monkeypatch, server):  # noqa: F811
    record = interrupted_then_done(tmp_path, monkeypatch, 30)
    (run,) = server.runs.values()
    assert run.inits == 2
    assert_whole(run.history, record)
    assert run.summary["status"] == "completed"


@pytest.mark.slow
def test_after_resuming_offline_there_is_one_complete_file(tmp_path, monkeypatch):
    from scaling_lab.tracking.wandb.run_files import read_run_file

    record = interrupted_then_done(tmp_path, monkeypatch, 30)
    (path,) = offline_files(tmp_path / "sweep" / "wandb")
    assert_whole(read_run_file(path).history, record)


def killed_attempt(folder: Path, spec, wait_s: float = 0.3) -> None:
    """Run a process that mirrors 30 points of `spec` and is killed."""
    done = run_helper("killed_mirror", json.dumps(spec.to_dict()), str(folder), str(wait_s), timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_and_resumed_run_is_one_wandb_run(tmp_path, server):  # noqa: F811
    """Points that the killed attempt sent and the resumed one recomputes are stored once."""
    spec = tiny(40, sweep="sweep")
    killed_attempt(tmp_path / "sweep", spec)
    record = mirrored(tmp_path, spec)
    (run,) = server.runs.values()
    assert run.inits == 2
    assert [h["_step"] for h in run.history] == [p.step for p in record.curve]


@pytest.mark.slow
def test_wandb_sync_uploads_the_whole_curve_after_a_kill(tmp_path, server, monkeypatch):  # noqa: F811
    """If the killed attempt's file were still there, `wandb sync` would upload nothing of this run."""
    spec = tiny(40, sweep="sweep")
    monkeypatch.setenv("WANDB_MODE", "offline")
    killed_attempt(tmp_path / "sweep", spec)
    time.sleep(1.1)
    record = mirrored(tmp_path, spec)
    folders = [str(p) for p in (tmp_path / "sweep" / "wandb" / "wandb").glob("offline-run-*")]
    assert len(folders) == 1
    monkeypatch.delenv("WANDB_MODE")
    sync = [sys.executable, "-m", "wandb", "sync", "--yes", *folders]
    assert subprocess.run(sync, timeout=60, capture_output=True).returncode == 0
    (run,) = server.runs.values()
    assert_whole(run.history, record)


# -- failures
def assert_unhurt(record: RunRecord, store: RunStore, undisturbed: RunRecord | None = None) -> None:
    assert record.status is RunStatus.COMPLETED
    assert len(store.read_curve(record.run_id)) == record.curve_points == 40
    assert store.read_record(record.run_id) == record


@pytest.mark.parametrize(
    "failing", ["key", "quota", pytest.param("error", marks=pytest.mark.slow), "hang", "unreachable"]
)
def test_a_server_that_fails_immediately_is_a_warning(tmp_path, server, monkeypatch, caplog, failing):  # noqa: F811
    """The runs are complete, there is one warning, and only the first run waits for the server."""
    monkeypatch.setattr(wandb_client, "INIT_TIMEOUT_S", 1.5)
    monkeypatch.setattr(wandb_client, "FINISH_TIMEOUT_S", 0.5)
    server.failing = failing
    if failing == "unreachable":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    store = RunStore(tmp_path / "sweep")
    runs = [PlannedRun(tiny(40, sweep="sweep", seed_init=seed), Execution()) for seed in (1, 2)]
    plan = Plan("sweep", tuple(runs), runs[0].spec.convention, runs[0].spec.data.fingerprint())
    with caplog.at_level(logging.WARNING, "scaling_lab"):
        records = train_pending(store, plan, tracker={"kind": "wandb"})
    assert len(records) == 2
    for record in records:
        assert_unhurt(record, store)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("scaling_lab")]
    assert len(said) == 1
    assert "`scaling-lab upload-wandb sweep=sweep` uploads it later" in said[0]
    assert server.operations.count("RunResumeStatus") <= 1


@pytest.mark.parametrize("failing", ["quota", "hang"])
def test_a_server_that_fails_in_the_middle_is_a_warning(tmp_path, server, monkeypatch, caplog, failing):  # noqa: F811
    monkeypatch.setattr(wandb_client, "FINISH_TIMEOUT_S", 1.0)
    real = WandbTracker.log

    def log_and_break(self, point):
        real(self, point)
        if point.step == 20:
            while not self._queue.empty():
                time.sleep(0.02)
            server.failing = failing

    monkeypatch.setattr(WandbTracker, "log", log_and_break)
    began = time.monotonic()
    record = mirrored(tmp_path)
    assert time.monotonic() - began < 25
    assert server.operations.count("UpsertBucket") >= 1
    assert_unhurt(record, RunStore(tmp_path / "sweep"))
    if failing == "hang":
        assert "tracker=wandb stopped (TimeoutError" in caplog.text


def test_runs_complete_without_the_wandb_package(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with caplog.at_level(logging.WARNING):
        record = mirrored(tmp_path)
    assert record.status is RunStatus.COMPLETED
    assert "tracker=wandb stopped" in caplog.text


def test_a_folder_that_cannot_be_created_is_a_warning(tmp_path, caplog):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "wandb").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        record = mirrored(tmp_path)
    assert record.status is RunStatus.COMPLETED
    assert "tracker=wandb stopped" in caplog.text


def test_a_client_that_hangs_does_not_delay_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "DRAIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(tracking, "open_mirror", lambda *args: time.sleep(30))
    began = time.monotonic()
    record = mirrored(tmp_path)
    assert record.status is RunStatus.COMPLETED
    assert time.monotonic() - began < 25
    assert "did not finish" in caplog.text


def test_a_failed_run_is_marked_as_failed(tmp_path, monkeypatch, server):  # noqa: F811
    from scaling_lab.training.measure.evaluation import ValidationSet

    def broken(*args, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(ValidationSet, "loss", broken)
    store, spec = RunStore(tmp_path / "sweep"), tiny(40, sweep="sweep")
    record = train_claimed(PlannedRun(spec, Execution()), store, store.claim(spec), None, {"kind": "wandb"})
    wait_for_mirrors()
    (run,) = server.runs.values()
    assert record.status is RunStatus.FAILED
    assert run.summary["status"] == "failed"
    assert "no such luck" in run.summary["reason"]
    assert run.exit_code == 1


# -- modes and names
def test_mode_is_offline_without_a_login(monkeypatch, tmp_path):
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("disabled") == "disabled"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example.org")  # whose key is not known
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"


def test_login_at_a_private_server(monkeypatch, tmp_path):
    folder = Path(os.environ["WANDB_CONFIG_DIR"])
    folder.mkdir()
    (folder / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org login user password secret")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_client.base_url() == "https://wandb.example.org"
    assert wandb_mode("auto") == "online"


def test_online_without_a_login_contacts_no_server_and_continues_offline(tmp_path, caplog):
    record = mirrored(tmp_path, mode="online")
    assert record.status is RunStatus.COMPLETED
    assert "not logged in at" in caplog.text
    assert len(wandb_client.offline_folders(tmp_path / "sweep" / "wandb")) == 1


def test_trackers_by_name(tmp_path):
    assert isinstance(make_tracker(None, tmp_path), NoTracker)
    with pytest.raises(UserError, match="tracker='tensorboard'"):
        make_tracker({"kind": "tensorboard"}, tmp_path)
    with pytest.raises(UserError, match=r"tracker.mode='on'"):
        make_tracker({"kind": "wandb", "mode": "on"}, tmp_path)


# -- a whole sweep, and uploading it later
@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory):
    """Three runs with records and no mirror, which tests copy and upload."""
    store = RunStore(tmp_path_factory.mktemp("results") / "sweep")
    runs = [PlannedRun(tiny(20, sweep="sweep", seed_init=seed), Execution()) for seed in range(3)]
    plan = Plan("sweep", tuple(runs), runs[0].spec.convention, runs[0].spec.data.fingerprint())
    store.write_plan(plan)
    train_pending(store, plan)
    return store.folder


@pytest.fixture
def sweep(finished_sweep, tmp_path, monkeypatch):
    shutil.copytree(finished_sweep, tmp_path / "results" / "sweep")
    monkeypatch.chdir(tmp_path)
    return RunStore(tmp_path / "results" / "sweep")


def test_upload_uploads_every_run_and_the_ledger_once(sweep, server, capsys):  # noqa: F811
    records, _ = sweep.load_records()
    # One run is uploaded already and one was cut off after five points, as after an outage during a sweep.
    from scaling_lab.tracking.sink.wandb_client import Target
    from scaling_lab.tracking.wandb.study import upload_run

    upload_run(records[0], Target(), sweep)
    partial = dataclasses.replace(records[1], curve=records[1].curve[:5], status=RunStatus.FAILED)
    upload_run(partial, Target(), sweep)
    assert main(["upload-wandb", "sweep=sweep"]) == 0
    out = capsys.readouterr().out
    assert "1 of 3 finished runs are on W&B" in out
    assert "2 of 2 runs uploaded" in out
    for record in records:
        run = server.run(f"sweep-{record.run_id}")
        assert_whole(run.history, record)
        assert run.exit_code == 0
    inits = {name: run.inits for (_, name), run in server.runs.items()}
    assert inits[f"sweep-{records[0].run_id}"] == 1
    (artifact,) = server.artifacts.values()
    assert artifact["input"]["input"]["artifactCollectionName"] == "sweep-ledger"
    ours = {
        "plan.json",
        *(f"runs/{r.run_id}/{f}" for r in records for f in ("spec.json", "record.json", "curve.jsonl")),
    }
    assert set(artifact["files"]) == ours
    assert main(["upload-wandb", "sweep=sweep"]) == 0
    assert "3 of 3 finished runs are on W&B" in capsys.readouterr().out
    assert {name: r.inits for (_, name), r in server.runs.items() if "analysis" not in name} == {
        n: i for n, i in inits.items() if "analysis" not in n
    }


def test_upload_without_a_login_or_a_server_is_one_clear_error(sweep, server, capsys, monkeypatch):  # noqa: F811
    server.failing = "key"
    assert main(["upload-wandb", "sweep=sweep"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: W&B at http://127.0.0.1")
    assert "the same command continues" in error
    monkeypatch.delenv("WANDB_API_KEY")
    assert main(["upload-wandb", "sweep=sweep"]) == 2
    assert "run `wandb login`" in capsys.readouterr().err


@pytest.mark.slow
def test_the_analysis_is_one_run_with_figures_tables_and_exponents(tmp_path, server, monkeypatch, capsys):  # noqa: F811
    """For a mirrored sweep that is analyzed twice: there is still one such run."""
    store = synthetic_sweep(tmp_path / "results")
    wandb_client.Target().save(wandb_client.wandb_folder(store.folder))
    monkeypatch.chdir(tmp_path)
    name = store.folder.name
    for _ in range(2):
        assert main(["analyze", f"sweep={name}", "bootstrap.resamples=20", "sensitivity=false"]) == 0
    assert "not on W&B" not in capsys.readouterr().err
    (run,) = server.runs.values()
    assert (run.name, run.job_type, run.group, run.inits) == (f"{name}-analysis", "analysis", name, 2)
    analysis = json.loads((store.report_folder / "analysis.json").read_text())
    for estimate in analysis["estimates"]:
        assert run.summary[f"{estimate['approach']}/params_exponent"] == estimate["params_exponent"]
    logged = {key for row in run.history for key in row}
    figures = {f"figures/{p.stem}" for p in (store.report_folder / "figures").glob("*.png")}
    assert figures
    assert figures | {"report", "exponents", "budgets"} <= logged
    assert {a["input"]["input"]["artifactCollectionName"] for a in server.artifacts.values()} >= {
        f"{name}-ledger"
    }


@pytest.mark.slow
def test_the_end_of_a_sweep_names_the_command_that_uploads_it(sweep, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = sweep.load_records()[0][0]
    tracker = make_tracker({"kind": "wandb"}, sweep.folder)
    tracker.start(PlannedRun(record.spec, record.execution), "abc")
    tracker.finish(record)
    wait_for_mirrors()
    assert main(["sweep", "sweep=sweep", "tracker=wandb", "tracker.mode=offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("W&B: ")]
    assert said[-1].endswith("to upload all of them: scaling-lab upload-wandb sweep=sweep")


def test_the_workspace_shows_loss_against_flops_and_groups_by_budget(sweep, server, capsys):  # noqa: F811
    pytest.importorskip("wandb_workspaces")
    assert main(["wandb-workspace", "sweep=sweep"]) == 0
    assert f"workspace: {server.url}/team/scaling_lab?nw=" in capsys.readouterr().out
    (view,) = server.views
    section = json.loads(view["spec"])["section"]
    (runs,) = section["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "budget_flops.value"}]
    wanted = {(f["key"]["name"], f["op"], f["value"]) for f in runs["filters"]["filters"]}
    assert wanted == {("group", "=", "sweep"), ("jobType", "!=", "analysis")}
    panels = [p["config"] for s in section["panelBankConfig"]["sections"] for p in s["panels"]]
    assert panels[0]["xAxis"] == "train_flops"
    assert panels[0]["metrics"] == ["val_loss_nats"]
    assert (panels[1]["xAxis"], panels[1]["yAxis"]) == ("config:N.value", "summary:final_val_loss_nats")
    server.failing = "key"
    assert main(["wandb-workspace", "sweep=sweep"]) == 2
    assert "did not accept the workspace" in capsys.readouterr().err


def test_the_end_of_a_sweep_checks_what_is_missing(sweep, server, capsys):  # noqa: F811
    """A server that accepted the runs but not their data (quota exceeded) is noticed, and so is one that does not respond."""
    from scaling_lab.cli.display.console import Console
    from scaling_lab.tracking.wandb.study import report_unsynced_runs, upload_run

    records, _ = sweep.load_records()
    for record in records:
        upload_run(record, wandb_client.Target(), sweep)
    report_unsynced_runs(sweep, Console())
    assert capsys.readouterr().err.count("warning") == 0
    lines = server.run(f"sweep-{records[0].run_id}").lines
    del lines[max(lines)]
    report_unsynced_runs(sweep, Console())
    said = capsys.readouterr().err
    assert (
        "1 run is missing or incomplete on W&B. The local records are complete; scaling-lab upload-wandb sweep=sweep"
        in said
    )
    wandb_client.remember_failure(TimeoutError("no answer"))
    report_unsynced_runs(sweep, Console())
    assert "W&B did not list its runs" in capsys.readouterr().err
