"""Generated sources on the device, one file per kind, found by scanning this package.

An optional fast path: the tokens equal those of `core/sources`, one for one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from scaling_lab.core.registry import members


class DeviceDocuments(Protocol):
    """Documents of a generated source, computed on a device. Constructed from (source, device)."""

    kind: ClassVar[str]

    @staticmethod
    def can_make(source: Any) -> bool:
        """Whether this particular source can be generated on a device."""
        ...

    def documents(self, split: str, indices: Tensor, length: int) -> Tensor:
        """Documents `indices` (n,) int64 of a split, (n, length) int32 on the device; equal to the source's own."""
        ...


def device_documents(source: Any, device: torch.device) -> DeviceDocuments | None:
    """The source's generator on a device; None if the source can only be generated on the host."""
    if not can_make(source):
        return None
    generator: DeviceDocuments = classes()[source.kind](source, device)
    return generator


def can_make(source: Any) -> bool:
    """Whether `device_documents` has a generator for this source."""
    found = classes().get(source.kind)
    return found is not None and found.can_make(source)


def classes() -> dict[str, Any]:
    """Kind of source -> its `DeviceDocuments` class."""
    found: dict[str, Any] = members(__name__)
    return found
