"""`scale=`: a second config file of an experiment, `experiment_scale/NAME_SCALE.yaml`, which comes after the experiment and
before the user's options.

The command chooses the file before anything is composed, and plan.json records the scale: it is decided once for a sweep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from scaling_lab.cli.options.arguments import Arguments
from scaling_lab.cli.options.configs import config_folders, find_config, group_choices, read_yaml
from scaling_lab.cli.options.machine import resolve_device
from scaling_lab.cli.options.values import read_value, unquoted
from scaling_lab.core.errors import UserError, unknown
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.devices import AUTO

Scale = Literal["auto", "smoke", "cpu", "gpu", "gpu_day"]
SCALES = ("smoke", "cpu", "gpu", "gpu_day")
GROUP = "experiment_scale"


def choose_scale(arguments: Arguments, experiment: str | None = None) -> str | None:
    """The scale to compose: the one given, else that of the sweep's plan on disk, else by the device; None: no file.

    Args:
        experiment: the command's own experiment (`quickstart`).

    Raises:
        UserError: `scale=` names a scale that the experiment does not have.
    """
    given: Scale = read_value("scale", arguments.get("scale") or AUTO, Scale)
    name = _given(arguments, "experiment") or experiment or "null"
    if name == "null" or "," in name:
        if given != AUTO:
            raise UserError(f"scale={given} is the scale of an experiment: give one experiment=NAME.")
        return None
    folders = config_folders(_given(arguments, "config_dir"))
    find_config(f"experiment/{name}", folders)
    there = scales_of(name, folders)
    if given != AUTO:
        if given not in there:
            raise _no_such_scale(name, given, folders)
        return given
    plan_path = _plan_path(arguments, name, folders)
    if plan_path is not None and plan_path.exists():
        recorded = _recorded(plan_path)
        return recorded if recorded in there else None
    device = resolve_device(_given(arguments, "device") or AUTO, _given(arguments, "gpu"))
    chosen = "gpu" if device == "cuda" else "cpu"
    return chosen if chosen in there else None


def scales_of(experiment: str, folders: Sequence[Path]) -> list[str]:
    """The scales of an experiment, smallest first: files beside it, or in a folder that is searched before its own, so that
    a user's experiment does not take the scales of a built-in one of the same name."""
    own = next(k for k, folder in enumerate(folders) if (folder / f"experiment/{experiment}.yaml").is_file())
    files = set(group_choices(GROUP, folders[: own + 1]))
    return [scale for scale in SCALES if f"{experiment}_{scale}" in files]


def scale_config(experiment: str, scale: str) -> str:
    """The choice of the config group `experiment_scale`."""
    return f"{experiment}_{scale}"


def _no_such_scale(name: str, scale: str, folders: Sequence[Path]) -> UserError:
    if there := scales_of(name, folders):
        return unknown(f"experiment={name} scale", scale, there)
    others = [n for n in group_choices("experiment", folders) if scales_of(n, folders)]
    return UserError(
        f"scale={scale}: experiment={name} has no scales ({GROUP}/{name}_{scale}.yaml does not exist): leave scale= out. "
        f"Experiments with scales: {', '.join(others)}."
    )


def _given(arguments: Arguments, key: str) -> str | None:
    text = arguments.get(key)
    return None if text is None else unquoted(text)


def _plan_path(arguments: Arguments, experiment: str, folders: Sequence[Path]) -> Path | None:
    """plan.json of the sweep that the command is about; None if its name is not valid, which is reported later."""
    own = read_yaml(find_config(f"experiment/{experiment}", folders)).get("sweep")
    try:
        name = _given(arguments, "sweep") or str(own or experiment)
        return RunStore.for_sweep(_given(arguments, "results_dir") or "results", name).plan_path
    except UserError:
        return None


def _recorded(plan_path: Path) -> Any:
    """The scale in a plan.json; None if it has none or cannot be read, which is reported later."""
    try:
        settings = json.loads(plan_path.read_text(encoding="utf-8"))["settings"]
        return settings.get("combinations", [settings])[0].get("scale")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
