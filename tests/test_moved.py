"""Tests of the old module paths: importing one names the new path, which exists; old commands and old jobs say what to do."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import scaling_lab
from scaling_lab import _moved


def listed() -> Iterator[str]:
    """Every old path that the table names."""
    for package, targets in _moved.MOVED.items():
        for names in targets.values():
            for entry in names.split():
                name = entry.partition("=")[0]
                if name != "*":
                    yield f"{package}.{name}".lstrip(".")


UNLISTED = {
    "analyse.laws.kaplan": "analysis.laws.kaplan",
    "plan.designs.isoflop": "planning.designs.isoflop",
    "prepare.writer": "corpora.writer",
    "train.models.gpt2": "training.models.gpt2",
}


@pytest.mark.parametrize("old", [*listed(), *UNLISTED])
def test_an_old_path_names_the_new_one(old):
    new = _moved.new_path(old)
    assert UNLISTED.get(old, new) == new
    with pytest.raises(ImportError) as error:
        importlib.import_module(f"scaling_lab.{old}")
    assert "\n" not in str(error.value)
    found = re.match(rf"scaling_lab\.{re.escape(old)} is now (in )?(scaling_lab\.[\w.]*\w)", str(error.value))
    assert found is not None, error.value
    assert importlib.util.find_spec(found[2]) is not None
    assert f"scaling_lab.{new}".startswith(found[2])
    # A module that was divided or moved once more is at least in the package that is named.
    assert found[1] or found[2] == f"scaling_lab.{new}"


def test_other_names_are_simply_missing():
    for name in ("scaling_lab.nothing", "scaling_lab.core.nothing", "scaling_lab.training.nothing"):
        with pytest.raises(ModuleNotFoundError, match="No module named"):
            importlib.import_module(name)


def test_a_failed_import_leaves_the_public_functions_alone():
    before = scaling_lab.report
    with pytest.raises(ImportError, match=r"is now scaling_lab\.reporting\.page"):
        importlib.import_module("scaling_lab.report.report")
    assert scaling_lab.report is before


def test_the_old_worker_command_names_the_new_ones():
    done = subprocess.run(
        [sys.executable, "-m", "scaling_lab.train.worker", "results/s"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "scaling-lab worker FOLDER" in done.stderr
    assert "python -m scaling_lab.worker FOLDER" in done.stderr


def test_a_pickled_job_of_the_old_version_asks_to_submit_it_again():
    old = b"cscaling_lab.cli.cluster_job\nClusterJob\n."  # a reference to the class, as pickle writes it
    with pytest.raises(ImportError, match="the same `scaling-lab sweep` command submits it again"):
        pickle.loads(old)
