"""Small runs over generated corpora, and the windows of tokens that a feed gives them."""

from __future__ import annotations

import numpy as np
import torch

from helpers.specs import tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.core.sources.zipf_facts import ZipfFacts
from scaling_lab.core.spec import RunSpec
from scaling_lab.training.data.feed import Feed

CPU = torch.device("cpu")
CONTEXT, BATCH, CHUNK_STEPS = 16, 4, 3
STEPS = 20  # no multiple of the chunk
SHAPE = GPTShape(width=8, depth=1, heads=1, context=CONTEXT, vocab_size=300)
GENERATED = {
    "context_tree": ContextTree(symbols=6, order=2),
    "zipf_facts": ZipfFacts(facts=40, symbols=6),
    "mixture": Mixture((ContextTree(symbols=6, order=2), ZipfFacts(facts=40, symbols=6)), (2.0, 1.0)),
}


def spec_of(data, steps: int = STEPS, **changes) -> RunSpec:
    batch = BATCH * CONTEXT
    return tiny(
        steps,
        **{"data": data, "shape": SHAPE, "batch_tokens": batch, "train_tokens": batch * steps, **changes},
    )


def gathered(feed: Feed, slot: int, first: int, steps: int) -> np.ndarray:
    """What the step sees: (steps, batch, context + 1)."""
    places = feed.starts(slot, first, steps)[..., None] + torch.arange(CONTEXT + 1)
    return feed.tokens[places].long().numpy()


def all_windows(feed: Feed, slot: int, steps: int) -> np.ndarray:
    """(steps * batch, context + 1), requested in uneven blocks as by the training loop."""
    out, first = [], 0
    for block in [1, 2, 3, 1, 3, 3] * steps:
        block = min(block, steps - first, feed.max_block_steps)
        out.append(gathered(feed, slot, first, block))
        first += block
        if first == steps:
            return np.concatenate(out).reshape(-1, CONTEXT + 1)
    raise AssertionError
