"""Token sources, without torch: vocabulary, tokens or documents, fingerprint. One source per file, found by scanning.

`parse_source` reads a source from a config, for options that hold lists of sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaling_lab.core.errors import UserError
from scaling_lab.core.registry import member
from scaling_lab.core.storage.serialization import build


def parse_source(option: str, value: Any) -> Any:
    """A source from its name or from `{kind: NAME, option: value, ...}`; other values are returned unchanged.

    Raises `UserError` naming `option` for an unknown kind or invalid options.
    """
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        return value
    options = dict(value)
    if "kind" not in options:
        raise UserError(f"{option}: {options!r} has no kind. Expected NAME or {{kind: NAME, option: value}}.")
    cls = member(__name__, option, str(options["kind"]))
    try:
        return build(cls, options)
    except UserError as error:
        # A source names its options as data.X; here they are inside a list.
        raise UserError(str(error).replace("data.", f"{option}: ", 1)) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{option}: {error}.") from None
