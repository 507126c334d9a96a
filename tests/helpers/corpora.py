"""Small texts for the preparation of corpora, and the contents of prepared folders."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np

from scaling_lab.core.sources.prepared import Prepared

TEXTS = [f"document {i}: " + " ".join(str(i * k % 97) for k in range(i % 50)) for i in range(400)]


def jsonl(path: Path, texts) -> Path:
    path.write_text(
        "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts)), encoding="utf-8"
    )
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def documents_of(source: Prepared, split: str, separator: int) -> list[bytes]:
    tokens = np.asarray(source.tokens(split))
    starts = [*np.flatnonzero(tokens == separator).tolist(), tokens.size]
    return [tokens[a + 1 : b].astype(np.uint8).tobytes() for a, b in itertools.pairwise(starts)]


def command(path: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "scaling_lab.cli.main",
        "prepare-data",
        f"path={path}",
        f"out={out}",
        *options,
    ]
