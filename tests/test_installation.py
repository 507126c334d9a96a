"""Tests of the advised pip lines, and of an installation without torch, datasets, tokenizers and wandb."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from helpers.example_table import write_examples
from scaling_lab.cli.main import main
from scaling_lab.cli.table import COMMANDS
from scaling_lab.core import installation
from scaling_lab.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
REQUIRES = [
    "numpy>=1.26",
    "torch>=2.6",
    "hydra-core<1.4,>=1.3.2",
    'submitit>=1.5.2; extra == "slurm"',
    'Hydra_Submitit_Launcher >= 1.2 ; extra == "slurm"',
    'scaling-lab[slurm]; extra == "dev"',
]


@pytest.fixture
def installed_from(monkeypatch):
    """Pretend that the project was installed from the origin of a direct_url.json (None: from an index)."""

    def pretend(record: dict | None, requires: list[str] = REQUIRES) -> None:
        class Distribution:
            def __init__(self, name: str) -> None:
                assert name == "scaling-lab"
                self.requires = requires

            def read_text(self, name: str) -> str | None:
                assert name == "direct_url.json"
                return None if record is None else json.dumps(record)

        monkeypatch.setattr(installation, "distribution", Distribution)
        monkeypatch.setattr(installation, "distributions", lambda name: [])
        installation.requirements.cache_clear()

    yield pretend
    installation.requirements.cache_clear()


def test_an_editable_clone(installed_from, tmp_path):
    clone = tmp_path / "my clone"
    clone.mkdir()
    installed_from({"url": clone.as_uri(), "dir_info": {"editable": True}})
    assert installation.install_line("slurm") == f"pip install -e '{clone}[slurm]'"
    installed_from({"url": clone.as_uri(), "dir_info": {}})
    assert installation.install_line("ray") == f"pip install '{clone}[ray]'"
    assert installation.install_line() == f"pip install '{clone}'"


def test_an_egg_info_in_the_clone_does_not_hide_the_installation(tmp_path, monkeypatch):
    """As when Python starts in a clone that a build has left an egg-info in: it is found first and knows no origin."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    for folder in (clone / "scaling_lab.egg-info", site / "scaling_lab-0.1.0.dist-info"):
        folder.mkdir(parents=True)
        for name in ("PKG-INFO", "METADATA"):
            (folder / name).write_text("Metadata-Version: 2.1\nName: scaling-lab\nVersion: 0.1.0\n")
    record = {"url": clone.as_uri(), "dir_info": {"editable": True}}
    (site / "scaling_lab-0.1.0.dist-info" / "direct_url.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "path", [str(clone), str(site), *sys.path])
    assert installation.install_line("slurm") == f"pip install -e '{clone}[slurm]'"


def test_a_wheel(installed_from, tmp_path):
    wheel = tmp_path / "scaling_lab-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed_from({"url": wheel.as_uri(), "archive_info": {"hash": "sha256=0"}})
    assert installation.install_line("wandb") == f"pip install '{wheel}[wandb]'"
    wheel.unlink()
    # A deleted wheel cannot be named, unlike the packages of the extra.
    assert (
        installation.install_line("slurm") == "pip install 'submitit>=1.5.2' 'hydra-submitit-launcher>=1.2'"
    )


def test_addresses(installed_from):
    url = "https://example.org/scaling_lab-0.1.0-py3-none-any.whl"
    installed_from({"url": url, "archive_info": {}})
    assert installation.install_line("slurm") == f"pip install 'scaling-lab[slurm] @ {url}'"
    git = "https://example.org/scaling_lab.git"
    record = {"url": git, "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "abc"}}
    installed_from(record)
    assert installation.install_line("slurm") == f"pip install 'scaling-lab[slurm] @ git+{git}@v1'"
    installed_from({**record, "subdirectory": "python"})
    assert installation.install_line() == f"pip install 'scaling-lab @ git+{git}@v1#subdirectory=python'"


@pytest.mark.parametrize("record", [None, {}, {"url": 3}, ["x"]])
def test_an_unknown_origin_names_the_packages(installed_from, record):
    installed_from(record)
    assert installation.install_line() == "pip install 'numpy>=1.26' 'torch>=2.6' 'hydra-core<1.4,>=1.3.2'"


def test_a_source_tree_that_is_not_installed(monkeypatch):
    def nowhere(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", nowhere)
    installation.requirements.cache_clear()
    try:
        assert installation.install_line("slurm") == f"pip install -e '{ROOT}[slurm]'"
        assert installation.install_hint("torch") == "pip install 'torch>=2.6'"
        assert "slurm" in installation.extras()
    finally:
        installation.requirements.cache_clear()


def test_single_packages_in_the_versions_that_are_needed(installed_from):
    installed_from(None)
    assert (
        installation.install_hint("torch", "hydra-core")
        == "pip install 'torch>=2.6' 'hydra-core<1.4,>=1.3.2'"
    )
    assert str(installation.missing("torch", "training")) == (
        "training needs torch, which is not installed: pip install 'torch>=2.6'"
    )
    assert re.search(
        r"needs numpy, .*: pip install -r \S*requirements-analysis\.txt$",
        str(installation.missing("numpy", "x")),
    )
    assert installation.extras() == ("slurm",)


def test_the_requirements_of_analysis_are_those_of_the_project():
    """The same packages, with the same ranges, as pyproject.toml; and a link at the top of the repository."""
    path, names = installation.analysis_requirements()
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(lines) <= set(project["project"]["dependencies"])
    assert len(names) == len(lines) == len(set(names))
    left_out = {re.match(r"[a-z0-9-]+", d)[0] for d in project["project"]["dependencies"]} - set(names)
    assert left_out == {"torch", "datasets", "tokenizers", "wandb"}
    assert (ROOT / "requirements-analysis.txt").samefile(path)
    assert "requirements-analysis.txt" in project["tool"]["setuptools"]["package-data"]["scaling_lab"]


def test_pip_lines_are_made_in_one_place():
    """The project's name is on no index: a line that is written out would install nothing, or somebody else's package."""
    for path in (ROOT / "scaling_lab").rglob("*.py"):
        if path.name != "installation.py":
            assert "pip install" not in path.read_text(encoding="utf-8"), path
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert "pip install" not in path.read_text(encoding="utf-8"), path


def test_require_names_what_cannot_be_done(monkeypatch):
    installation.require("numpy", "analysis")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        UserError, match="^training needs torch, which is not installed: pip install 'torch>=2.6'$"
    ):
        installation.require("torch", "training")


def test_a_missing_dependency_anywhere_is_one_line(monkeypatch, capsys):
    from scaling_lab.cli.commands import status

    def broken(name: str):
        def run(arguments):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setattr(status, "run", broken("scipy.special"))
    assert main(["status"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"error: `scaling-lab status` needs scipy, which is not installed: pip install -r .*\n", said
    )
    monkeypatch.setattr(status, "run", broken("wandb_workspaces"))
    assert main(["status"]) == 2
    assert re.search(r"needs wandb-workspaces, .*pip install .*wandb", capsys.readouterr().err)
    monkeypatch.setattr(status, "run", broken("scaling_lab.gone"))
    assert main(["status"]) == 70
    assert "internal error: No module named 'scaling_lab.gone'" in capsys.readouterr().err


WITHOUT = """
import contextlib, io, json, sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "datasets", "tokenizers", "wandb", "wandb_workspaces"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden)
from scaling_lab.cli.main import main
ended = {}
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(line.split())
    ended[line] = [status, out.getvalue()[-2000:], err.getvalue()[-2000:]]
print(json.dumps(ended))
"""


def without_torch(folder: Path, lines: list[str]) -> dict[str, list]:
    """Exit status, stdout and stderr of each command line, in one process that lacks the heavy packages."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(lines)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_without_torch_what_needs_none_works(tmp_path):

    write_examples(tmp_path)
    lines = [
        "analyze runs=my_runs.csv bootstrap.resamples=50 sensitivity=false out=report",
        "predict runs=my_runs.csv compute_flops=1e22 bootstrap.resamples=50",
        "reproduce published=hoffmann2022 resamples=50",
        "plan sweep=s data=context_tree design.budgets_flops=[1e9]",
        "plan sweep=gpu data=context_tree design.budgets_flops=[1e9] device=cuda",
        "status sweep=s",
        "report sweep=s",
        "doctor",
        *(f"{command} --help" for command in COMMANDS),
    ]
    ended = without_torch(tmp_path, lines)
    for line, (status, _, err) in ended.items():
        assert status == 0, f"{line}: {err}"
        assert "Traceback" not in err
    doctor = ended["doctor"][1]
    assert "No module named 'torch'" in doctor or "torch" in doctor
    assert "pip install 'torch>=2.6'" in doctor
    assert "next: scaling-lab analyze runs=FILE" in doctor
    assert (
        json.loads((tmp_path / "results/s/plan.json").read_text())["runs"][0]["execution"]["device"] == "cpu"
    )


def test_without_torch_what_needs_it_names_it_in_one_line(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text\n\n" * 200)
    expected = {
        "quickstart": "training needs torch.*'torch>=2.6'",
        "sweep sweep=s data=context_tree design.budgets_flops=[1e9]": "training needs torch.*'torch>=2.6'",
        "train data=context_tree model.width=8 train_tokens=1000": "training needs torch.*'torch>=2.6'",
        "worker .": "training needs torch.*'torch>=2.6'",
        "prepare-data path=text.txt tokenizer=bpe": "tokenizer=bpe needs tokenizers.*'tokenizers>=0.20'",
        "prepare-data source=wikitext103": "source=wikitext103 needs datasets.*'datasets>=3'",
        "import-wandb project=a/b mapping=nanogpt": "W&B needs wandb.*'wandb>=0.19'",
    }
    ended = without_torch(tmp_path, ["plan sweep=p data=context_tree design.budgets_flops=[1e9]", *expected])
    for line, told in expected.items():
        status, out, err = ended[line]
        assert status == 2, (line, out, err)
        assert re.fullmatch(rf"error: {told}\n", err), (line, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results", "text.txt"]
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["p"]
    wandb = ["upload-wandb sweep=p", "wandb-workspace sweep=p"]
    for line, (status, _, err) in without_torch(tmp_path, wandb).items():
        assert status == 2
        assert re.fullmatch(r"error: W&B needs wandb, .*'wandb>=0.19'\n", err), (line, err)
