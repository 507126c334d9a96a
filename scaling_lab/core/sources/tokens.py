"""The `tokens` source: the user's own token file (.npy, .parquet, or flat binary .bin with a given dtype)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import MissingCorpus, UserError, unknown
from scaling_lab.core.sources.files.token_parquet import read_token_column

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@dataclass(frozen=True)
class TokenFile:
    """A flat array of token ids; the validation split is the end of the file, or a separate file."""

    kind: ClassVar[str] = "tokens"

    path: str = ""
    vocab_size: int = 256
    """Every token must be below it. Required (see `completed`), except for uint8 files."""
    validation_path: str = ""
    """Empty: the last `validation_fraction` of `path` is the validation split."""
    validation_fraction: float = 0.05
    dtype: str = "uint16"
    """Of a .bin file; a .npy file has its own."""
    column: str = ""
    """Of a .parquet file: the column with the tokens; empty: its only integer column."""
    bytes_per_token: float | None = None
    """Bytes of text per token of the validation split, for bits per byte; null: no text, or unknown."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "data.path is missing: data=tokens requires data.path=FILE (.npy, .parquet, or .bin with data.dtype=...)."
            )
        if self.dtype not in DTYPES:
            raise unknown("data.dtype", self.dtype, DTYPES)
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction!r} must be in (0, 1).")
        if self.bytes_per_token is not None and not 0 < self.bytes_per_token < math.inf:
            raise UserError(f"data.bytes_per_token={self.bytes_per_token!r} must be positive, or null.")
        if self.vocab_size < 2:
            raise UserError(f"data.vocab_size={self.vocab_size!r} must be at least 2.")

    @staticmethod
    def completed(options: Mapping[str, Any]) -> dict[str, Any]:
        """The user's options, with vocab_size=256 added for a uint8 file.

        Raises `UserError` if the vocabulary size of any other file is missing: a wrong guess would waste a sweep.
        """
        path = Path(str(options.get("path") or "")).expanduser()
        if "vocab_size" in options or not path.is_file():
            return dict(options)
        dtype = options.get("dtype", TokenFile.dtype)
        if path.suffix == ".npy":
            try:
                dtype = str(np.load(path, mmap_mode="r", allow_pickle=False).dtype)
            except (OSError, ValueError):
                return dict(options)  # reported by `_open`
        if dtype != "uint8":
            raise UserError(
                f"data.vocab_size is missing: {path.name} contains {dtype} tokens, so give the size of its vocabulary "
                "(the default of 256 applies only to uint8 files)."
            )
        return {**options, "vocab_size": 256}

    def tokens(self, split: str) -> NDArray[np.integer]:
        """The split's token ids, 1-d, memory-mapped."""
        return _splits(self)[0 if split == "train" else 1]

    def n_tokens(self, split: str) -> int:
        return int(self.tokens(split).size)

    def fingerprint(self) -> str:
        """sha256 of both splits' token ids: the same for the same tokens in another dtype or location."""
        return _fingerprint(self)


@cache
def _fingerprint(source: TokenFile) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        part = hashlib.sha256()
        tokens = source.tokens(split)
        for start in range(0, tokens.size, 1 << 22):
            part.update(np.ascontiguousarray(tokens[start : start + (1 << 22)], dtype=np.uint32).tobytes())
        digest.update(part.digest())
    return digest.hexdigest()


@cache
def _splits(source: TokenFile) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    train = _open(source, "data.path", source.path)
    if source.validation_path:
        validation = _open(source, "data.validation_path", source.validation_path)
    else:
        cut = round(train.size * (1 - source.validation_fraction))
        train, validation = train[:cut], train[cut:]
    return train, validation


def _open(source: TokenFile, option: str, name: str) -> NDArray[np.integer]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingCorpus(f"{option}={name!r}: there is no such file.")
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".parquet":
            tokens = read_token_column(path, option, source.column)
        else:
            item = np.dtype(source.dtype).itemsize
            if path.stat().st_size % item:
                raise UserError(
                    f"{option}={name!r} has {path.stat().st_size} bytes, which is not a multiple of the {item} bytes of "
                    f"data.dtype={source.dtype}. Choices: {', '.join(DTYPES)}."
                )
            tokens = (
                np.memmap(path, dtype=source.dtype, mode="r")
                if path.stat().st_size
                else np.empty(0, source.dtype)
            )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option}={name!r} cannot be read as tokens: {error}.") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(
            f"{option}={name!r} contains a {tokens.ndim}-d array of {tokens.dtype}; expected a 1-d array of integers."
        )
    if tokens.size == 0:
        raise UserError(f"{option}={name!r} is empty.")
    _check_range(tokens, option, name, source.vocab_size)
    return tokens


def _check_range(tokens: NDArray[np.integer], option: str, name: str, vocab_size: int) -> None:
    """Raise `UserError` with the position of the first token outside the vocabulary."""
    block = 1 << 24
    for start in range(0, tokens.size, block):
        part = np.asarray(tokens[start : start + block])
        if part.min() < 0 or part.max() >= vocab_size:
            bad = int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
            raise UserError(
                f"{option}={name!r} has token {int(part[bad])} at index {start + bad}, outside the range of "
                f"data.vocab_size={vocab_size}."
            )
