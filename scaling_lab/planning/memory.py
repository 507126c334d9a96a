"""Owns the estimate of a run's memory before it is launched, and the micro-batch that fits. No torch.

The estimate is meant to be too large rather than too small (scripts/bench_train.py prints it beside the measured peak).
"""

from __future__ import annotations

import math
from typing import Any

from scaling_lab.core.spec import RunSpec

# Logits of one chunk of the loss, in elements: 2^25 are 128 MB in float32. A byte vocabulary reaches it at 131,072 tokens
# a micro-batch, one of 50,257 at 668 tokens.
LOGITS_AT_ONCE = 2**25
# float32 values for each parameter during a step: the parameter, two moments, the gradient, its copy as one vector, and
# the update's temporaries.
FLOATS_PER_PARAM = 7
# Values that a step holds at its peak, per token and layer, in units of the width: 62 were measured of an eager float32
# step (`gpt`, width 64, depth 4, head dimension 16; RoPE and QK-norm make it more than the 17 of Korthikanti et al. 2022,
# arXiv 2205.05198, without the attention matrix); a compiled step holds fewer.
ACTIVATIONS_PER_WIDTH = 80
# Logits, their softmax and the gradient of both, in float32.
FLOATS_PER_LOGIT = 4
# Python, torch, its kernels' workspaces and the allocator's slack.
PROCESS_BYTES = {"cpu": 400e6, "cuda": 1.5e9, "mps": 1e9}


# A corpus of up to this many tokens lies on the device whole.
RESIDENT_TOKENS = 200_000_000
# Of a larger or a generated one two chunks do: tokens of a chunk, as far as one step's batch allows ...
CHUNK_TOKENS = 1 << 22
# ... and steps that a loop does at once at most, which is the longest chunk.
BLOCK_STEPS = 64


def loss_chunks(tokens: int, vocab_size: int) -> int:
    """Parts in which a micro-batch's logits are computed: 1 where they are small. A pure function of its arguments."""
    return min(tokens, math.ceil(tokens * vocab_size / LOGITS_AT_ONCE))


def corpus_bytes(spec: RunSpec, members: int = 1) -> float:
    """Bytes of training tokens on the device of a run (or of a stack of `members`): the corpus whole, or two chunks of it
    for each member (`training/data/feed.py`). Raises what the source raises where its data are not on this machine."""
    source, generated = spec.data, hasattr(spec.data, "documents")
    # uint8, int32 or int64: the smallest that torch indexes with, of what the files hold.
    width = 1 if source.vocab_size <= 256 and not generated else 4 if source.vocab_size <= 65_536 else 8
    used = source.n_tokens("train") if spec.unique_tokens is None else spec.unique_tokens + 1
    if not generated and used <= RESIDENT_TOKENS:
        return float(width * used)
    steps = max(1, min(BLOCK_STEPS, CHUNK_TOKENS // (spec.batch_tokens * members)))
    windows = 2 * members * steps * spec.batch_sequences
    return float(width * windows * (spec.shape.context + 1))


def state_bytes(shape: Any, members: int = 1) -> float:
    """Bytes of parameters, moments, gradient and temporaries."""
    return 4.0 * FLOATS_PER_PARAM * shape.count().params.total * members


def activation_bytes(shape: Any, tokens: int, dtype: str = "float32", members: int = 1) -> float:
    """Bytes of activations and logits of a micro-batch of `tokens` tokens a member."""
    size = 2 if dtype == "bfloat16" else 4
    hidden = ACTIVATIONS_PER_WIDTH * shape.width * (shape.depth + 1) * size
    logits = FLOATS_PER_LOGIT * 4.0 * shape.vocab_size / loss_chunks(tokens, shape.vocab_size)
    return float(tokens * members * (hidden + logits))


def estimate_bytes(
    spec: RunSpec, device: str, micro_sequences: int, corpus_bytes: float, members: int = 1
) -> float:
    """Peak bytes of a run (or of a stack of `members`) on its device, the corpus on it included."""
    tokens = micro_sequences * spec.shape.context
    return (
        PROCESS_BYTES[device]
        + corpus_bytes
        + state_bytes(spec.shape, members)
        + activation_bytes(spec.shape, tokens, spec.dtype, members)
    )


def micro_batch(
    spec: RunSpec, device: str, limit_bytes: float, corpus_bytes: float, members: int = 1
) -> int | None:
    """The largest equal parts of the batch, in sequences, that fit into `limit_bytes`; None: the whole batch fits.

    Where not even single sequences fit, single sequences: the estimate may be wrong, and the run will say so.
    """
    if estimate_bytes(spec, device, spec.batch_sequences, corpus_bytes, members) <= limit_bytes:
        return None
    fitting = [
        size
        for size in divisors(spec.batch_sequences)
        if estimate_bytes(spec, device, size, corpus_bytes, members) <= limit_bytes
    ]
    return max(fitting, default=1)


def halved(batch_sequences: int, micro_sequences: int | None) -> int | None:
    """The next smaller micro-batch after one that did not fit: at most half of it; None where there is none."""
    now = micro_sequences or batch_sequences
    return max((size for size in divisors(batch_sequences) if size <= now // 2), default=None)


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]
