"""Tests of what `scaling-lab sweep` passes to Hydra: the user's launchers, their options, callbacks, the tracker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling_lab.cli.main import main
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching import hydra_jobs
from scaling_lab.tracking.sink.wandb_client import Target, wandb_folder

TINY_LINE = (
    "sweep=s data.max_mb=1 eval.tokens=1024 device=cpu compile=false design.budgets_flops=[1e7] design.sizes_per_budget=4 "
    "design.noise_seeds=1 design.sizes.min_width=4 design.sizes.max_width=16 design.sizes.width_ratio=1.3 "
    "design.sizes.width_multiple=4 design.sizes.min_depth=1 design.n_opt_at_1e12=200K data.max_epochs=99"
)
TINY = TINY_LINE.split()
# A launcher and a callback as another package would provide them.
LAUNCHER = """
import json
from hydra._internal.core_plugins.basic_launcher import BasicLauncher

class RecordingLauncher(BasicLauncher):
    def __init__(self, **options):
        super().__init__()
        self.options = dict(options)

    def launch(self, job_overrides, initial_job_idx):
        with open("launched.json", "w") as file:
            json.dump({"options": self.options, "jobs": [list(job) for job in job_overrides]}, file)
        return super().launch(job_overrides, initial_job_idx)
"""
CALLBACK = """
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

def note(line):
    with open("callbacks.txt", "a") as file:
        print(line, file=file)

class Recording(Callback):
    def on_multirun_start(self, config, **kwargs): note(f"start {config.sweep} {HydraConfig.get().job.config_name}")
    def on_multirun_end(self, config, **kwargs): note("end")
    def on_job_start(self, config, **kwargs): note(f"job {len(config.run_ids)}")
    def on_job_end(self, config, job_return, **kwargs): note(f"job end {job_return.return_value}")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plugin = tmp_path / "plugins/hydra_plugins/recording_launcher/__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(LAUNCHER)
    (tmp_path / "plugins/recording_callback.py").write_text(CALLBACK)
    own = tmp_path / "own/hydra/launcher"
    own.mkdir(parents=True)
    (own / "recording.yaml").write_text(
        "_target_: hydra_plugins.recording_launcher.RecordingLauncher\nqueue: short\nworkers: ${workers}\n"
    )
    (own / "two.yaml").write_text(
        "_target_: hydra_plugins.scaling_lab.local_launcher.LocalLauncher\nworkers: 2\n"
    )
    (own / "absent.yaml").write_text("_target_: hydra_plugins.absent_launcher.AbsentLauncher\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Hydra looks for plugins once."""
    return subprocess.run(
        [sys.executable, "-m", "scaling_lab.cli.main", "sweep", *TINY, *argv],
        cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(folder / "plugins")},
    )  # fmt: skip


def launched(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "launched.json").read_text()))


