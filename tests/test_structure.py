"""The structure: which zone may import which, what importing loads, and that configs equal the code's defaults."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "scaling_lab"
# Zone -> zones it may import. `hydra_plugins` is part of cli.
ALLOWED = {
    "core": {"core"},
    "plan": {"core", "plan"},
    "prepare": {"core", "prepare"},
    "train": {"core", "plan", "train"},
    "analyse": {"core", "analyse"},
    "report": {"core", "analyse", "report"},
    "cli": {"core", "plan", "prepare", "train", "analyse", "report", "cli"},
    "hydra_plugins": {"core", "plan", "prepare", "train", "analyse", "report", "cli", "hydra_plugins"},
}
# Outside packages with one owner.
ONLY_IN = {
    "torch": {"train"},
    "hydra": {"cli", "hydra_plugins"},
    "omegaconf": {"cli", "hydra_plugins"},
    "wandb": {"train"},
}
CORE_PACKAGES = {"numpy", "scaling_lab"}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too; relative imports are resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if len(p.relative_to(PACKAGE).parts) > 1)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_zones(path):
    zone = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "scaling_lab" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
            assert parts[1] in ALLOWED[zone] or (
                zone == "plan" and path.name == "power.py" and parts[1] == "analyse"
            ), f"{zone} must not import {name}"
        owners = ONLY_IN.get(parts[0])
        # cli may ask torch what this machine can do (doctor) and hand over wandb's login state; it trains nothing.
        assert owners is None or zone in owners or zone == "cli", f"{zone} must not import {parts[0]}"
        if zone == "core":
            if parts[0] == "pyarrow" and path.name == "token_parquet.py":
                continue  # imported only where a Parquet file is given
            assert parts[0] in CORE_PACKAGES or parts[0] in sys.stdlib_module_names, (
                f"core must not import {parts[0]}"
            )


def test_no_cycles_between_modules():
    """At import time (imports inside functions are free): a depth-first search finds no way back."""
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources()
    }
    for name, path in names.items():
        top = ast.parse(path.read_text(encoding="utf-8")).body
        targets = set()
        for node in top:
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        graph[name] = {t for t in targets if t in names and t != name and not name.startswith(t + ".")}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        state[name] = 1
        for target in sorted(graph[name]):
            assert state.get(target) != 1, f"cycle: {' -> '.join((*trail, name, target))}"
            if target not in state:
                visit(target, (*trail, name))
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, ())


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        (
            "import scaling_lab",
            {"torch", "hydra", "omegaconf", "wandb", "datasets", "numpy", "pandas", "matplotlib"},
        ),
        (
            "import scaling_lab.core.spec, scaling_lab.core.store",
            {"torch", "hydra", "wandb", "datasets", "pandas"},
        ),
        ("import scaling_lab.plan.design", {"torch", "hydra", "wandb", "datasets"}),
        ("import scaling_lab.analyse.analysis", {"torch", "hydra", "wandb", "datasets", "matplotlib"}),
        ("import scaling_lab.train.worker", {"hydra", "wandb", "datasets"}),
    ],
)
def test_what_importing_loads(code, forbidden):
    assert not loaded_after(code) & forbidden


def test_every_file_says_what_it_owns():
    for path in [*sources(), *(ROOT / "tests").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_configs_equal_the_codes_defaults():
    """conf/ shows defaults to readers; the dataclasses own them. They must not drift apart."""
    import dataclasses

    import yaml

    from scaling_lab.core import parametrization
    from scaling_lab.core.registry import members
    from scaling_lab.core.serial import to_dict
    from scaling_lab.core.spec import schedule_class

    groups = {
        "recipe": members("scaling_lab.plan.recipes"),
        "design": members("scaling_lab.plan.designs"),
        "data": members("scaling_lab.core.sources"),
        "parametrization": parametrization.CLASSES,
        "schedule": {p.stem: schedule_class(p.stem) for p in (ROOT / "conf" / "schedule").glob("*.yaml")},
    }
    compared = 0
    for group, classes in groups.items():
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            data = yaml.safe_load(path.read_text())
            cls = classes[data.get("kind", path.stem)]
            for field in dataclasses.fields(cls):
                if field.name not in data or data[field.name] == "???":
                    continue
                default = field.default_factory() if callable(field.default_factory) else field.default
                assert data[field.name] == to_dict(default), f"{path.name}: {field.name}"
                compared += 1
    assert compared > 20


def test_packages_in_pyproject_are_the_packages_there_are():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    there = {p for p in there if ".hydra_plugins" not in p}
    assert there <= listed, f"missing in pyproject.toml: {sorted(there - listed)}"
    assert listed - there == {"scaling_lab.conf", "hydra_plugins", "hydra_plugins.scaling_lab"}
