"""The `context_tree` source on a device."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scaling_lab.core.sources.context_tree import ContextTree, language_tables
from scaling_lab.core.sources.generation.counter_random import stream_key
from scaling_lab.training.data.generated.counter_random import draw_u32


class ContextTreeOnDevice:
    """All documents of a chunk are generated together, one token at a time."""

    kind: ClassVar[str] = "context_tree"

    def __init__(self, source: ContextTree, device: torch.device) -> None:
        tables = language_tables(source)
        self._source, self._first = source, tables.first_state
        self._leaf = torch.from_numpy(tables.leaf.astype(np.int64)).to(device)
        # The bounds of row r start at r * 2^32: one sorted list in which leaf and draw together determine the place.
        rows = np.arange(len(tables.bounds), dtype=np.int64)[:, None] << 32
        self._bounds = torch.from_numpy((tables.bounds.astype(np.int64) + rows).reshape(-1)).to(device)

    @staticmethod
    def can_make(source: Any) -> bool:
        return True

    def documents(self, split: str, indices: Tensor, length: int) -> Tensor:
        source = self._source
        key = stream_key("context_tree documents", source.seed, split)
        out = torch.full((len(indices), length), source.symbols, dtype=torch.int32, device=indices.device)
        state = torch.full_like(indices, self._first)
        for t in range(1, length):
            leaf = self._leaf[state]
            u = draw_u32(key, indices, t)
            symbol = torch.searchsorted(self._bounds, (leaf << 32) + u, right=True) - leaf * source.symbols
            out[:, t] = symbol
            state = (state * source.vocab_size + symbol) % self._leaf.numel()
        return out
