"""Tokenizers: bytes, a BPE trained on the corpus, or a published tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError

BYTES, BPE = "bytes", "bpe"
SEPARATOR_NAME = "<|endoftext|>"
# 256 bytes and the separator.
SMALLEST_BPE = 257
# How often progress is reported while reading text to train a BPE.
PROGRESS_EVERY_BYTES = 1_000_000


@dataclass(frozen=True)
class ByteTokens:
    """One token per byte; token 256 separates documents."""

    name: str = BYTES

    @property
    def vocab_size(self) -> int:
        return 257

    @property
    def separator(self) -> int:
        return 256

    def hash(self) -> str:
        return hashlib.sha256(b"bytes, 256 separates documents").hexdigest()

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        """Each document's tokens, in a form accepted by `flat`."""
        # A lone surrogate (possible in JSON) has no UTF-8 encoding and becomes a question mark.
        return [text.encode("utf-8", "replace") for text in texts]

    def flat(self, encoded: Sequence[Any], dtype: Any) -> NDArray[np.integer]:
        """All documents concatenated, with a separator before each."""
        parts: list[NDArray[np.integer]] = []
        for document in encoded:
            parts.append(np.array([self.separator], dtype=dtype))
            parts.append(np.frombuffer(document, dtype=np.uint8).astype(dtype))
        return np.concatenate(parts) if parts else np.empty(0, dtype)


class TokenizerTokens:
    """A tokenizer of the `tokenizers` library, read from its JSON file."""

    def __init__(self, file: Path, name: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with a file
            raise UserError(
                f"tokenizer={name!r} cannot be read as a tokenizer.json: {' '.join(str(error).split())}."
            ) from None
        # A published tokenizer may truncate or pad its model's inputs: documents need neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name, self._hash = name, hashlib.sha256(file.read_bytes()).hexdigest()
        special = [SEPARATOR_NAME, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"]
        found = [i for token in special if (i := self._tokenizer.token_to_id(token)) is not None]
        # The largest id, not the number of ids: a published vocabulary may have gaps.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        largest = max(ids, default=-1)
        self.separator = found[0] if found else largest + 1
        self.vocab_size = max(largest, self.separator) + 1
        """Includes the separator, which is added if the tokenizer has none."""

    def hash(self) -> str:
        return self._hash

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        """Each document's tokens, in a form accepted by `flat`; uses all cores and releases the GIL."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        encoded: Sequence[Any] = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return encoded

    def flat(self, encoded: Sequence[Any], dtype: Any) -> NDArray[np.integer]:
        """All documents concatenated, with a separator before each."""
        flat = itertools.chain.from_iterable([self.separator, *each.ids] for each in encoded)
        return np.fromiter(flat, dtype=dtype)


Tokens = ByteTokens | TokenizerTokens


def train_bpe(
    documents: Iterable[str],
    vocab_size: int,
    train_mb: float,
    file: Path,
    progress: Callable[[float | None], None] = lambda share: None,
) -> None:
    """Train a byte-level BPE on the first `train_mb` MB of the documents and write its tokenizer.json.

    `progress` is called with the fraction of that text that was read, and with None when training starts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR_NAME],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(take_bytes(documents, train_mb * 1e6, progress), trainer)
    temporary = file.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    temporary.replace(file)


def take_bytes(
    documents: Iterable[str],
    limit_bytes: float,
    progress: Callable[[float | None], None] = lambda share: None,
) -> Iterator[str]:
    """Documents up to a total of `limit_bytes`."""
    total, reported = 0, 0
    for document in documents:
        text = document.encode("utf-8", "replace")
        yield text.decode()
        total += len(text)
        if total - reported >= PROGRESS_EVERY_BYTES:
            reported = total
            progress(min(1.0, total / limit_bytes))
        if total >= limit_bytes:
            break
    progress(None)


def published_tokenizer(name: str, file: Path) -> None:
    """Copy the tokenizer.json of a local file or of a tokenizer on the Hub to `file`. Raises `UserError`."""
    local = Path(name).expanduser()
    if local.is_file():
        file.write_bytes(local.read_bytes())
        return
    try:
        from tokenizers import Tokenizer

        # It logs each retry; the final error says it all.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        Tokenizer.from_pretrained(name).save(str(file))
    except Exception as error:  # the Hub's client raises many types
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tokenizer={name!r} is not a file and could not be read from the Hub ({shorten(what, 160, placeholder=' ...')}). "
            "Choices: bytes, bpe, a tokenizer.json, or the name of a tokenizer on the Hub."
        ) from None
