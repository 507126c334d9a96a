"""Estimates of a run's memory before launch, and the micro-batch that fits. Does not import torch.

The estimates are upper bounds: tests/test_memory.py compares them with measured peaks, which they exceed by at most 60%.
"""

from __future__ import annotations

import math
from typing import Any

from scaling_lab.core.errors import MissingCorpus
from scaling_lab.core.parametrization import Role
from scaling_lab.core.spec import RunSpec

# Logits in one chunk of the loss: 2^25 take 128 MB in float32. With a byte vocabulary that is 131,072 tokens per
# micro-batch, with a vocabulary of 50,257 it is 668 tokens.
LOGITS_AT_ONCE = 2**25
# On CUDA a chunk has at least this many tokens: matrix products of a few hundred rows do not fill a GPU.
MIN_CHUNK_TOKENS = 4096
# float32 values per parameter that a run keeps: the parameter and two moments. Settings of the optimizer that differ between
# parameters are vectors of the same length, and so is the sum of the gradients of micro-batches.
FLOATS_KEPT = 3
# At the end of a backward pass: the gradients of all parameters, and their flat copy.
GRADIENT_FLOATS = 2
# Peak number of float32 activations per token and layer in an eager step, measured at widths 64 to 512 (results/LOG.md):
# 30 times the width for `gpt` (RoPE and QK-norm; more than the 17 of Korthikanti et al. 2022, arXiv 2205.05198, in all), 10
# for `gpt2`; and these multiples of the hidden units of the MLP. Outside the layers: 11 times the width.
ATTENTION_FLOATS = {"gpt2": 10}
OTHER_ATTENTION_FLOATS = 30
MLP_FLOATS = {"relu2": 5, "gelu": 4, "swiglu": 12}
OUTER_FLOATS = 11
# What remains of them in bfloat16 (sums and norms stay in float32; an eager step also keeps copies of the weights, half their
# size), and in a compiled step; all measured.
ACTIVATION_SHARES = {
    ("float32", False): 1.0,
    ("bfloat16", False): 0.75,
    ("float32", True): 0.45,
    ("bfloat16", True): 0.3,
}
# Logits, their log softmax and its gradient, in float32; a compiled step has half of them, unless they are in chunks.
FLOATS_PER_LOGIT = 3
FLOATS_PER_COMPILED_LOGIT = 1.5
# A forward pass of an evaluation (training/measure/evaluation.py): tokens, and activations per token in units of the width.
EVAL_BATCH_TOKENS = 8_192
EVAL_FLOATS_PER_WIDTH = 16
# The noise probe (training/measure/noise_scale.py): sequences, and up to how many numbers their gradients are taken at once.
PROBE_SEQUENCES = 64
PROBE_NUMBERS = 2**24
# What freed temporaries cost beyond their size: glibc keeps blocks below 32 MB in its heap (1.3 to 2.1 measured, and up to 70
# MB); CUDA's caching allocator rounds and fragments.
ALLOCATOR_FACTOR = {"cpu": 1.85, "cuda": 1.15, "mps": 1.15}
HEAP_BYTES = {"cpu": 70e6, "cuda": 0.0, "mps": 0.0}
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


