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
# What everything that fits observations may import.
FITTING = (
    *("core", "analysis.estimate", "analysis.frontiers"),
    *("analysis.data", "analysis.laws", "analysis.fitting"),
)
# Room -> rooms it may import, itself included; the longest prefix of a module's name decides. `cli` may import all.
ALLOWED: dict[str, tuple[str, ...]] = {
    "core": ("core",),
    "planning": ("core", "planning"),
    "corpora": ("core", "corpora"),
    "tracking.sink": ("core", "tracking.sink"),
    "training": ("core", "planning", "training", "tracking.sink"),
    "training.data": ("core", "planning", "training.data"),
    "training.models": ("core", "training.models"),
    "training.engine": ("core", "planning", "training.engine"),
    "training.measure": (
        *("core", "planning", "training.data", "training.models", "training.engine", "training.measure"),
    ),
    "training.parallel": ("core", "planning", "training.engine", "training.measure", "training.parallel"),
    "analysis.estimate": ("core",),
    "analysis.frontiers": ("core", "analysis.estimate"),
    "analysis.data": ("core", "analysis.estimate", "analysis.data"),
    "analysis.laws": ("core", "analysis.estimate", "analysis.laws"),
    "analysis.fitting": ("core", "analysis.estimate", "analysis.laws", "analysis.fitting"),
    "analysis.inference.bands": ("core", "analysis.estimate"),
    "analysis.inference.bootstrap": (
        *("core", "analysis.estimate", "analysis.data", "analysis.inference.bands"),
    ),
    "analysis.approaches": (*FITTING, "analysis.inference.bootstrap", "analysis.approaches"),
    "analysis.inference": (*FITTING, "analysis.approaches", "analysis.inference"),
    "analysis.settings": (
        *("core", "analysis.data", "analysis.laws", "analysis.approaches", "analysis.inference.bootstrap"),
    ),
    "analysis.text": (),
    "analysis.finding": ("core", "analysis.text"),
    "analysis.json_parts": ("core", "analysis.estimate", "analysis.inference"),
    "analysis.studies": (
        *FITTING,
        *("analysis.approaches", "analysis.inference", "analysis.settings", "analysis.studies"),
        *("analysis.finding", "analysis.json_parts", "analysis.text"),
    ),
    "analysis": ("core", "analysis"),
    "reporting": ("core", "analysis", "reporting"),
    "tracking": ("core", "analysis", "reporting", "tracking"),
    "launching": ("core", "planning", "training", "tracking", "launching"),
}
EVERYTHING = ("api", "cli", "hydra_plugins")
# Exceptions that the refactoring has not removed yet.
PENDING: set[tuple[str, str]] = set()
PENDING_CYCLES: set[tuple[str, str]] = set()
# Third-party packages that only some rooms may import.
ONLY_IN = {
    "torch": {"training", "launching"},
    "hydra": {"cli", "hydra_plugins", "launching"},
    "omegaconf": {"cli", "hydra_plugins", "launching"},
    "wandb": {"tracking"},
}
PACKAGES = ("scaling_lab", "hydra_plugins")
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


