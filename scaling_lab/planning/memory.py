"""Estimates of a run's memory before launch, and the micro-batch that fits. Does not import torch.

The estimates are intended as upper bounds; tests/test_plan_execution.py compares them with a measured peak.
"""

from __future__ import annotations

import math
from typing import Any

from scaling_lab.core.errors import MissingCorpus
from scaling_lab.core.spec import RunSpec

# Logits in one chunk of the loss: 2^25 take 128 MB in float32. With a byte vocabulary that is 131,072 tokens per
# micro-batch, with a vocabulary of 50,257 it is 668 tokens.
LOGITS_AT_ONCE = 2**25
# On CUDA a chunk has at least this many tokens: matrix products of a few hundred rows do not fill a GPU.
MIN_CHUNK_TOKENS = 4096
# float32 values per parameter during a step: the parameter, two moments, the gradient, its flattened copy, and the
# temporaries of the update.
FLOATS_PER_PARAM = 7
# Peak number of activations per token and layer, in units of the width: 62 were measured in an eager float32 step (`gpt`,
# width 64, depth 4, head dimension 16; RoPE and QK-norm need more than the 17 of Korthikanti et al. 2022, arXiv 2205.05198,
# without the attention matrix); a compiled step needs fewer.
ACTIVATIONS_PER_WIDTH = 80
# Logits, their softmax and the gradients of both, in float32.
FLOATS_PER_LOGIT = 4
# Python, torch, kernel workspaces and allocator overhead.
PROCESS_BYTES = {"cpu": 400e6, "cuda": 1.5e9, "mps": 1e9}


# A corpus of up to this many tokens is kept on the device.
RESIDENT_TOKENS = 200_000_000
# Of a larger or a generated corpus the device holds two chunks. Tokens per chunk, unless one step's batch is larger.
CHUNK_TOKENS = 1 << 22
# Maximum number of steps that the training loop does at once, and so the maximum length of a chunk.
BLOCK_STEPS = 64


def loss_chunks(tokens: int, vocab_size: int, device: str = "cpu") -> int:
    """Number of chunks in which a micro-batch's logits are computed: 1 if they are small."""
    logits = max(LOGITS_AT_ONCE, MIN_CHUNK_TOKENS * vocab_size) if device == "cuda" else LOGITS_AT_ONCE
    return min(tokens, math.ceil(tokens * vocab_size / logits))


def corpus_bytes(spec: RunSpec, members: int = 1) -> float:
    """Bytes of training tokens on the device for a run (or a stack of `members`): the whole corpus, or two chunks of it per
    member (`training/data/feed.py`). If the data are not on this machine, at most what is kept whole."""
    source, generated = spec.data, hasattr(spec.data, "documents")
    # uint8, int32 or int64: the smallest type that holds the tokens and that torch can index with.
    try:
        vocab_size, used = source.vocab_size, source.n_tokens("train")
    except MissingCorpus:
        vocab_size, used = spec.shape.vocab_size, RESIDENT_TOKENS
    width = 1 if vocab_size <= 256 and not generated else 4 if vocab_size <= 65_536 else 8
    used = used if spec.unique_tokens is None else spec.unique_tokens + 1
    if not generated and used <= RESIDENT_TOKENS:
        return float(width * used)
    steps = max(1, min(BLOCK_STEPS, CHUNK_TOKENS // (spec.batch_tokens * members)))
    windows = 2 * members * steps * spec.batch_sequences
    return float(width * windows * (spec.shape.context + 1))


def state_bytes(shape: Any, members: int = 1) -> float:
    """Bytes of parameters, optimizer moments, gradients and temporaries."""
    return 4.0 * FLOATS_PER_PARAM * shape.count().params.total * members


def activation_bytes(
    shape: Any, tokens: int, dtype: str = "float32", members: int = 1, device: str = "cpu"
) -> float:
    """Bytes of activations and logits for a micro-batch of `tokens` tokens per member."""
    size = 2 if dtype == "bfloat16" else 4
    hidden = ACTIVATIONS_PER_WIDTH * shape.width * (shape.depth + 1) * size
    logits = FLOATS_PER_LOGIT * 4.0 * shape.vocab_size / loss_chunks(tokens, shape.vocab_size, device)
    return float(tokens * members * (hidden + logits))


def estimate_bytes(
    spec: RunSpec, device: str, micro_sequences: int, corpus_bytes: float, members: int = 1
) -> float:
    """Peak memory of a run (or a stack of `members`) on its device in bytes, including the corpus."""
    tokens = micro_sequences * spec.shape.context
    return (
        PROCESS_BYTES[device]
        + corpus_bytes
        + state_bytes(spec.shape, members)
        + activation_bytes(spec.shape, tokens, spec.dtype, members, device)
    )


def micro_batch(
    spec: RunSpec, device: str, limit_bytes: float, corpus_bytes: float, members: int = 1
) -> int | None:
    """The largest micro-batch in sequences, dividing the batch, that fits in `limit_bytes`; None if the whole batch fits.

    1 if not even a single sequence fits: the estimate may be wrong, and the run itself would report it.
    """
    if estimate_bytes(spec, device, spec.batch_sequences, corpus_bytes, members) <= limit_bytes:
        return None
    fitting = [
        size
        for size in divisors(spec.batch_sequences)
        if estimate_bytes(spec, device, size, corpus_bytes, members) <= limit_bytes
    ]
    return max(fitting, default=1)


def next_smaller_micro_batch(batch_sequences: int, micro_sequences: int | None) -> int | None:
    """The micro-batch to try after one that did not fit, at most half of it; None if it cannot be smaller."""
    current = micro_sequences or batch_sequences
    return max((size for size in divisors(batch_sequences) if size <= current // 2), default=None)


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]
