"""Discovery of a package's members (shapes, sources, recipes, designs) by scanning its modules.

To add a member, add a file; there is no central list. A member is a dataclass defined in the scanned package with a class
attribute `kind`, its short name in specs and configs.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from scaling_lab.core.errors import unknown


@cache
def members(package: str) -> dict[str, type]:
    """`kind` -> class, for every class in the modules of `package` that defines its own `kind`."""
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
    """The class of this `kind` in `package`; `what` is the option's name in the error message."""
    try:
        return members(package)[kind]
    except KeyError:
        raise unknown(what, kind, members(package)) from None
