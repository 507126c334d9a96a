"""How training tokens reach the device: the windows at a run's positions, as a pure function of the spec.

A small corpus is kept on the device as a whole, and the step gathers from it. A large or generated corpus is read in
chunks: a thread prepares the next chunk while the device computes, and the host never holds more than two. A GPU generates
the chunks of a generated corpus itself where it can (training/data/generated). The tokens are the same in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.generation.counter_random import draw_u64, stream_key
from scaling_lab.core.spec import RunSpec
from scaling_lab.planning.memory import BLOCK_STEPS, CHUNK_TOKENS, RESIDENT_TOKENS
from scaling_lab.training.data.generated import DeviceDocuments, device_documents
from scaling_lab.training.data.generated import counter_random as on_device
from scaling_lab.training.data.order import WindowOrder, n_windows

# Devices that generate documents themselves. On a CPU the thread that reads ahead is faster.
GENERATING_DEVICES = ("cuda",)
Windows = NDArray[np.integer]


class Feed(Protocol):
    """The training windows of a run, or of each slot of a stack, on the device."""

    tokens: Tensor
    """The 1-d tensor that the step gathers from; its size never changes."""
    max_block_steps: int
    """Maximum number of steps per call of `starts`."""
    is_whole: bool
    """Whether `tokens` is the whole corpus and never changes."""

    def order(self, slot: int) -> WindowOrder:
        """Maps positions of the run to windows of the corpus."""
        ...

    def starts(self, slot: int, first_step: int, steps: int) -> Tensor:
        """Start of each window in `tokens`, (steps, batch) int64; valid until the slot's next call."""
        ...

    def windows(self, slot: int, first: int, count: int) -> Tensor:
        """The windows at positions first .. first + count - 1 of the run, (count, context + 1), on the device."""
        ...


def open_feed(specs: Sequence[RunSpec], device: torch.device, block_steps: int = BLOCK_STEPS) -> Feed:
    """The feed of one run, or of a stack of runs with the same shape, batch and corpus.

    Raises `UserError` if the corpus has fewer tokens than a run asks for.
    """
    spec, context = specs[0], specs[0].shape.context
    orders = [WindowOrder(train_windows(each), each.seed_data) for each in specs]
    if hasattr(spec.data, "documents"):
        generator = device_documents(spec.data, device) if device.type in GENERATING_DEVICES else None
        readers = [
            document_reader(each) if generator is None else device_reader(each, generator, device)
            for each in specs
        ]
        return ChunkFeed(
            [Reader(o, read) for o, read in zip(orders, readers, strict=True)],
            specs,
            device,
            block_steps,
        )
    tokens = spec.data.tokens("train")
    used = max(order.n_windows for order in orders) * context + 1
    if used <= RESIDENT_TOKENS and len({each.noise for each in specs}) == 1:
        corpus = np.asarray(tokens[:used])
        corpus = add_noise(spec, corpus, np.arange(used)) if spec.noise else corpus
        return ResidentFeed(orders, corpus, spec, device, block_steps)
    return ChunkFeed(
        [Reader(o, window_reader(s, tokens)) for o, s in zip(orders, specs, strict=True)],
        specs,
        device,
        block_steps,
    )


def train_windows(spec: RunSpec) -> int:
    """Number of distinct windows that the run trains on. Raises `UserError` if the corpus has too few tokens."""
    context = spec.shape.context
    available = n_windows(spec.data.n_tokens("train"), context)
    if available < 1:
        raise UserError(
            f"data={spec.data.kind} has {spec.data.n_tokens('train'):,} tokens, less than one window of "
            f"model.context={context}."
        )
    if spec.unique_tokens is None:
        return available
    wanted = spec.unique_tokens // context
    if wanted > available:
        raise UserError(
            f"data.unique_tokens={spec.unique_tokens:,} is more than data={spec.data.kind} has: {available * context:,} "
            f"tokens in whole windows, {(wanted - available) * context:,} too few."
        )
    return wanted


