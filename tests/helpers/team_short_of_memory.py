"""A worker whose second process has memory for one sequence at a time; tests/test_distributed.py starts it with torchrun.

A GPU that runs out of memory raises the same error, in a forward pass in which the other process waits.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from scaling_lab.launching.worker import main
from scaling_lab.training.engine.gradient import ModelWithLoss

forward: Any = ModelWithLoss.forward


def short_of_memory(self: ModelWithLoss, tokens: Any, *more: Any) -> Any:
    if more and len(tokens) > 1 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, tokens, *more)


if __name__ == "__main__":
    ModelWithLoss.forward = short_of_memory  # type: ignore[method-assign]
    sys.exit(main())
