"""The command that plans a sweep again with other options, from the options that its plan.json records."""

from __future__ import annotations

import shlex
from pathlib import Path

from scaling_lab.core.spec import Plan

# Key of a plan's settings: the options that the user gave, as text.
OPTIONS = "options"


def plan_command(plan: Plan, folder: Path, **changes: str) -> str:
    """`scaling-lab plan ...` with the options of `plan` and `changes`.

    Args:
        folder: the sweep's folder, whose parent is `results_dir`.
        changes: options that replace the plan's, `sweep` among them.
    """
    options = {"sweep": plan.sweep, **plan.settings.get(OPTIONS, {})}
    if str(folder.parent) != "results":
        options["results_dir"] = str(folder.parent)
    words = [shlex.quote(f"{key}={value}") for key, value in {**options, **changes}.items()]
    return " ".join(["scaling-lab plan", *words])
