"""The pip commands that install what is missing, made from where this installation came from.

The project's name is on no package index, so `pip install 'scaling-lab[slurm]'` would find nothing: pip records the origin
of an installation in direct_url.json (PEP 610), and the commands name that origin again.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from scaling_lab.core.errors import UserError

NAME = "scaling-lab"
ANALYSIS_REQUIREMENTS = "requirements-analysis.txt"
"""The packages of an installation that analyzes and plans but does not train; the file lies in the package."""
# Modules whose package has another name.
_PACKAGES = {"hydra": "hydra-core", "yaml": "omegaconf", "wandb_workspaces": "wandb-workspaces"}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*[\"']([^\"']+)[\"'])?")
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


def install_line(extra: str | None = None) -> str:
    """The command that installs this project again, with all its dependencies, and with those of `extra`.

    >>> install_line("slurm")  # doctest: +SKIP
    "pip install -e '/home/me/scaling_lab[slurm]'"
    """
    suffix = "" if extra is None else f"[{extra}]"
    origin = _origin()
    if origin is None:
        names = [name for name, requirement in requirements().items() if _belongs(requirement, extra)]
        return "pip install " + " ".join(shlex.quote(_text(requirements()[name])) for name in names)
    editable, where = origin
    if "://" in where:
        return f"pip install {shlex.quote(f'{NAME}{suffix} @ {where}')}"
    return f"pip install {'-e ' if editable else ''}{shlex.quote(where + suffix)}"


def install_hint(*packages: str) -> str:
    """The command that installs dependencies of this project, in the versions that it needs: `pip install 'torch>=2.6'`.

    Those that analysis needs are installed together, from their file: where one is missing others are too.
    """
    file, needed = analysis_requirements()
    if set(packages) <= set(needed):
        return f"pip install -r {shlex.quote(str(file))}"
    known = requirements()
    return "pip install " + " ".join(shlex.quote(_text(known[p]) if p in known else p) for p in packages)


def analysis_requirements() -> tuple[Path, tuple[str, ...]]:
    """The file of the packages that analysis and planning need, and their names."""
    path = Path(__file__).resolve().parents[1] / ANALYSIS_REQUIREMENTS
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return path, tuple(_parsed(line)["name"] for line in lines if line)


def missing(package: str, what: str, extra: str | None = None) -> UserError:
    """The one line for a package that is not installed.

    Args:
        package: its name.
        what: what cannot be done without it, as the beginning of a sentence: "training".
        extra: the extra of this project that brings it, where it is no plain dependency.
    """
    how = install_hint(package) if extra is None else install_line(extra)
    return UserError(f"{what} needs {package}, which is not installed: {how}")


def require(module: str, what: str) -> None:
    """Raise `UserError` in one line where a dependency is not installed; `what` as in `missing`."""
    if not is_installed(module):
        raise missing(package_of(module), what)


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported, found out without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def package_of(module: str) -> str:
    """The package that a module comes from, by its top-level name."""
    top = module.partition(".")[0]
    return _PACKAGES.get(top, top.replace("_", "-"))


def absent(packages: Iterable[str]) -> list[str]:
    """Those of `packages` that are not installed."""
    found = []
    for name in packages:
        try:
            distribution(name)
        except PackageNotFoundError:
            found.append(name)
    return found


@cache
def requirements() -> dict[str, dict[str, str]]:
    """By package: its name, version range (`spec`) and, where it belongs to one, the `extra`."""
    try:
        lines = distribution(NAME).requires or []
    except PackageNotFoundError:  # a source tree that is on the path without being installed
        lines = _source_requirements()
    found: dict[str, dict[str, str]] = {}
    for parsed in map(_parsed, lines):  # a plain dependency counts before an extra's
        if parsed["name"] != NAME:
            found.setdefault(parsed["name"], parsed)
    return found


def extras() -> tuple[str, ...]:
    """What can stand in the brackets of `install_line`."""
    found = {p["extra"] for p in requirements().values() if p["extra"]}
    return tuple(sorted(found))


def _source_requirements() -> list[str]:
    import tomllib

    try:
        project = tomllib.loads((_SOURCE_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, ValueError):
        return []
    optional = project.get("optional-dependencies", {})
    lines = [f'{line}; extra == "{extra}"' for extra, group in optional.items() for line in group]
    return [*project.get("dependencies", []), *lines]


def _parsed(line: str) -> dict[str, str]:
    match = _REQUIREMENT.match(line)
    if match is None:
        raise ValueError(f"not a requirement: {line!r}")
    name, _, spec, extra = match.groups()
    return {"name": name.lower().replace("_", "-"), "spec": spec.replace(" ", ""), "extra": extra or ""}


def _text(requirement: dict[str, str]) -> str:
    return requirement["name"] + requirement["spec"]


def _belongs(requirement: dict[str, str], extra: str | None) -> bool:
    """Whether `install_line(extra)` must name a requirement itself: those of the extra, or without one the plain ones."""
    return requirement["extra"] == (extra or "")


def _origin() -> tuple[bool, str] | None:
    """(editable, path or URL) that this installation was made from; None where that is unknown or no longer there."""
    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return (True, str(_SOURCE_ROOT)) if (_SOURCE_ROOT / "pyproject.toml").is_file() else None
    if text is None:
        return None
    try:
        return _origin_of(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _origin_of(record: dict[str, Any]) -> tuple[bool, str] | None:
    url = record["url"]
    if "://" not in url:
        return None
    if "vcs_info" in record:
        vcs = record["vcs_info"]
        revision = vcs.get("requested_revision") or vcs["commit_id"]
        url = f"{vcs['vcs']}+{url}@{revision}"
    parts = urlsplit(url)
    subdirectory = record.get("subdirectory")
    if parts.scheme == "file":
        path = Path(url2pathname(parts.path))
        path = path / subdirectory if subdirectory else path
        editable = bool(record.get("dir_info", {}).get("editable"))
        return (editable, str(path)) if path.exists() else None
    return False, f"{url}#subdirectory={subdirectory}" if subdirectory else url
