"""Owns reading the `pysource` corpus as tokens: one byte, one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.sources.pysource import PySource


@dataclass(frozen=True)
class PySourceReader:
    kind: ClassVar[str] = "pysource"

    source: PySource

    def read(self, split: str) -> NDArray[np.uint8]:
        """The split's bytes, (n,) uint8."""
        return np.frombuffer(self.source.text(split), dtype=np.uint8)
