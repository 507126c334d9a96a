"""The documentation of the Python API: docstring examples run, every public name is documented, and importing is light."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
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


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if python_blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_docs(page, tmp_path, monkeypatch, capsys):
    """The blocks of a page run one after another, in a folder with the files that they name."""
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mpl.rcParams, "figure.max_open_warning", 0)
    scope: dict[str, object] = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), scope)
    plt.close("all")
    if page.name == "python.md":
        printed = capsys.readouterr().out
        assert "plan tiny: 4 runs" in printed
        assert "{'completed': 4}" in printed
        assert printed.splitlines()[-1].startswith(
            "loss='val_los': the table has no such column. Did you mean 'val_loss'?"
        )


def test_the_reference_has_every_public_name_and_no_other():
    headings = re.findall(r"^## `sl\.(\w+)`$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sl.__all__


def test_dir_shows_what_is_public():
    assert sl.__all__ == sorted(sl.__all__)
    assert {n for n in dir(sl) if not n.startswith("_")} == set(sl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        sl.analyse  # noqa: B018
    assert sl.UserError is importlib.import_module("scaling_lab.core.errors").UserError


EVERYTHING = """
import importlib, pkgutil
import scaling_lab as sl
for module in pkgutil.walk_packages(sl.__path__, "scaling_lab."):
    importlib.import_module(module.name)

quick = {"bootstrap": {"resamples": 50}, "sensitivity": False, "backtest": False, "profile": False}
called = {}
called["read_table"] = sl.read_table("my_runs.csv")
called["analyze"] = sl.analyze(called["read_table"], **quick)
called["predict"] = sl.predict(called["analyze"], 1e23)
called["fit"] = sl.fit("chinchilla", "my_runs.csv", resamples=50)
called["report"] = sl.report(called["analyze"], "report")
called["load"] = sl.load("report")
called["reproduce"] = sl.reproduce("hoffmann2022", resamples=20)
called["plan"] = sl.plan(
    sweep="one", data={"max_mb": 1}, device="cpu", compile="false", eval={"tokens": 1024},
    design={"budgets_flops": [1e8], "sizes_per_budget": 4, "noise_seeds": 1},
)
called["train"] = sl.train(called["plan"], workers=0, progress=False)
called["load_model"] = sl.load_model(f"results/one/runs/{called['plan'].run_ids[0]}")
called["Sweep"] = sl.Sweep("results/one")
called["UserError"] = sl.UserError("x")
assert sorted(called) == sl.__all__, set(sl.__all__) ^ set(called)
for name, value in called.items():
    assert value is not None and len(repr(value)) < 5000, name
assert called["load"].isoflop.exponent == called["analyze"].isoflop.exponent
assert called["Sweep"].counts == {"completed": len(called["plan"].run_ids)}
"""


def test_every_public_function_works_after_every_module_was_imported(tmp_path):
    """No module of the package takes the place of a public name when it is imported."""
    write_examples(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