NAMES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources()}


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it: inside functions and for types too."""
    found = set()
    for name in imports(path):
        while name and name not in NAMES:
            name = name.rpartition(".")[0]
        found.add(name)
    deepest = {n for n in found if not any(other.startswith(n + ".") for other in found)}
    return deepest - {""}


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    zone = name.split(".")[0]
    room = max((r for r in ALLOWED if within(name, (r,))), key=len, default=None)
    assert room is not None or zone in EVERYTHING, f"{name} is in no room of ALLOWED"
    for target in imported_modules(path):
        target = target.removeprefix("scaling_lab.")
        if room is not None and (zone, target) not in PENDING:
            assert within(target, ALLOWED[room]), f"{name} must not import {target}"
    for target in imports(path):
        package = target.split(".")[0]
        owners = ONLY_IN.get(package)
        # cli may ask torch what this machine can do (doctor) and hand over wandb's login state; it trains nothing.
        assert owners is None or zone in owners or zone == "cli", f"{name} must not import {package}"
        if zone == "core":
            if package == "pyarrow" and path.name == "token_parquet.py":
                continue  # imported only where a Parquet file is given
            assert package in CORE_PACKAGES or package in sys.stdlib_module_names, (
                f"core must not import {package}"
            )


def test_no_import_cycles():
    """A depth-first search over all imports, including those inside functions, finds no cycle."""
    graph = {name: imported_modules(path) - {name} for name, path in NAMES.items()}
    graph = {n: {t for t in targets if not n.startswith(t + ".")} for n, targets in graph.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        state[name] = 1
        for target in sorted(graph[name]):
            if (name, target) in PENDING_CYCLES:
                continue
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
            "import scaling_lab as sl; sl.analyze, sl.read_table, sl.UserError",
            {"torch", "hydra", "omegaconf", "wandb", "datasets", "pandas", "matplotlib", "rich"},
        ),
        (
            "import scaling_lab.core.spec, scaling_lab.core.storage.store",
            {"torch", "hydra", "wandb", "datasets", "pandas"},
        ),
        ("import scaling_lab.planning.plan", {"torch", "hydra", "wandb", "datasets"}),
        ("import scaling_lab.analysis.analysis", {"torch", "hydra", "wandb", "datasets", "matplotlib"}),
        ("import scaling_lab.launching.worker", {"hydra", "wandb", "datasets"}),
    ],
)
def test_what_importing_loads(code, forbidden):
    assert not loaded_after(code) & forbidden


def test_tests_share_code_through_helpers_alone():
    """Neither test modules nor helpers import a test module."""
    test_modules = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        taken = {name.split(".")[0] for name in imports(path)} & test_modules
        assert not taken, (
            f"{path.relative_to(ROOT)} imports {sorted(taken)}: move what they share to tests/helpers"
        )
    # Only test modules and conftest.py are at the top of tests/.
    assert all(name == "conftest" or name.startswith("test_") for name in test_modules), sorted(test_modules)


def private_names(path: Path) -> set[str]:
    """Private names of the package that a test imports, reads from an imported module, or replaces by monkeypatch."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            ours |= {alias.asname or alias.name for alias in node.names}
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
        elif isinstance(node, ast.Import):
            ours |= {a.asname for a in node.names if a.asname and a.name.split(".")[0] in PACKAGES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            found |= {node.attr} if node.attr.startswith("_") and not node.attr.startswith("__") else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            texts = [
                a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
            names = [text.rpartition(".")[2] for text in texts[:1]]
            found |= {n for n in names if n.startswith("_") and not n.startswith("__")}
    return found


def test_tests_use_public_names_only():
    """A private name may change at any time. `_moved` is the table of old module paths, which has a test of its own."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert private_names(path) <= {"_moved"}, f"{path.relative_to(ROOT)}: {sorted(private_names(path))}"


def test_every_file_has_a_docstring():
    for path in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path.relative_to(ROOT)} has no docstring"


def test_configs_equal_the_codes_defaults():
    """The defaults that conf/ shows must equal those of the dataclasses; files named otherwise than their kind are variants."""
    import dataclasses

    import yaml

    from scaling_lab.core import parametrization
    from scaling_lab.core.registry import members
    from scaling_lab.core.spec import schedule_class
    from scaling_lab.core.storage.serialization import to_dict

    groups = {
        "recipe": members("scaling_lab.planning.recipes"),
        "design": members("scaling_lab.planning.designs"),
        "data": members("scaling_lab.core.sources"),
        "parametrization": parametrization.CLASSES,
        "schedule": {p.stem: schedule_class(p.stem) for p in (ROOT / "conf" / "schedule").glob("*.yaml")},
    }
    compared = 0
    for group, classes in groups.items():
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            data = yaml.safe_load(path.read_text())
            cls = classes[data.get("kind", path.stem)]
            if data.get("kind", path.stem) != path.stem:
                continue  # a variant, which sets other values on purpose
            for field in dataclasses.fields(cls):
                if field.name not in data or data[field.name] == "???":
                    continue
                default = field.default_factory() if callable(field.default_factory) else field.default
                assert data[field.name] == to_dict(default), f"{path.name}: {field.name}"
                compared += 1
    assert compared > 20


def test_pyproject_lists_exactly_the_existing_packages():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    there = {p for p in there if ".hydra_plugins" not in p}
    assert there <= listed, f"missing in pyproject.toml: {sorted(there - listed)}"
    assert listed - there == {"scaling_lab.conf", "hydra_plugins", "hydra_plugins.scaling_lab"}


# Folders whose members are found by scanning: they grow by design.
SCANNED = (
    "analysis/laws", "analysis/published", "analysis/studies", "cli/commands", "core/shapes", "core/sources",
    "planning/designs", "planning/recipes", "reporting/studies", "training/data/generated", "training/models",
)  # fmt: skip


def test_no_folder_has_more_than_15_modules():
    folders = [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir())]
    sizes = {
        str(p.relative_to(PACKAGE)): len([m for m in p.glob("*.py") if m.name != "__init__.py"])
        for p in folders
    }
    assert {name: n for name, n in sizes.items() if n > 15 and name not in SCANNED} == {}
    assert set(SCANNED) <= sizes.keys()


def git(*arguments: str) -> list[str]:
    """Output lines of a git command in the repository; exit status 1, "no match", is not an error."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_git_ignores_no_source_file():
    """A pattern such as `wandb/` without a leading slash would silently leave scaling_lab/tracking/wandb out of commits."""
    caches = ("__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache")
    ignored = git("ls-files", "--others", "--ignored", "--exclude-standard", "scaling_lab", "conf", "tests")
    assert [p for p in ignored if not p.endswith(".pyc") and not set(Path(p).parts) & set(caches)] == []
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard") == []


def test_git_ignores_sweeps_but_no_published_results():
    kept = [f"results/{folder}/some_new_file.txt" for folder in ("benchmarks", "published", "studies")]
    sweep = "results/some_sweep/plan.json"
    assert git("check-ignore", "--no-index", *kept, sweep) == [sweep]
