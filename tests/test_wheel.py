"""A wheel installed without the checkout: configs, plugins and templates travel with it, and it runs a whole sweep. With the
requirements of analysis alone, without torch, everything but training works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.example_table import write_examples
from scaling_lab.cli.table import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: in the checkout setuptools would add what an older build left in build/."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("scaling_lab", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(source)],
        check=True,
    )
    (wheel,) = folder.glob("scaling_lab-*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel. Its dependencies are this environment's, through a .pth file: nested .pth
    files are not read, so an editable install of the checkout there stays out of sight."""
    environment = virtual_environment(tmp_path_factory.mktemp("full"), wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(packages) + "\n")
    return environment


@pytest.fixture(scope="module")
def without_dependencies(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and nothing else: `pip install --no-deps WHEEL`."""
    return virtual_environment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def light(wheel, tmp_path_factory) -> Path:
    """The light way in, with packages from the index: the wheel without dependencies, then the file that lies in it."""
    environment = virtual_environment(tmp_path_factory.mktemp("light"), wheel)
    (requirements,) = environment.glob("lib/python*/site-packages/scaling_lab/requirements-analysis.txt")
    pip_install(environment, "-r", str(requirements), "-c", str(ROOT / "constraints.txt"))
    return environment


def virtual_environment(folder: Path, wheel: Path) -> Path:
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip_install(environment, "--no-deps", str(wheel))
    return environment


def pip_install(environment: Path, *arguments: str) -> None:
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *arguments], check=True)


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(installed / "bin" / "scaling-lab"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_it_is_the_wheel_and_not_the_checkout(installed, tmp_path):
    done = subprocess.run(
        [str(installed / "bin" / "python"), "-c", "import scaling_lab; print(scaling_lab.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_quickstart_from_a_wheel(installed, tmp_path):
    """The quickstart's own command, on a smaller grid (the full one is test_quickstart.py)."""
    done = run(
        installed, tmp_path, "quickstart", "design.budgets_flops=[2e9,8e9,3.2e10]", "design.sizes.min_width=4",
        "design.n_opt_at_1e12=4e4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    analysis = json.loads((tmp_path / "results/quickstart/report/analysis.json").read_text())
    assert [e["approach"] for e in analysis["estimates"]] == ["envelope", "isoflop", "parametric"]
    assert analysis["observations"]["n_runs"] >= 20
    report = (tmp_path / "results/quickstart/report/report.html").read_text()
    assert report.count("<svg") >= 4
    assert "report.html" in done.stdout


def test_help_and_errors_from_a_wheel(installed, tmp_path):
    assert "quickstart" in run(installed, tmp_path, "--help").stdout
    bad = run(installed, tmp_path, "sweep", "experiment=quikstart")
    assert bad.returncode == 2
    assert "quickstart" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert not list(tmp_path.iterdir())


def test_pip_lines_name_the_wheel(installed, wheel, tmp_path):
    code = "from scaling_lab.core.installation import install_line; print(install_line('slurm'))"
    done = python(installed, tmp_path, code)
    assert done.stdout.strip() == f"pip install '{wheel}[slurm]'"


def python(environment: Path, cwd: Path, code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_without_any_dependency_the_first_command_names_what_to_install(without_dependencies, tmp_path):
    assert "quickstart" in run(without_dependencies, tmp_path, "--help").stdout
    (site,) = without_dependencies.glob("lib/python*/site-packages")
    for command in (["doctor"], ["analyze", "runs=x.csv"], ["plan", "experiment=quickstart"]):
        done = run(without_dependencies, tmp_path, *command)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.endswith(
            f"is not installed: pip install -r {site}/scaling_lab/requirements-analysis.txt"
        ), line


def test_the_light_installation_analyzes_and_plans(light, tmp_path):
    """In an environment without torch, datasets, tokenizers and wandb."""
    installed = run(light, tmp_path, "doctor").stdout
    for name in ("torch", "datasets", "tokenizers", "wandb"):
        assert f"'{name}>=" in installed
    write_examples(tmp_path)
    commands = (
        "analyze runs=my_runs.csv",
        "analyze runs=my_runs.csv bootstrap.resamples=50 --json",
        "predict runs=my_runs.csv compute_flops=1e22",
        "reproduce published=hoffmann2022",
        "plan sweep=generated data=context_tree design.budgets_flops=[1e9,4e9]",
        "plan experiment=quickstart",
        "status sweep=generated",
        "report sweep=generated",
        "doctor",
        "--help",
        "--version",
        *(f"{name} --help" for name in COMMANDS),
    )
    for command in commands:
        done = run(light, tmp_path, *command.split())
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
    assert (tmp_path / "results/tables/my_runs/report.html").read_text().count("<svg") >= 4
    assert len(json.loads((tmp_path / "results/generated/plan.json").read_text())["runs"]) >= 8


def test_the_light_installation_names_what_training_needs(light, tmp_path):
    for command in (
        ["quickstart"],
        ["sweep", "experiment=quickstart"],
        ["train", "model.width=8", "train_tokens=1e4"],
    ):
        done = run(light, tmp_path, *command)
        assert done.returncode == 2
        assert (
            done.stderr == "error: training needs torch, which is not installed: pip install 'torch>=2.6'\n"
        )
    assert not list(tmp_path.iterdir())


def test_python_in_the_light_installation(light, tmp_path):
    write_examples(tmp_path)
    code = """
import sys
import pandas as pd
import scaling_lab as sl

frame = pd.read_csv("my_runs.csv").rename(columns={"loss": "val_loss"})
result = sl.analyze(frame, loss="val_loss", bootstrap={"resamples": 50})
assert result.isoflop.exponent.interval.contains(0.51)
assert result.predict(1e23).parametric.params_opt.estimate > 1e10
assert sl.fit("chinchilla", frame, loss="val_loss", resamples=50).status == "converged"
assert sl.report(result, "report").exists()
assert sl.load("report").n_runs == 36
assert len(sl.plan(sweep="x", data="context_tree", design={"budgets_flops": [1e9]}).to_frame()) >= 4
result.plot.frontier()
try:
    sl.train(model={"width": 8}, train_tokens=1e4)
except sl.UserError as error:
    print(error)
assert "torch" not in sys.modules
"""
    done = python(light, tmp_path, code)
    assert done.stdout == "training needs torch, which is not installed: pip install 'torch>=2.6'\n"
