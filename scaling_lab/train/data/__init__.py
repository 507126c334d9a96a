"""Readers of the token sources: one file each, found by the source's short name."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.registry import member


def read_tokens(source: Any, split: str) -> NDArray[np.integer]:
    """The split's token ids, 1-d; `split` is train or validation."""
    tokens: NDArray[np.integer] = member("scaling_lab.train.data", "data", source.kind)(source).read(split)
    return tokens
