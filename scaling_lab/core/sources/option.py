"""Owns reading a token source from what a config says: its name, or its kind with options. For lists of sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.core.registry import member
from scaling_lab.core.storage.serialization import build


def source_of(option: str, value: Any) -> Any:
    """A source from its name, from `{kind: NAME, option: value, ...}`, or itself. `option` names the key in errors."""
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        return value
    options = dict(value)
    if "kind" not in options:
        raise UserError(f"{option}: {options!r} has no kind. Wanted: NAME, or {{kind: NAME, option: value}}.")
    cls = member("scaling_lab.core.sources", option, str(options["kind"]))
    try:
        return build(cls, options)
    except UserError as error:
        # A source names its options as data.X; here they stand inside a list.
        raise UserError(str(error).replace("data.", f"{option}: ", 1)) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{option}: {error}.") from None
