"""Owns `prepare`: documents in, token files with a sidecar out; can be interrupted at any moment and goes on.

Which split a document belongs to follows from its content: copies of one text are never on both sides, and adding
documents moves none. Of copies within validation only the first is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.prepared import META
from scaling_lab.core.storage.files import remove_temporary_files
from scaling_lab.corpora.reading import Meter
from scaling_lab.corpora.tokenizing import (
    BPE,
    BYTES,
    SMALLEST_BPE,
    ByteTokens,
    TokenizerTokens,
    Tokens,
    published_tokenizer,
    train_bpe,
)
from scaling_lab.corpora.writer import (
    PROGRESS,
    SPLITS,
    Counts,
    ShardWriter,
    load_progress,
    save_progress,
    write_meta,
)

# Documents and characters that are tokenised at a time.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 2_000, 4_000_000
# How often progress is made durable.
SAVE_EVERY_S = 2.0
HASHES = "seen.hashes"


class Documents(Protocol):
    """Where documents come from, always in the same order."""

    @property
    def name(self) -> str: ...
    def identity(self) -> dict[str, Any]: ...
    def documents(self, skip: int = 0, meter: Meter | None = None) -> Iterator[str | None]: ...


@dataclass(frozen=True)
class Stage:
    """How far a preparation is, for whoever shows it."""

    doing: str
    """One of the words below."""
    tokens: int = 0
    """Written so far, of both splits, an earlier attempt's too."""
    share: float | None = None
    """Of what is being done, in [0, 1]: of the source's bytes, or of `max_tokens`; None where nobody knows."""


READING_FOR_BPE, TRAINING_BPE = "reading for the BPE", "training the BPE"
OPENING, TOKENISING, SUMMING = "reading", "tokenising", "writing checksums"


@dataclass(frozen=True)
class PrepareSettings:
    """How documents become token files."""

    tokenizer: str = BYTES
    """bytes, bpe (trained on this text), a tokenizer.json, or a name on the hub"""
    vocab_size: int = 4096
    """Of tokenizer=bpe"""
    tokenizer_mb: float = 50.0
    """Text that tokenizer=bpe is trained on, MB from the beginning"""
    validation_fraction: float = 0.01
    """Share of the documents that is kept for validation, by their content"""
    max_tokens: int | None = None
    """Stop after this many training tokens"""
    shard_tokens: int = 100_000_000
    """Tokens of one file"""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction!r} must be in (0, 1).")
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens} must be at least 1.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1.")
        if not self.tokenizer_mb > 0:
            raise UserError(f"tokenizer_mb={self.tokenizer_mb!r} must be positive.")
        if self.tokenizer == BPE and self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"vocab_size={self.vocab_size} must be at least {SMALLEST_BPE}: 256 bytes and the separator."
            )


def prepare(
    documents: Documents,
    out: Path,
    settings: PrepareSettings,
    progress: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, Any]:
    """Write the token files of `documents` to `out` and return the sidecar; what an earlier attempt wrote is kept.

    Raises:
        UserError: documents that cannot be read, an `out` that holds something else, no document for one of the splits.
    """
    described = {"source": documents.name, **asdict(settings)}
    if (done := _ended_while_tidying(out)) is not None:
        return done
    identity = documents.identity()
    counts = _go_on(out, described, identity)
    progress(Stage(OPENING, counts.tokens))
    tokens = open_tokenizer(documents, out, settings, progress)
    dtype = "uint16" if tokens.vocab_size <= 1 << 16 else "uint32"
    writers = {
        name: ShardWriter(out, name, dtype, settings.shard_tokens, counts.split(name).tokens)
        for name in SPLITS
    }
    seen = _seen_before(out, counts.validation.documents)
    last, meter = time.monotonic(), Meter()
    with open(out / HASHES, "ab") as hashes:
        for batch in _encoded(documents.documents(counts.documents_read, meter), meter, tokens, settings):
            sides = _sort_out(batch, counts, seen, hashes, settings.max_tokens)
            for name, side in sides.items():
                flat = tokens.flat(side, dtype)
                writers[name].append(flat)
                counts.split(name).tokens += int(flat.size)
            enough = settings.max_tokens is not None and counts.train.tokens >= settings.max_tokens
            if time.monotonic() - last > SAVE_EVERY_S or enough:
                hashes.flush()
                for writer in writers.values():
                    writer.flush()
                save_progress(out, counts, described, identity)
                last = time.monotonic()
            progress(Stage(TOKENISING, counts.tokens, _share(batch.share, counts, settings)))
            if enough:
                break
    for name in SPLITS:
        if counts.split(name).tokens == 0:
            raise UserError(
                f"{counts.documents_read:,} documents of {documents.name} leave the {name} split empty. Choices: more "
                "text, or another validation_fraction."
            )
    progress(Stage(SUMMING, counts.tokens))
    shards = {name: writer.close() for name, writer in writers.items()}
    described_tokenizer = {
        "name": tokens.name, "sha256": tokens.hash(), "separator": tokens.separator, "vocab_size": tokens.vocab_size,
    }  # fmt: skip
    meta = write_meta(out, counts, shards, described, described_tokenizer, dtype, settings.shard_tokens)
    (out / HASHES).unlink(missing_ok=True)
    # Last: where it is still there, the tidying is not over.
    (out / PROGRESS).unlink()
    return meta


