"""Read the files of conf/ without Hydra: where they are, the choices of each group, values and comments.

This is enough for help and error messages; `compose` composes configs. The comment at the end of a YAML line is the
meaning of its option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scaling_lab.core.errors import UserError, unknown

COMMENTED = re.compile(
    r"^(?P<indent> *)(?P<key>[A-Za-z_][\w-]*):(?P<value>[^#]*)(?:#\s*(?P<comment>.*\S))?\s*$"
)


@cache
def builtin_folder() -> Path:
    """conf/ of the checkout or of the installed wheel."""
    from importlib.resources import files

    try:
        return Path(str(files("scaling_lab.conf")))
    except ModuleNotFoundError:  # a source tree on the path that is not installed
        return Path(__file__).resolve().parents[3] / "conf"


def config_folders(config_dir: str | None) -> list[Path]:
    """Folders to search for configs, the user's own first. Raises `UserError` if that does not exist."""
    if config_dir is None:
        return [builtin_folder()]
    own = Path(config_dir).expanduser().absolute()
    if not own.is_dir():
        raise UserError(f"config_dir={config_dir!r}: there is no such folder.")
    return [own, builtin_folder()]


def group_choices(group: str, folders: Sequence[Path]) -> list[str]:
    """Valid values of `group=NAME`."""
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def find_config(name: str, folders: Sequence[Path]) -> Path:
    """The file of the config `name` (`sweep`, `model/gpt`). Raises `UserError` with the group's choices."""
    for folder in folders:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    group, _, choice = name.rpartition("/")
    raise unknown(group or "config", choice, group_choices(group, folders))


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file as plain values. Raises `UserError` with the position of an error."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path} must contain options as `key: value` lines.")
    return data


def line_comments(path: Path) -> dict[str, str]:
    """Dotted key -> the comment at the end of its line."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = COMMENTED.match(line)
        if not match:
            continue
        indent = len(match["indent"])
        above = [(i, key) for i, key in above if i < indent]
        key = ".".join([*(key for _, key in above), match["key"]])
        above.append((indent, match["key"]))
        if match["comment"]:
            found[key] = match["comment"]
    return found


def default_groups(command: str, folders: Sequence[Path]) -> dict[ConfigGroup, str | None]:
    """Default choice of each group, from the defaults lists of the command's config; without launchers and the like."""
    groups: dict[ConfigGroup, str | None] = {}
    for entry in read_yaml(find_config(command, folders)).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            groups.update(default_groups(entry, folders))
        elif isinstance(entry, Mapping):
            for key, choice in entry.items():
                # With a list of choices (approach: [envelope, ...]) all are always active: nothing to choose.
                if not str(key).startswith("override ") and not isinstance(choice, list):
                    group = ConfigGroup(str(key).removeprefix("optional ").strip().strip("/"))
                    groups[group] = choice
    return groups


def plain_tree(
    command: str, chosen: Mapping[str, str], folders: Sequence[Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, meanings) of a command with the groups `chosen`, for help: without experiment and interpolation."""
    tree: dict[str, Any] = {}
    meanings: dict[str, str] = {}
    path = find_config(command, folders)
    data = read_yaml(path)
    for entry in data.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            below, below_meanings = plain_tree(entry, chosen, folders)
            tree |= below
            meanings |= below_meanings
        elif isinstance(entry, Mapping):
            for name, default in entry.items():
                group = ConfigGroup(str(name).removeprefix("optional ").strip().strip("/"))
                choice = chosen.get(group.package, default)
                if choice is None or group.name == "experiment" or str(name).startswith("override "):
                    continue
                for member in choice if isinstance(choice, list) else [choice]:
                    _add_member(tree, meanings, group, find_config(f"{group.name}/{member}", folders))
    for key, value in data.items():
        if key not in ("defaults", "hydra"):
            merge(tree, {key: value})
    meanings |= line_comments(path)
    return tree, meanings


def _add_member(tree: dict[str, Any], meanings: dict[str, str], group: ConfigGroup, path: Path) -> None:
    merge(tree, nested(group.package, {k: v for k, v in read_yaml(path).items() if k != "defaults"}))
    meanings |= {f"{group.package}.{key}": text for key, text in line_comments(path).items()}


@dataclass(frozen=True)
class ConfigGroup:
    """A config group and the package where its choice is placed: `model`, or `law@approach.parametric.law`."""

    hydra_key: str
    """In Hydra's syntax, GROUP or GROUP@PACKAGE."""

    @property
    def name(self) -> str:
        return self.hydra_key.partition("@")[0]

    @property
    def package(self) -> str:
        """The package, which is also the key that the user writes: `approach.parametric.law=kaplan`."""
        return self.hydra_key.partition("@")[2] or self.name.replace("/", ".")


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """`{a: {b: value}}` for `a.b`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return dict(value)


def merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Merge `other` into `tree` recursively, as OmegaConf does."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value
