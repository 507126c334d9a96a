"""Owns turning documents into tokens: bytes, a BPE trained here, or a published tokenizer; and which one it was."""

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
# While text for a BPE is read.
TELL_EVERY_BYTES = 1_000_000


@dataclass(frozen=True)
class ByteTokens:
    """One byte, one token; 256 separates documents."""

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
        """Each document's tokens, in a form that `flat` takes."""
        # Half of a surrogate pair (JSON may hold one) has no UTF-8: it becomes a question mark.
        return [text.encode("utf-8", "replace") for text in texts]

    def flat(self, encoded: Sequence[Any], dtype: Any) -> NDArray[np.integer]:
        """All documents one after the other, each after a separator."""
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
        # A published file may say how its model's inputs are cut and filled up: documents are neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name, self._hash = name, hashlib.sha256(file.read_bytes()).hexdigest()
        special = [SEPARATOR_NAME, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"]
        found = [i for token in special if (i := self._tokenizer.token_to_id(token)) is not None]
        # Not their number: a published vocabulary may have holes.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        largest = max(ids, default=-1)
        self.separator = found[0] if found else largest + 1
        self.vocab_size = max(largest, self.separator) + 1
        """With the separator, where the tokenizer has none of its own."""

    def hash(self) -> str:
        return self._hash

    def encode(self, texts: Sequence[str]) -> Sequence[Any]:
        """Each document's tokens, in a form that `flat` takes; on all cores, and Python is free meanwhile."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        encoded: Sequence[Any] = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return encoded

    def flat(self, encoded: Sequence[Any], dtype: Any) -> NDArray[np.integer]:
        """All documents one after the other, each after a separator."""
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

    `progress` is told the share of that text that was read, and None when it is over and merges are being found.
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
    tokenizer.train_from_iterator(up_to(documents, train_mb * 1e6, progress), trainer)
    temporary = file.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    temporary.replace(file)


def up_to(
    documents: Iterable[str],
    limit_bytes: float,
    progress: Callable[[float | None], None] = lambda share: None,
) -> Iterator[str]:
    """Documents until so many bytes are reached."""
    total, told = 0, 0
    for document in documents:
        text = document.encode("utf-8", "replace")
        yield text.decode()
        total += len(text)
        if total - told >= TELL_EVERY_BYTES:
            told = total
            progress(min(1.0, total / limit_bytes))
        if total >= limit_bytes:
            break
    progress(None)


def published_tokenizer(name: str, file: Path) -> None:
    """Write the tokenizer.json of a file or of a name on the hub to `file`. Raises `UserError` in one line."""
    local = Path(name).expanduser()
    if local.is_file():
        file.write_bytes(local.read_bytes())
        return
    try:
        from tokenizers import Tokenizer

        # Its retries are many lines about what the one error says.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        Tokenizer.from_pretrained(name).save(str(file))
    except Exception as error:  # the hub's client has many kinds
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tokenizer={name!r} is no file and could not be read from the hub ({shorten(what, 160, placeholder=' ...')}). "
            "Choices: bytes, bpe, a tokenizer.json, or a name on the hub."
        ) from None