def test_a_launcher_of_the_users_own_gets_its_options_and_the_run_ids(folder):
    done = sweep(
        folder, "config_dir=own", "hydra/launcher=recording", "+hydra.launcher.nodes=3", "hydra.launcher.queue=long",
        "workers=7", "seed=0,1", "hydra.sweeper.runs_per_job=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 of 8 runs completed" in done.stdout
    found = launched(folder)
    assert found["options"] == {"queue": "long", "workers": 7, "nodes": 3}
    plan = RunStore(folder / "results/s").read_plan()
    ids = [
        job[-1].removeprefix("++run_ids=[").removesuffix("]").replace("'", "").split(",")
        for job in found["jobs"]
    ]
    assert [len(job) for job in ids] == [3, 3, 2]
    assert [run_id for job in ids for run_id in job] == [run.run_id for run in plan.runs]
    # A job needs nothing else of the command line: plan.json has it.
    keys = {override.partition("=")[0] for job in found["jobs"] for override in job}
    assert keys == {"++sweep", "++results_dir", "++tracker", "++run_ids"}


def test_a_yaml_of_the_users_own_may_name_our_launcher(folder):
    done = sweep(folder, "config_dir=own", "hydra/launcher=two", "hydra.launcher.workers=1")
    assert done.returncode == 0, done.stderr
    assert "4 runs on 1 worker (cpu)" in done.stdout


def test_callbacks_see_the_sweep_and_its_jobs(folder):
    callback = "+hydra.callbacks.recording._target_=recording_callback.Recording"
    done = sweep(folder, "hydra/launcher=basic", "hydra.sweeper.runs_per_job=2", callback)
    assert done.returncode == 0, done.stderr
    lines = (folder / "callbacks.txt").read_text().splitlines()
    assert lines == ["start s sweep", "job 2", "job end 2", "job 2", "job end 2", "end"]
    # With nothing left to do, and with a launcher without Hydra jobs.
    for launcher in ("basic", "local"):
        (folder / "callbacks.txt").unlink()
        assert sweep(folder, f"hydra/launcher={launcher}", callback).returncode == 0
        assert (folder / "callbacks.txt").read_text().splitlines() == ["start s sweep", "end"]


@pytest.mark.parametrize("launcher", ["recording", "local"])
def test_the_trackers_options_reach_the_job(folder, launcher):
    tracker = ["tracker=wandb", "tracker.mode=offline", "tracker.project=it's (a) test, of=text"]
    done = sweep(
        folder, "config_dir=own", f"hydra/launcher={launcher}", "hydra.sweeper.runs_per_job=4", *tracker
    )
    assert done.returncode == 0, done.stdout + done.stderr
    target = Target.load(wandb_folder(folder / "results/s"))
    assert target is not None
    assert (target.project, target.entity, target.mode) == ("it's (a) test, of=text", None, "offline")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["+hydra.launcher.wrokers=1"], "wrokers"),
        (["hydra.launcher.wrokers=1"], "hydra.launcher.wrokers"),
        (["hydra.launcher.workers=1,2"], "hydra.launcher.workers=1,2: an option of Hydra's takes one value"),
        (["hydra.launcher.workers=[1"], "[1"),
        (["hydra/launcher=nowhere"], "hydra/launcher='nowhere' is not known. Choices: absent, basic"),
        (["hydra/launcher=absent"], "hydra/launcher=absent: Unknown plugin class : 'hydra_plugins.absent_launcher"),
        (["hydra.sweeper.runs_per_job=0"], "hydra.sweeper.runs_per_job=0 must be a whole number"),
        (["hydra/sweeper=basic"], "hydra/sweeper=basic: only train -m takes a sweeper"),
        (["+hydra.callbacks.a._target_=no.Where"], "no.Where"),
        (["results_dir=a${b}"], "results_dir='a${b}'"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line_and_nothing_is_planned(folder, capsys, options, words):
    assert main(["sweep", *TINY, "config_dir=own", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list(folder.glob("*/s/plan.json"))


@pytest.mark.parametrize(
    ("launcher", "option", "words"),
    [
        ("local", "workers=abc", "workers='abc' must be"),
        ("local", "workers=0", "workers=0 must be"),
        ("submitit_local", "workers=0", "workers=0 must be"),
        ("submitit_local", "timeout_min=soon", "timeout_min='soon' must be"),
        ("submitit_local", "time_factor=.5", "time_factor=0.5 must be"),
    ],
)
def test_wrong_values_of_our_launchers_are_refused(capsys, launcher, option, words):
    assert main(["sweep", *TINY, f"hydra/launcher={launcher}", f"hydra.launcher.{option}"]) == 2
    assert words in capsys.readouterr().err


def test_a_launcher_of_an_extra_that_is_not_installed_names_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(hydra_jobs, "extras", lambda: ("absent",))
    for argv in (
        ["sweep", *TINY],
        ["train", "-m", "model.width=8", "model.depth=1", "train_tokens=4K", "data.max_mb=1"],
    ):
        assert main([*argv, "config_dir=own", "hydra/launcher=absent"]) == 2
        error = capsys.readouterr().err
        assert "hydra/launcher=absent is not installed: pip install " in error
        assert "[absent]" in error


def test_a_multirun_has_no_plan(folder, capsys):
    argv = [
        "train",
        "-m",
        "model.width=8,12",
        "model.depth=1",
        "train_tokens=4K",
        "data.max_mb=1",
        "device=cpu",
    ]
    for option in ("hydra/launcher=local", "hydra/sweeper=scaling_lab_plan"):
        assert main([*argv, option]) == 2
        assert f"error: {option}" in capsys.readouterr().err
