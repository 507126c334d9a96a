"""The `pysource` source: source code of the Python standard library, as bytes.

About 10 MB of real text, available wherever Python is installed. Tests, encodings and generated tables are excluded.
The text depends on the Python version; the fingerprint identifies it.
"""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scaling_lab.core.errors import UserError

# Files below folders with these names are skipped: tests are repetitive, encodings and pydoc_data are generated tables.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "_bundled", "turtledemo"}
)
PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})
# Files with longer lines are generated tables or embedded data.
MAX_LINE_BYTES = 2_000
MAX_FILE_BYTES = 1_000_000

# Starts each document; never occurs in source code.
SEPARATOR = 0


@dataclass(frozen=True)
class PySource:
    """Bytes of .py files, shuffled by file with a fixed seed and split into train and validation by file."""

    kind: ClassVar[str] = "pysource"

    site_packages: bool = False
    """Also read the source of installed packages (hundreds of MB in a torch environment)."""
    max_mb: float = 1000.0
    """Stop reading after this much text, in MB (1e6 bytes)."""
    validation_fraction: float = 0.05
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction!r} must be in (0, 1).")
        if self.max_mb <= 0:
            raise UserError(f"data.max_mb={self.max_mb!r} must be positive.")

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def bytes_per_token(self) -> float | None:
        return 1.0

    @property
    def tokenizer(self) -> str:
        return "bytes"

    def text(self, split: str) -> bytes:
        """The whole split as bytes, a separator before each document. Cached per process: about 10 MB."""
        return _splits(self)[0 if split == "train" else 1]

    def tokens(self, split: str) -> NDArray[np.uint8]:
        """The split's bytes, (n,) uint8."""
        return np.frombuffer(self.text(split), dtype=np.uint8)

    def n_tokens(self, split: str) -> int:
        return len(self.text(split))

    def fingerprint(self) -> str:
        """sha256 of both splits: equal fingerprints mean the same tokens in the same order."""
        digest = hashlib.sha256()
        for split in ("train", "validation"):
            digest.update(hashlib.sha256(self.text(split)).digest())
        return digest.hexdigest()


def source_files(site_packages: bool) -> list[tuple[str, Path]]:
    """(name independent of where Python is installed, path), in a fixed order."""
    roots = [("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
    if site_packages:
        roots.append(("site-packages", Path(sysconfig.get_paths()["purelib"])))
    files: dict[str, Path] = {}
    for label, root in roots:
        skipped = SKIPPED_FOLDERS | (PACKAGE_FOLDERS if label == "stdlib" else frozenset())
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in skipped]  # prunes os.walk
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    files[f"{label}/{path.relative_to(root).as_posix()}"] = path
    return sorted(files.items())


def _read_document(path: Path) -> bytes | None:
    """The file's bytes; None if it is empty, generated, not UTF-8 or unreadable."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        text = path.read_bytes().replace(b"\r\n", b"\n")
        text.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.strip() or b"\0" in text or max(map(len, text.split(b"\n"))) > MAX_LINE_BYTES:
        return None
    return text


@cache
def _splits(source: PySource) -> tuple[bytes, bytes]:
    files = source_files(source.site_packages)
    random.Random(source.split_seed).shuffle(files)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    seen: set[bytes] = set()
    total_bytes = 0
    for name, path in files:
        text = _read_document(path)
        if text is None:
            continue
        # Copies of a file (vendored packages) would leak validation text into the training split.
        content = hashlib.sha256(text).digest()
        if content in seen:
            continue
        seen.add(content)
        # Split by a hash of the name, so that adding a file does not move any other file to the other split.
        draw = (
            int.from_bytes(hashlib.sha256(f"{source.split_seed}:{name}".encode()).digest()[:8], "big") / 2**64
        )
        parts[1 if draw < source.validation_fraction else 0].append(bytes([SEPARATOR]) + text)
        total_bytes += len(text)
        if total_bytes > source.max_mb * 1e6:
            break
    train, validation = b"".join(parts[0]), b"".join(parts[1])
    if not train or not validation:
        raise UserError(
            f"data=pysource found only {len(seen)} usable .py files under {sysconfig.get_paths()['stdlib']}: not enough for "
            "a train and a validation split. Choices: data.site_packages=true, or data=tokens data.path=FILE."
        )
    return train, validation
