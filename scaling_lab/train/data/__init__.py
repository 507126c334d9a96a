"""Reading token sources for training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_tokens(source: Any, split: str) -> NDArray[np.integer]:
    """The split's token ids, 1-d; `split` is train or validation."""
    tokens: NDArray[np.integer] = source.tokens(split)
    return tokens
