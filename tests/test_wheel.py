"""A wheel installed without the checkout: configs, plugins and templates travel with it, and it runs a whole sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with the wheel. Its dependencies are this environment's, through a .pth file: nested .pth
    files are not read, so an editable install of the checkout there stays out of sight."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder / "dist"), str(ROOT)],
        check=True,
    )
    (wheel,) = (folder / "dist").glob("scaling_lab-*.whl")
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet", "--no-deps", str(wheel)],
        check=True,
    )  # fmt: skip
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


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
