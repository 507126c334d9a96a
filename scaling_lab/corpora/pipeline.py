"""`prepare`: from documents to token files with metadata; can be interrupted at any time and resumed.

A document's content determines its split: copies of a text are always in the same split, and adding documents does not move
others. Duplicates within the validation split are dropped.
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
from scaling_lab.core.installation import require
from scaling_lab.core.sources.prepared import META
from scaling_lab.core.storage.files import remove_temporary_files
from scaling_lab.corpora.reading import ReadProgress
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

# Maximum documents and characters that are tokenized at once.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 2_000, 4_000_000
# How often progress is saved.
SAVE_EVERY_S = 2.0
HASHES = "seen.hashes"


class Documents(Protocol):
    """A source of documents, always in the same order."""

    @property
    def name(self) -> str: ...
    def identity(self) -> dict[str, Any]: ...
    def documents(self, skip: int = 0, meter: ReadProgress | None = None) -> Iterator[str | None]: ...


@dataclass(frozen=True)
class Stage:
    """Progress of a preparation, for display."""

    doing: str
    """One of the constants below."""
    tokens: int = 0
    """Tokens written so far to both splits, including earlier attempts."""
    share: float | None = None
    """Fraction done of this stage, in [0, 1]: of the source's bytes, or of `max_tokens`; None if unknown."""


READING_FOR_BPE, TRAINING_BPE = "reading text to train the BPE", "training the BPE"
OPENING, TOKENIZING, CHECKSUMS = "reading", "tokenizing", "writing checksums"


@dataclass(frozen=True)
class PrepareSettings:
    """How documents become token files."""

    tokenizer: str = BYTES
    """bytes, bpe (trained on this text), a tokenizer.json, or the name of a tokenizer on the Hub"""
    vocab_size: int = 4096
    """Vocabulary size of tokenizer=bpe"""
    tokenizer_mb: float = 50.0
    """How much text tokenizer=bpe is trained on, in MB from the start"""
    validation_fraction: float = 0.01
    """Fraction of the documents used for validation, chosen by their content"""
    max_tokens: int | None = None
    """Stop after this many training tokens"""
    shard_tokens: int = 100_000_000
    """Tokens per file"""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction!r} must be in (0, 1).")
        if self.shard_tokens < 1:
            raise UserError(f"shard_tokens={self.shard_tokens} must be at least 1.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1.")
        if not self.tokenizer_mb > 0:
            raise UserError(f"tokenizer_mb={self.tokenizer_mb!r} must be positive.")
        if self.tokenizer != BYTES:
            require("tokenizers", f"tokenizer={self.tokenizer}")
        if self.tokenizer == BPE and self.vocab_size < SMALLEST_BPE:
            raise UserError(
                f"vocab_size={self.vocab_size} must be at least {SMALLEST_BPE}: 256 bytes plus the separator."
            )


def prepare(
    documents: Documents,
    out: Path,
    settings: PrepareSettings,
    progress: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, Any]:
    """Write the token files of `documents` to `out` and return the metadata; resumes an earlier attempt.

    Raises:
        UserError: documents that cannot be read, an `out` with other content, or an empty split.
    """
    described = {"source": documents.name, **asdict(settings)}
    if (done := _finish_cleanup(out)) is not None:
        return done
    identity = documents.identity()
    counts = _resume(out, described, identity)
    progress(Stage(OPENING, counts.tokens))
    tokens = open_tokenizer(documents, out, settings, progress)
    dtype = "uint16" if tokens.vocab_size <= 1 << 16 else "uint32"
    writers = {
        name: ShardWriter(out, name, dtype, settings.shard_tokens, counts.split(name).tokens)
        for name in SPLITS
    }
    seen = _load_hashes(out, counts.validation.documents)
    last, meter = time.monotonic(), ReadProgress()
    with open(out / HASHES, "ab") as hashes:
        for batch in _tokenize_batches(
            documents.documents(counts.documents_read, meter), meter, tokens, settings
        ):
            sides = _assign_splits(batch, counts, seen, hashes, settings.max_tokens)
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
            progress(Stage(TOKENIZING, counts.tokens, _share(batch.share, counts, settings)))
            if enough:
                break
    for name in SPLITS:
        if counts.split(name).tokens == 0:
            raise UserError(
                f"the {name} split is empty after {counts.documents_read:,} documents of {documents.name}. Choices: more "
                "text, or another validation_fraction."
            )
    progress(Stage(CHECKSUMS, counts.tokens))
    shards = {name: writer.close() for name, writer in writers.items()}
    described_tokenizer = {
        "name": tokens.name, "sha256": tokens.hash(), "separator": tokens.separator, "vocab_size": tokens.vocab_size,
    }  # fmt: skip
    meta = write_meta(out, counts, shards, described, described_tokenizer, dtype, settings.shard_tokens)
    (out / HASHES).unlink(missing_ok=True)
    # Removed last: while it exists, cleanup is not finished.
    (out / PROGRESS).unlink()
    return meta


