"""Owns discovery: the members of a package of small frozen dataclasses, found by scanning its modules.

Adding a member is adding a file; there is no central list to edit. A member is a dataclass defined in the scanned
package with a class attribute `kind`, its short name in specs and configs.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from scaling_lab.core.errors import unknown


@cache
def members(package: str) -> dict[str, type]:
    """`kind` -> class, for every class with a `kind` of its own defined in the modules of `package`."""
    found: dict[str, type] = {}
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and "kind" in vars(value):
                kind = vars(value)["kind"]
                if kind in found:
                    raise RuntimeError(f"two classes in {package} have the kind {kind!r}")
                found[kind] = value
    return found


def member(package: str, what: str, kind: str) -> Any:
    """The class named `kind` in `package`; `what` names the option in the error."""
    try:
        return members(package)[kind]
    except KeyError:
        raise unknown(what, kind, members(package)) from None
