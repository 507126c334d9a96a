"""The `zipf_facts` source on a device."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scaling_lab.core.sources.generation.counter_random import stream_key
from scaling_lab.core.sources.zipf_facts import ZipfFacts, fact_tables
from scaling_lab.training.data.generated.counter_random import draw_u32


class ZipfFactsOnDevice:
    """Each draw gives a fact's rank, whose statement is looked up in a table."""

    kind: ClassVar[str] = "zipf_facts"

    def __init__(self, source: ZipfFacts, device: torch.device) -> None:
        tables = fact_tables(source)
        self._source = source
        self._bounds = torch.from_numpy(tables.bounds.astype(np.int64)).to(device)
        self._spelled = torch.from_numpy(tables.spelled).to(device)

    @staticmethod
    def can_make(source: Any) -> bool:
        return True

    def documents(self, split: str, indices: Tensor, length: int) -> Tensor:
        source, size = self._source, self._source.statement_tokens
        statements = -(-(length - 1) // size)
        key = stream_key("zipf_facts documents", source.seed, split)
        u = draw_u32(key, indices[:, None], torch.arange(statements, device=indices.device))
        text = self._spelled[torch.searchsorted(self._bounds, u, right=True)]
        full_stop = torch.full(
            (len(indices), 1), source.symbols + 1, dtype=torch.int32, device=indices.device
        )
        return torch.cat([full_stop, text.view(len(indices), -1)], dim=1)[:, :length].contiguous()
