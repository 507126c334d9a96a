"""Owns reading a user's token file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.sources.tokens import TokenFile


@dataclass(frozen=True)
class TokenFileReader:
    kind: ClassVar[str] = "tokens"

    source: TokenFile

    def read(self, split: str) -> NDArray[np.integer]:
        """The split's token ids, (n,), in the file's own dtype, memory-mapped."""
        return self.source.array(split)
