"""Owns reading token sources for training, and generated ones on the device: `device_documents` finds what a source has there.

One file a kind. It is an optional fast way: the tokens are those of `core/sources`, one for one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_lab.core.registry import members


def read_tokens(source: Any, split: str) -> NDArray[np.integer]:
    """The split's token ids, 1-d; `split` is train or validation."""
    tokens: NDArray[np.integer] = source.tokens(split)
    return tokens


class DeviceDocuments(Protocol):
    """A generated source's documents, made on a device. Built from (source, device)."""

    kind: ClassVar[str]

    @staticmethod
    def can_make(source: Any) -> bool:
        """Whether this very source can be generated there."""
        ...

    def documents(self, split: str, indices: Tensor, length: int) -> Tensor:
        """Documents `indices` (n,) int64 of a split, (n, length) int32 on the device: what the source's own say."""
        ...


def device_documents(source: Any, device: torch.device) -> DeviceDocuments | None:
    """The source on a device; None where it is made on the host alone."""
    cls: Any = members(f"{__name__}.generated").get(source.kind)
    if cls is None or not cls.can_make(source):
        return None
    made: DeviceDocuments = cls(source, device)
    return made