def _finish_cleanup(out: Path) -> dict[str, Any] | None:
    """Finish a preparation that was killed between writing its metadata and removing its progress file, and return the
    metadata; None for any other state."""
    if not ((out / META).exists() and (out / PROGRESS).exists()):
        return None
    remove_temporary_files(out)
    (out / HASHES).unlink(missing_ok=True)
    (out / PROGRESS).unlink()
    meta: dict[str, Any] = json.loads((out / META).read_text(encoding="utf-8"))
    return meta


def _share(of_source: float | None, counts: Counts, settings: PrepareSettings) -> float | None:
    """Fraction done, of the source or of `max_tokens`, whichever ends the preparation first."""
    of_tokens = None if settings.max_tokens is None else min(1.0, counts.train.tokens / settings.max_tokens)
    known = [share for share in (of_source, of_tokens) if share is not None]
    return max(known) if known else None


def _resume(out: Path, described: dict[str, Any], identity: dict[str, Any]) -> Counts:
    """Counts of an interrupted preparation of the same text with the same settings, or zeros for a new folder."""
    if (out / META).exists():
        raise UserError(
            f"out={str(out)!r} already contains a finished preparation. Give another folder, or remove it."
        )
    if out.is_dir():
        remove_temporary_files(out)
    begun = load_progress(out)
    # An attempt that read no documents (an invalid option, unreadable text) may be restarted with other settings.
    if begun is not None and begun[0].documents_read:
        counts, before = begun
        now = described | identity
        different = [k for k in now if before.get(k) != now[k]]
        if different == ["files"]:
            raise UserError(
                f"out={str(out)!r} was started before the files of {described['source']} were changed. Give another "
                "folder, or remove it."
            )
        if different:
            k = different[0]
            raise UserError(
                f"out={str(out)!r} was started with {k}={before.get(k)!r}, but now it is {now[k]!r}. Give another folder, "
                "or remove it."
            )
        return counts
    known = (HASHES, "tokenizer.json", *((PROGRESS,) if begun else ()))
    if out.is_dir() and any(p.name not in known and not _is_ours(p) for p in out.iterdir()):
        raise UserError(f"out={str(out)!r} is not empty and contains other files: give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    # Nothing written before the first saved progress counts.
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
    """The tokenizer given by the settings; a trained or downloaded one is saved as tokenizer.json."""
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
class _Document:
    """A document, its hash, and the split given by the hash."""

    text: str
    n_bytes: int
    digest: bytes
    side: str


def _inspect(text: str | None, fraction: float) -> _Document | None:
    """None for a missing or blank document."""
    text = (text or "").strip("\n")
    if not text.strip():
        return None
    data = text.encode("utf-8", "replace")
    digest = hashlib.sha256(data).digest()[:16]
    side = "validation" if int.from_bytes(digest[:8], "big") < fraction * 2.0**64 else "train"
    return _Document(text, len(data), digest, side)


@dataclass(frozen=True)
class _Batch:
    """Consecutive documents and their tokens."""

    without_text: int
    """Number of rows whose text is null."""
    inspected: list[_Document | None]
    encoded: Sequence[Any]
    """Tokens of the documents that are not blank."""
    share: float | None
    """Fraction of the source read up to the end of this batch."""


def _tokenize_batches(
    documents: Iterator[str | None], meter: ReadProgress, tokens: Tokens, settings: PrepareSettings
) -> Iterator[_Batch]:
    """Batches of documents and their tokens.

    A batch is tokenized while the previous one is written and the next one is read, so that a multithreaded tokenizer does
    not wait for Python. Batches are independent; the caller decides which documents count.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        ahead: tuple[int, list[_Document | None], Future[Sequence[Any]], float | None] | None = None
        for texts in document_batches(documents):
            inspected = [_inspect(text, settings.validation_fraction) for text in texts]
            future = pool.submit(tokens.encode, [each.text for each in inspected if each])
            if ahead is not None:
                yield _Batch(ahead[0], ahead[1], ahead[2].result(), ahead[3])
            ahead = texts.count(None), inspected, future, meter.share
        if ahead is not None:
            yield _Batch(ahead[0], ahead[1], ahead[2].result(), ahead[3])


def _assign_splits(
    batch: _Batch, counts: Counts, seen: set[bytes], hashes: Any, max_tokens: int | None
) -> dict[str, list[Any]]:
    """Assign each document's tokens to the split given by its content, without duplicates within validation and without
    training documents beyond `max_tokens`."""
    sides: dict[str, list[Any]] = {name: [] for name in SPLITS}
    counts.without_text += batch.without_text
    room = math.inf if max_tokens is None else max_tokens - counts.train.tokens
    tokens = iter(batch.encoded)
    for document in batch.inspected:
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


def _load_hashes(out: Path, documents: int) -> set[bytes]:
    """Hashes of the validation documents that count; entries after the last saved progress are removed."""
    path = out / HASHES
    data = path.read_bytes()[: 16 * documents] if path.exists() else b""
    path.write_bytes(data)
    return {data[i : i + 16] for i in range(0, len(data), 16)}


def document_batches(documents: Iterator[str | None]) -> Iterator[list[str | None]]:
    """Group documents into batches; where a batch ends depends only on the documents in it."""
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
