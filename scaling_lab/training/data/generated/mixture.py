"""The `mixture` source on a device, if all of its parts can be generated there."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from scaling_lab.core.sources.generation.counter_random import stream_key
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.training.data import generated
from scaling_lab.training.data.generated.counter_random import draw_u32


class MixtureOnDevice:
    """Each document is drawn from one of the parts, which generates it."""

    kind: ClassVar[str] = "mixture"

    def __init__(self, source: Mixture, device: torch.device) -> None:
        self._source = source
        self._parts = [generated.classes()[part.kind](part, device) for part in source.sources]
        self._bounds = torch.from_numpy(source.cumulative_shares().astype(np.int64)).to(device)

    @staticmethod
    def can_make(source: Any) -> bool:
        return all(generated.can_make(part) for part in source.sources)

    def documents(self, split: str, indices: Tensor, length: int) -> Tensor:
        source = self._source
        out = torch.full(
            (len(indices), length), source.vocab_size - 1, dtype=torch.int32, device=indices.device
        )
        draws = draw_u32(stream_key("mixture", source.seed, split), indices)
        chosen = torch.searchsorted(self._bounds, draws, right=True)
        for i, part in enumerate(self._parts):
            here = (chosen == i).nonzero().view(-1)
            if len(here):
                out[here, 1:] = part.documents(split, indices[here], length)[:, 1:]
        return out