def _ended_while_tidying(out: Path) -> dict[str, Any] | None:
    """The sidecar of a preparation that was killed after writing it, before its progress was removed; None otherwise."""
    if not ((out / META).exists() and (out / PROGRESS).exists()):
        return None
    remove_temporary_files(out)
    (out / HASHES).unlink(missing_ok=True)
    (out / PROGRESS).unlink()
    meta: dict[str, Any] = json.loads((out / META).read_text(encoding="utf-8"))
    return meta


def _share(of_source: float | None, counts: Counts, settings: PrepareSettings) -> float | None:
    """How much is done of what ends the preparation: the source, or enough tokens."""
    of_tokens = None if settings.max_tokens is None else min(1.0, counts.train.tokens / settings.max_tokens)
    known = [share for share in (of_source, of_tokens) if share is not None]
    return max(known) if known else None


def _go_on(out: Path, described: dict[str, Any], identity: dict[str, Any]) -> Counts:
    """What an interrupted preparation of the same text and settings has done; a new folder begins from nothing."""
    if (out / META).exists():
        raise UserError(
            f"out={str(out)!r} holds a finished preparation already. Give another folder, or remove it."
        )
    if out.is_dir():
        remove_temporary_files(out)
    begun = load_progress(out)
    # An attempt that came to nothing (a wrong option, text that could not be read) binds nobody.
    if begun is not None and begun[0].documents_read:
        counts, before = begun
        now = described | identity
        different = [k for k in now if before.get(k) != now[k]]
        if different == ["files"]:
            raise UserError(
                f"out={str(out)!r} was begun when the files of {described['source']} were others, or older. Give another "
                "folder, or remove it."
            )
        if different:
            k = different[0]
            raise UserError(
                f"out={str(out)!r} was begun with {k}={before.get(k)!r}, now it is {now[k]!r}. Give another folder, or "
                "remove it."
            )
        return counts
    known = (HASHES, "tokenizer.json", *((PROGRESS,) if begun else ()))
    if out.is_dir() and any(p.name not in known and not _is_ours(p) for p in out.iterdir()):
        raise UserError(f"out={str(out)!r} is not empty and no preparation: give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    # Before the first progress nothing counts.
    (out / HASHES).unlink(missing_ok=True)
    (out / "tokenizer.json").unlink(missing_ok=True)
    counts = Counts()
    save_progress(out, counts, described, identity)
    return counts


def _is_ours(path: Path) -> bool:
    return path.suffix in (".bin", ".tmp") and path.name.startswith(SPLITS)


def open_tokenizer(
    documents: Documents, out: Path, settings: PrepareSettings, progress: Callable[[Stage], None]
) -> Tokens:
    """The tokenizer of the settings; one that is trained or fetched is kept as tokenizer.json."""
    if settings.tokenizer == BYTES:
        return ByteTokens()
    file = out / "tokenizer.json"
    if not file.exists():
        if settings.tokenizer == BPE:
            texts = (text for text in documents.documents() if text is not None)
            train_bpe(
                texts,
                settings.vocab_size,
                settings.tokenizer_mb,
                file,
                lambda share: progress(Stage(TRAINING_BPE if share is None else READING_FOR_BPE, 0, share)),
            )
        else:
            published_tokenizer(settings.tokenizer, file)
    return TokenizerTokens(file, settings.tokenizer)


@dataclass(frozen=True)
class _LookedAt:
    """What a document is, from its content alone."""

    text: str
    n_bytes: int
    digest: bytes
    side: str


def _look_at(text: str | None, fraction: float) -> _LookedAt | None:
    """None for a document without text, and a blank one."""
    text = (text or "").strip("\n")
    if not text.strip():
        return None
    data = text.encode("utf-8", "replace")
    digest = hashlib.sha256(data).digest()[:16]
    side = "validation" if int.from_bytes(digest[:8], "big") < fraction * 2.0**64 else "train"
    return _LookedAt(text, len(data), digest, side)


@dataclass(frozen=True)
class _Batch:
    """Some documents, one after the other."""

    without_text: int
    """Rows that say that they have none."""
    looked_at: list[_LookedAt | None]
    encoded: Sequence[Any]
    """Of those that are not blank, their tokens."""
    share: float | None
    """Of the source, up to the batch's end."""


def _encoded(
    documents: Iterator[str | None], meter: Meter, tokens: Tokens, settings: PrepareSettings
) -> Iterator[_Batch]:
    """Batches of documents and their tokens.

    A batch is tokenised while the one before it is written and the one after it is read, so that the cores of a
    tokenizer need not wait for Python. Nothing here knows of another batch: what counts is decided by who takes them.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        ahead: tuple[int, list[_LookedAt | None], Future[Sequence[Any]], float | None] | None = None
        for texts in _batches(documents):
            looked_at = [_look_at(text, settings.validation_fraction) for text in texts]
            future = pool.submit(tokens.encode, [each.text for each in looked_at if each])
            if ahead is not None:
                yield _Batch(ahead[0], ahead[1], ahead[2].result(), ahead[3])
            ahead = texts.count(None), looked_at, future, meter.share
        if ahead is not None:
            yield _Batch(ahead[0], ahead[1], ahead[2].result(), ahead[3])


def _sort_out(
    batch: _Batch, counts: Counts, seen: set[bytes], hashes: Any, max_tokens: int | None
) -> dict[str, list[Any]]:
    """Each document's tokens on the side that its content decides, but for copies within validation and for training
    documents after there are enough tokens."""
    sides: dict[str, list[Any]] = {name: [] for name in SPLITS}
    counts.without_text += batch.without_text
    room = math.inf if max_tokens is None else max_tokens - counts.train.tokens
    tokens = iter(batch.encoded)
    for document in batch.looked_at:
        counts.documents_read += 1
        if document is None:
            continue
        its_tokens = next(tokens)
        if document.side == "validation":
            if document.digest in seen:
                counts.duplicates += 1
                continue
            seen.add(document.digest)
            hashes.write(document.digest)
        elif room <= 0:
            continue
        else:
            room -= len(its_tokens) + 1
        sides[document.side].append(its_tokens)
        counts.split(document.side).documents += 1
        counts.split(document.side).bytes += document.n_bytes
    return sides


def _seen_before(out: Path, documents: int) -> set[bytes]:
    """Hashes of the validation documents that count; what was written after the last progress is cut off."""
    path = out / HASHES
    data = path.read_bytes()[: 16 * documents] if path.exists() else b""
    path.write_bytes(data)
    return {data[i : i + 16] for i in range(0, len(data), 16)}


def _batches(documents: Iterator[str | None]) -> Iterator[list[str | None]]:
    """Documents a few at a time; where a batch ends depends on nothing but the documents since the first of it."""
    while True:
        batch: list[str | None] = []
        size = 0
        for text in documents:
            batch.append(text)
            size += len(text or "")
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
                break
        if not batch:
            return
        yield batch