class ResidentFeed:
    """The whole corpus is kept on the device."""

    is_whole = True

    def __init__(
        self,
        orders: Sequence[WindowOrder],
        tokens: Windows,
        spec: RunSpec,
        device: torch.device,
        block_steps: int,
    ) -> None:
        self.tokens = device_tokens(tokens, device)
        self.max_block_steps = block_steps
        self._orders, self._batch, self._context = orders, spec.batch_sequences, spec.shape.context

    def order(self, slot: int) -> WindowOrder:
        return self._orders[slot]

    def starts(self, slot: int, first_step: int, steps: int) -> Tensor:
        windows = self._orders[slot].windows(first_step * self._batch, steps * self._batch)
        return torch.from_numpy(windows * self._context).view(steps, -1)

    def windows(self, slot: int, first: int, count: int) -> Tensor:
        begins = torch.from_numpy(self._orders[slot].windows(first, count) * self._context)
        places = begins[:, None] + torch.arange(self._context + 1)
        return self.tokens[places.to(self.tokens.device)]


@dataclass(frozen=True)
class Reader:
    """A run's windows by position, read on the host or generated on the device."""

    order: WindowOrder
    read: Callable[[NDArray[np.int64]], Windows | Tensor]
    """Window indices (n,) -> tokens (n, context + 1)."""

    def at(self, first: int, count: int) -> Tensor:
        found = self.read(self.order.windows(first, count))
        return found if isinstance(found, Tensor) else device_tokens(found, torch.device("cpu"))


