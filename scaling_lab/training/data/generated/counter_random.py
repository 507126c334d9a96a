"""`core/sources/generation/counter_random.py` in torch: the same 64-bit numbers, bit for bit, on any device.

torch has no arithmetic on unsigned 64-bit integers. Signed ones give the same bits under +, * (both wrap) and ^; after a
right shift the copies of the sign bit are masked off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scaling_lab.core.sources.generation.counter_random import GOLDEN, MIX_1, MIX_2, stream_key

LOW_32 = 0xFFFFFFFF


def signed(x: int) -> int:
    """The signed 64-bit integer with the same bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def shift_right(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """`mix` of the NumPy module, on int64."""
    x = (x ^ shift_right(x, 30)) * signed(MIX_1)
    x = (x ^ shift_right(x, 27)) * signed(MIX_2)
    return x ^ shift_right(x, 31)


def draw_u64(key: int, *counters: Tensor | int) -> Tensor:
    """Uniform 64-bit integers at `counters` (int64, broadcast together) of the stream `key`, as int64 with the same bits.

    A counter may be a plain number, which does not have to be copied to the device; the first one must be a tensor."""
    x: Tensor | int = signed(key)
    for counter in counters:
        if isinstance(counter, Tensor):
            x = mix(counter * signed(GOLDEN) + signed(GOLDEN) + x)
        else:
            assert isinstance(x, Tensor)
            x = mix(x + signed((counter + 1) * GOLDEN % 2**64))
    assert isinstance(x, Tensor)
    return x


def draw_u32(key: int, *counters: Tensor | int) -> Tensor:
    """The upper half of `draw_u64`, (...) int64 in 0 .. 2^32 - 1."""
    return shift_right(draw_u64(key, *counters), 32)


def add_noise(tokens: Tensor, places: Tensor, share: float, vocab_size: int) -> Tensor:
    """`add_noise` of `training/data/feed.py` on a device: a share of the tokens is replaced by uniform ones."""
    draw = draw_u64(stream_key("noise"), places)
    # An integer is below a number iff it is below its ceiling. This avoids float64, which not every device has.
    chosen = shift_right(draw, 32) < math.ceil(share * 2.0**32)
    return torch.where(chosen, ((draw & LOW_32) % vocab_size).to(tokens.dtype), tokens)