def chunk_tokens(tokens: int, vocab_size: int, device: str = "cpu") -> int:
    """Tokens in a chunk, at most; on CUDA the same for all micro-batches, so that they can share a program."""
    if device == "cuda":
        return max(LOGITS_AT_ONCE // vocab_size, MIN_CHUNK_TOKENS)
    return math.ceil(tokens / loss_chunks(tokens, vocab_size))


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
    """Bytes of parameters, optimizer moments and settings, and gradients."""
    return 4.0 * (FLOATS_KEPT + 1 + GRADIENT_FLOATS) * shape.count().params.total * members


def setting_vectors(spec: RunSpec) -> int:
    """Number of the optimizer's settings that differ between parameters (`GroupVectors` of training/engine/optimizer.py)."""
    optimizer = spec.optimizer
    factors = {role: spec.parametrization.factors(role, spec.shape) for role in Role}
    ratios = {Role.INPUT: optimizer.embedding_lr_ratio, Role.OUTPUT: optimizer.head_lr_ratio}
    rates = {ratios.get(role, 1.0) * factor.lr for role, factor in factors.items()}
    return (len(rates) > 1) + (len({f.eps for f in factors.values()}) > 1) + (optimizer.weight_decay > 0)


def activation_bytes(
    shape: Any,
    tokens: int,
    dtype: str = "float32",
    members: int = 1,
    device: str = "cpu",
    *,
    compiled: bool = False,
) -> float:
    """Bytes of activations and logits for a micro-batch of `tokens` tokens per member."""
    precision = "bfloat16" if dtype == "bfloat16" else "float32"
    mlp = MLP_FLOATS[getattr(shape, "mlp", "gelu")] * getattr(shape, "mlp_hidden", 4 * shape.width)
    layer = ATTENTION_FLOATS.get(shape.kind, OTHER_ATTENTION_FLOATS) * shape.width + mlp
    hidden = (layer * shape.depth + OUTER_FLOATS * shape.width) * ACTIVATION_SHARES[precision, compiled]
    chunks = loss_chunks(tokens, shape.vocab_size, device)
    per_logit = FLOATS_PER_COMPILED_LOGIT if compiled and chunks == 1 else FLOATS_PER_LOGIT
    return 4.0 * tokens * members * (hidden + per_logit * shape.vocab_size / chunks)


def evaluation_bytes(spec: RunSpec) -> float:
    """Temporaries of an evaluation."""
    shape = spec.shape
    tokens = min(EVAL_BATCH_TOKENS, LOGITS_AT_ONCE // shape.vocab_size, spec.eval.tokens)
    floats = EVAL_FLOATS_PER_WIDTH * shape.width + FLOATS_PER_LOGIT * shape.vocab_size
    return 4.0 * max(tokens, shape.context) * floats


def probe_bytes(spec: RunSpec, device: str) -> float:
    """Temporaries of a measurement of the gradient noise: all its gradients, or their sum and one after the other."""
    params = spec.shape.count().params.total
    at_once = PROBE_SEQUENCES if PROBE_SEQUENCES * params <= PROBE_NUMBERS else 1
    activations = activation_bytes(spec.shape, spec.shape.context, spec.dtype, at_once, device)
    return 4.0 * GRADIENT_FLOATS * params * at_once + activations + (4.0 * params if at_once == 1 else 0.0)


def estimate_bytes(
    spec: RunSpec,
    device: str,
    micro_sequences: int,
    corpus_bytes: float,
    members: int = 1,
    *,
    compiled: bool = False,
) -> float:
    """Peak memory of a run (or a stack of `members`) on its device in bytes, including the corpus."""
    params = 4.0 * spec.shape.count().params.total
    accumulates = micro_sequences < spec.batch_sequences
    kept = (FLOATS_KEPT + setting_vectors(spec) + accumulates) * params * members
    activations = activation_bytes(
        spec.shape, micro_sequences * spec.shape.context, spec.dtype, members, device, compiled=compiled
    )
    weight_copies = params * members / 2 if spec.dtype == "bfloat16" and not compiled else 0.0
    temporary = max(
        activations + weight_copies + params * members,  # gradients appear while activations go
        GRADIENT_FLOATS * params * members,
        evaluation_bytes(spec),
        probe_bytes(spec, device),
    )
    return (
        PROCESS_BYTES[device]
        + HEAP_BYTES[device]
        + corpus_bytes
        + kept
        + ALLOCATOR_FACTOR[device] * temporary
    )


def micro_batch(
    spec: RunSpec,
    device: str,
    limit_bytes: float,
    corpus_bytes: float,
    members: int = 1,
    *,
    compiled: bool = False,
) -> int | None:
    """The largest micro-batch in sequences, dividing the batch, that fits in `limit_bytes`; None if the whole batch fits.

    1 if not even a single sequence fits: the estimate may be wrong, and the run itself would report it.
    """

    def fits(size: int) -> bool:
        needed = estimate_bytes(spec, device, size, corpus_bytes, members, compiled=compiled)
        return needed <= limit_bytes

    if fits(spec.batch_sequences):
        return None
    fitting = [size for size in divisors(spec.batch_sequences) if fits(size)]
    return max(fitting, default=1)


def next_smaller_micro_batch(batch_sequences: int, micro_sequences: int | None) -> int | None:
    """The micro-batch to try after one that did not fit, at most half of it; None if it cannot be smaller."""
    current = micro_sequences or batch_sequences
    return max((size for size in divisors(batch_sequences) if size <= current // 2), default=None)


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]