class ChunkFeed:
    """Two chunks of windows per slot are kept on the device. A thread reads the next chunk; a device that generates its own
    chunks does so on demand, queued like any other work, and needs no thread."""

    is_whole = False

    def __init__(
        self, readers: Sequence[Reader], specs: Sequence[RunSpec], device: torch.device, block_steps: int
    ) -> None:
        spec = specs[0]
        self._readers = readers
        self._batch, self._length = spec.batch_sequences, spec.shape.context + 1
        self._steps = [each.steps for each in specs]
        self.max_block_steps = max(1, min(block_steps, CHUNK_TOKENS // (spec.batch_tokens * len(specs))))
        self._half = self.max_block_steps * self._batch * self._length
        example = readers[0].at(0, 1)
        self._reads_ahead = device.type not in GENERATING_DEVICES or example.device.type != device.type
        self.tokens = torch.zeros(2 * self._half * len(specs), dtype=example.dtype, device=device)
        self._in_half: list[list[int | None]] = [[None, None] for _ in specs]
        self._ahead: list[tuple[int, Future[Tensor]] | None] = [None] * len(specs)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")

    def order(self, slot: int) -> WindowOrder:
        return self._readers[slot].order

    def starts(self, slot: int, first_step: int, steps: int) -> Tensor:
        if steps > self.max_block_steps:
            raise ValueError(f"{steps} steps requested, this feed supports {self.max_block_steps} at once")
        first, last = first_step // self.max_block_steps, (first_step + steps - 1) // self.max_block_steps
        for chunk in range(first, last + 1):
            self._load(slot, chunk)
        self._prefetch(slot, last + 1)
        at = np.arange(first_step, first_step + steps)
        half = 2 * slot + at // self.max_block_steps % 2
        row = (half * self.max_block_steps + at % self.max_block_steps)[:, None] * self._batch
        return torch.from_numpy((row + np.arange(self._batch)) * self._length)

    def windows(self, slot: int, first: int, count: int) -> Tensor:
        return self._readers[slot].at(first, count).to(self.tokens.device, self.tokens.dtype)

    def _load(self, slot: int, chunk: int) -> None:
        if self._in_half[slot][chunk % 2] == chunk:
            return
        ahead = self._ahead[slot]
        windows = ahead[1].result() if ahead and ahead[0] == chunk else self._chunk(slot, chunk)
        begin = (2 * slot + chunk % 2) * self._half
        # Nothing gathers from this half any more: the device has computed the block that did, or this copy is queued
        # behind it.
        self.tokens[begin : begin + windows.numel()].copy_(windows.view(-1), non_blocking=True)
        self._in_half[slot][chunk % 2] = chunk

    def _prefetch(self, slot: int, chunk: int) -> None:
        ahead = self._ahead[slot]
        wanted = chunk not in self._in_half[slot] and (ahead is None or ahead[0] != chunk)
        if self._reads_ahead and wanted and chunk * self.max_block_steps < self._steps[slot]:
            self._ahead[slot] = (chunk, self._pool.submit(self._chunk, slot, chunk))

    def _chunk(self, slot: int, chunk: int) -> Tensor:
        first = chunk * self.max_block_steps
        # Past the last step too: a measurement or a longer stack may need it, and all chunks have one size.
        windows = self._readers[slot].at(first * self._batch, self.max_block_steps * self._batch)
        windows = windows.to(self.tokens.dtype)
        return windows.pin_memory() if self._reads_ahead and self.tokens.device.type == "cuda" else windows


def document_reader(spec: RunSpec) -> Callable[[NDArray[np.int64]], Windows]:
    """Windows of a generated source. Each is the beginning of a document; its first token gets no noise."""
    source, length = spec.data, spec.shape.context + 1

    def read(indices: NDArray[np.int64]) -> Windows:
        documents: Windows = source.documents("train", indices, length)
        places = indices[:, None] * length + np.arange(1, length)
        documents[:, 1:] = add_noise(spec, documents[:, 1:], places)
        return documents

    return read


def device_reader(
    spec: RunSpec, generator: DeviceDocuments, device: torch.device
) -> Callable[[NDArray[np.int64]], Tensor]:
    """The windows of `document_reader`, generated on the device."""
    length = spec.shape.context + 1

    def read(indices: NDArray[np.int64]) -> Tensor:
        which = copy_to(torch.from_numpy(indices), device)
        documents = generator.documents("train", which, length)
        if spec.noise:
            places = which[:, None] * length + torch.arange(1, length, device=device)
            documents[:, 1:] = on_device.add_noise(documents[:, 1:], places, spec.noise, spec.data.vocab_size)
        return documents

    return read


def window_reader(spec: RunSpec, tokens: Windows) -> Callable[[NDArray[np.int64]], Windows]:
    """Windows of a corpus that stays on disk (or wherever its array is)."""
    context = spec.shape.context

    def read(indices: NDArray[np.int64]) -> Windows:
        places = indices[:, None] * context + np.arange(context + 1)
        return add_noise(spec, np.asarray(tokens[places]), places)

    return read


def add_noise(spec: RunSpec, tokens: Windows, places: NDArray[np.int64]) -> Windows:
    """`tokens` with a share `spec.noise` of them replaced by uniform ones.

    Which tokens are replaced, and by what, is a pure function of their places in the corpus.
    """
    if not spec.noise:
        return tokens
    draw = draw_u64(stream_key("noise"), places)
    chosen = (draw >> np.uint64(32)).astype(np.float64) < spec.noise * 2.0**32
    random = (draw & np.uint64(0xFFFFFFFF)) % np.uint64(spec.data.vocab_size)
    return np.where(chosen, random.astype(tokens.dtype), tokens)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; the host does not wait for what a GPU is computing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def device_tokens(tokens: Windows, device: torch.device) -> Tensor:
    """Tokens on the device, in the smallest dtype that holds them and that torch can index with (not uint16)."""
    small: Any = {1: np.uint8, 2: np.int32, 4: np.int64, 8: np.int64}[tokens.dtype.itemsize]
    if tokens.dtype == np.int32:
        small = np.int32
    return torch.from_numpy(np.array(tokens, dtype=small)).to(device)
