"""pip commands for missing dependencies, based on the origin of this installation.

The project is not on a package index, so `pip install 'scaling-lab[slurm]'` would not work. pip records the origin of an
installation in direct_url.json (PEP 610), and the commands install from that origin again.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from scaling_lab.core.errors import UserError

NAME = "scaling-lab"
ANALYSIS_REQUIREMENTS = "requirements-analysis.txt"
"""A file in this package that lists the dependencies of analysis and planning, without those of training."""
# Modules whose package has a different name.
_PACKAGES = {"hydra": "hydra-core", "yaml": "omegaconf", "wandb_workspaces": "wandb-workspaces"}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*[\"']([^\"']+)[\"'])?")
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


def install_line(extra: str | None = None) -> str:
    """The command that installs this project again with all its dependencies and those of `extra`.

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
    """The command that installs dependencies in the versions that this project needs: `pip install 'torch>=2.6'`.

    Dependencies of analysis are installed together from their file, because if one is missing, others usually are too.
    """
    file, needed = analysis_requirements()
    if set(packages) <= set(needed):
        return f"pip install -r {shlex.quote(str(file))}"
    known = requirements()
    return "pip install " + " ".join(shlex.quote(_text(known[p]) if p in known else p) for p in packages)


def analysis_requirements() -> tuple[Path, tuple[str, ...]]:
    """The requirements file of analysis and planning, and the names of the packages in it."""
    path = Path(__file__).resolve().parents[1] / ANALYSIS_REQUIREMENTS
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return path, tuple(_parsed(line)["name"] for line in lines if line)


def missing(package: str, what: str, extra: str | None = None) -> UserError:
    """The error for a package that is not installed, with the command that installs it.

    Args:
        package: its name.
        what: what needs the package, as the subject of a sentence: "training".
        extra: the extra of this project that includes it; None for a regular dependency.
    """
    how = install_hint(package) if extra is None else install_line(extra)
    return UserError(f"{what} needs {package}, which is not installed: {how}")


def require(module: str, what: str) -> None:
    """Raise `UserError` if a dependency is not installed; `what` as in `missing`."""
    if not is_installed(module):
        raise missing(package_of(module), what)


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported; does not import it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def package_of(module: str) -> str:
    """The package that provides a module, derived from the module's top-level name."""
    top = module.partition(".")[0]
    return _PACKAGES.get(top, top.replace("_", "-"))


def absent(packages: Iterable[str]) -> list[str]:
    """The `packages` that are not installed."""
    found = []
    for name in packages:
        try:
            distribution(name)
        except PackageNotFoundError:
            found.append(name)
    return found


@cache
def requirements() -> dict[str, dict[str, str]]:
    """Package -> its `name`, version range (`spec`) and `extra` (empty for a regular dependency)."""
    try:
        lines = distribution(NAME).requires or []
    except PackageNotFoundError:  # a source tree on the path that is not installed
        lines = _source_requirements()
    found: dict[str, dict[str, str]] = {}
    for parsed in map(_parsed, lines):  # regular dependencies come before those of extras
        if parsed["name"] != NAME:
            found.setdefault(parsed["name"], parsed)
    return found


def extras() -> tuple[str, ...]:
    """Names of this project's extras."""
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
    """Whether a requirement belongs to the extra, or, without one, is a regular dependency."""
    return requirement["extra"] == (extra or "")


def _origin() -> tuple[bool, str] | None:
    """(editable, path or URL) that this project was installed from; None if unknown or no longer existing."""
    try:
        text = _direct_url()
    except PackageNotFoundError:
        return (True, str(_SOURCE_ROOT)) if (_SOURCE_ROOT / "pyproject.toml").is_file() else None
    if text is None:
        return None
    try:
        return _origin_of(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _direct_url() -> str | None:
    """The text of direct_url.json; None if there is none. A build leaves an egg-info without it in a clone, which comes first
    on the path when Python starts there, so every installation is asked."""
    texts = (found.read_text("direct_url.json") for found in (distribution(NAME), *distributions(name=NAME)))
    return next((text for text in texts if text), None)


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
