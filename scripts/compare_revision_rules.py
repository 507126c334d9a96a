"""Exact comparison of JSON values and files: what counts as a difference, and what is only listed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


class Failed(Exception):
    """Something that could not be run or compared. It is never reported as equal."""


@dataclass(frozen=True)
class Rules:
    """Keys that are not compared, and keys whose text may be reworded."""

    exempt: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()


EXACT = Rules()
# Everything else is compared: spec.json, prepared corpora and published tables byte for byte, and so is plan.json but for its
# sentences.
RULES = {
    "plan.json": Rules((), ("notes", "rounding")),
    # The table's path, versions of the package and its dependencies, and of the format: its keys are compared instead.
    "analysis.json": Rules(
        ("source", "versions", "schema_version"), ("message", "messages", "warnings", "diagnostics", "reason")
    ),
    # A row's quantity is its label here.
    "reproduce": Rules(("versions",), ("title", "reference", "data", "remark", "quantity")),
    # Times, hosts and revisions; curve_bytes depends on the digits of times. sha256: the tensors are compared instead.
    "runs": Rules(
        ("wall_time_s", "curve_bytes", "sha256", "environment.host", "environment.git_revision", "environment.scaling_lab"),
        ("reason", "notes", "rounding"),
    ),
}  # fmt: skip


@dataclass
class Comparison:
    """Number of compared values, and what was found."""

    values: int = 0
    differences: list[tuple[str, Any, Any]] = field(default_factory=list)  # (path, old, new)
    added: Counter[str] = field(default_factory=Counter)  # keys of the new side only
    reworded: Counter[str] = field(default_factory=Counter)

    def merge(self, other: Comparison, label: str = "") -> None:
        self.values += other.values
        self.differences += [(label + path, old, new) for path, old, new in other.differences]
        self.added += other.added
        self.reworded += other.reworded


def compare(old: Any, new: Any, rules: Rules, path: str = "") -> Comparison:
    """Compare JSON values, or bytes, exactly. A key that only the new side has is not a difference."""
    found = Comparison()
    if ends_with(path, rules.exempt):
        return found
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            below = f"{path}.{key}" if path else str(key)
            if key in old and key in new:
                # Of sentences by name (`messages`), each value is one.
                named = replace(rules, sentences=(str(key),)) if ends_with(path, rules.sentences) else rules
                found.merge(compare(old[key], new[key], named, below))
            elif key in new:
                found.added[without_indices(below)] += 1
            elif not ends_with(below, rules.exempt):
                found.differences.append((below, old[key], "(no such key)"))
    elif ends_with(path, rules.sentences) and old and new and type(old) is type(new):
        found.values = 1
        found.reworded[without_indices(path)] += old != new
    elif isinstance(old, list) and isinstance(new, list):
        for k, (a, b) in enumerate(zip(old, new, strict=False)):
            found.merge(compare(a, b, rules, f"{path}[{k}]"))
        if len(old) != len(new):
            found.differences.append((path, f"{len(old)} items", f"{len(new)} items"))
    else:
        found.values = 1
        if isinstance(old, bytes) or isinstance(new, bytes):
            found.differences += differences_of_bytes(old, new)
        elif json.dumps(old) != json.dumps(new):  # 0.0 and -0.0, or 1 and true, are not the same
            found.differences.append((path, old, new))
    return found


def differences_of_bytes(old: bytes, new: bytes) -> list[tuple[str, Any, Any]]:
    """Where two files differ: by value if they are JSON."""
    if old == new:
        return []
    with contextlib.suppress(ValueError, UnicodeDecodeError):
        if named := compare(json.loads(old), json.loads(new), EXACT).differences:
            return named
    return [("(bytes)", hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest())]


def ends_with(path: str, keys: Iterable[str]) -> bool:
    """Whether a path is or ends in one of these keys, list indices aside."""
    plain = re.sub(r"\[\d+\]", "", path)
    return any(plain == key or plain.endswith(f".{key}") for key in keys)


def without_indices(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def compare_documents(old: Mapping[str, Any], new: Mapping[str, Any], rules: Rules) -> Comparison:
    """Compare documents by name. One that only the new side has is listed as an added key is, by the end of its path.

    Raises `Failed` where there is nothing to compare.
    """
    total = Comparison()
    for name in old:
        if name in new:
            total.merge(compare(old[name], new[name], rules), f"{name}: ")
        else:
            total.differences.append((name, "there", "missing"))
    total.added.update(name.rpartition("/")[2] for name in new if name not in old)
    if not total.values:
        raise Failed("there is nothing to compare")
    return total
