"""What the Python API says of itself: docstring examples run, every public name is documented, and importing is light."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest

import scaling_lab as sl
import scaling_lab.api
from helpers.example_table import write_examples

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "scaling_lab.api",
    *(m.name for m in pkgutil.iter_modules(scaling_lab.api.__path__, "scaling_lab.api.")),
]
# The sweep that examples name, results/tiny.
TINY_SWEEP = {
    "sweep": "tiny",
    "data": {"max_mb": 1},
    "device": "cpu",
    "compile": "false",
    "design": {"budgets_flops": [1e8], "sizes_per_budget": 4, "noise_seeds": 1},
    "eval": {"tokens": 1024},
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_examples(folder)
    made = sl.plan(results_dir=folder / "results", **TINY_SWEEP)
    assert sl.train(made, workers=0, progress=False).counts == {"completed": 4}
    return folder


@pytest.fixture(scope="module")
def analysis(example_folder):
    return sl.analyze(example_folder / "my_runs.csv")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, analysis, example_folder, monkeypatch):
    """Each runs in a folder with my_runs.csv; `sl`, `pd` and `analysis` are there."""
    monkeypatch.chdir(example_folder)
    monkeypatch.setitem(mpl.rcParams, "figure.max_open_warning", 0)
    module = importlib.import_module(name)
    scope = {"sl": sl, "pd": pd, "analysis": analysis}
    failed, _ = doctest.testmod(module, extraglobs=scope, optionflags=FLAGS)
    assert failed == 0


def test_every_public_function_has_an_example():
    for name in sl.__all__:
        public = getattr(sl, name)
        if not isinstance(public, type):
            assert re.search(rf">>> .*sl\.{name}\(", public.__doc__), f"sl.{name} has no example"
            assert "Raises:" in public.__doc__, f"sl.{name} does not say what it raises"


def test_dir_shows_what_is_public():
    assert sl.__all__ == sorted(sl.__all__)
    assert {n for n in dir(sl) if not n.startswith("_")} == set(sl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        sl.analyse  # noqa: B018
    assert sl.UserError is importlib.import_module("scaling_lab.core.errors").UserError


def test_importing_loads_nothing_of_the_package():
    """A module that is not loaded takes no time: within .2 s on any machine, and nothing heavy by accident."""
    code = (
        "import sys; before = set(sys.modules); import scaling_lab; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "scaling_lab" in loaded
    # The names of modules that were moved are known at once, so that importing one names its new place.
    assert [name for name in loaded if name.startswith("scaling_lab.")] == ["scaling_lab._moved"]
    assert not [
        name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names | {"scaling_lab"}
    ]
