"""Prepared folders: faults of their files are one-line errors before anything is trained on them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.corpora import TEXTS, jsonl
from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.files import shard_check
from scaling_lab.core.sources.prepared import Prepared, verify
from scaling_lab.corpora.documents import LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, prepare

SPELLINGS = itertools.count(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """More than ten shards of bytes, with a vocabulary of 257."""
    settings = PrepareSettings(shard_tokens=2000, validation_fraction=0.2)
    prepare(LocalText(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "out", settings)
    return tmp_path / "out"


def fresh(folder: Path) -> Prepared:
    """The source as another process would find it."""
    # A process caches what it has read of a source by the spelling of its path.
    return Prepared(str(folder) + "/" * next(SPELLINGS))


def put(path: Path, index: int, token: int) -> None:
    """Overwrite one token of a shard; its size stays."""
    with open(path, "r+b") as file:
        file.seek(2 * index)
        file.write(np.array([token], "<u2").tobytes())


def damage(folder: Path, what: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    shard = folder / "train-00000.bin"
    if what == "truncated":
        os.truncate(shard, 100)
    elif what == "missing":
        shard.unlink()
    elif what == "dtype":
        meta["dtype"] = "float32"
    elif what == "vocabulary":
        meta["vocab_size"] = 1 << 20
    elif what == "range":
        meta["vocab_size"] = 60
    elif what == "checksum":
        meta["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    elif what == "no file name":
        del meta["splits"]["train"]["shards"][0]["file"]
    elif what == "shard size":
        meta["shard_tokens"] //= 2
    elif what == "list":
        meta = [meta]
    elif what == "version":
        meta["format_version"] = 99
    elif what == "torn":
        (folder / "meta.json").write_text("{")
        return
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "has 100 bytes instead of"),
        ("missing", "train-00000.bin is missing"),
        ("dtype", "dtype 'float32'.*uint16, uint32"),
        ("vocabulary", "1048576 does not fit in dtype uint16"),
        ("range", "token .* at index .* outside the vocabulary of 60"),
        ("checksum", "is inconsistent: content_sha256"),
        ("no file name", "meta.json cannot be read"),
        ("shard size", "is inconsistent: a shard of the train split"),
        ("list", "meta.json cannot be read"),
        ("version", "format version 99"),
        ("torn", "meta.json cannot be read"),
    ],
)
def test_damaged_folders_are_one_clear_error(folder, what, message):
    damage(folder, what)
    with pytest.raises(UserError, match=message) as caught:
        fresh(folder).tokens("train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", ["fingerprint", "train", "n_tokens", "verify"])
def test_a_token_out_of_range_anywhere_is_named_before_training(folder, entry):
    """In the middle of an inner shard; the error gives its position in the split."""
    put(folder / "train-00001.bin", 700, 3000)
    source = fresh(folder)
    look = {
        "fingerprint": source.fingerprint,
        "train": lambda: source.tokens("validation"),
        "n_tokens": lambda: source.n_tokens("train"),
        "verify": lambda: verify(str(folder)),
    }[entry]
    with pytest.raises(
        UserError, match=r"token 3000 at index 2700 of the train split \(train-00001.bin\)"
    ) as caught:
        look()
    assert "\n" not in str(caught.value)


def test_the_first_of_several_bad_tokens_is_named(folder):
    for shard, index in ((3, 5), (2, 1000), (2, 999)):
        put(folder / f"train-{shard:05d}.bin", index, 257)
    with pytest.raises(UserError, match="token 257 at index 4999 "):
        fresh(folder).tokens("train")


def test_changed_tokens_are_detected_by_their_checksum(folder):
    old = np.fromfile(folder / "validation-00001.bin", "<u2")[3]
    put(folder / "validation-00001.bin", 3, (int(old) + 1) % 256)
    with pytest.raises(
        UserError, match=r"validation-00001.bin has changed since it was written \(its checksum differs\)"
    ):
        fresh(folder).fingerprint()


def test_only_shards_that_changed_since_they_were_verified_are_read_again(folder):
    """Checked with damage that keeps size and time: it is found only when the shard is read."""
    original = fresh(folder).fingerprint()
    for name in ("train-00001.bin", "train-00002.bin"):
        stat = (folder / name).stat()
        put(folder / name, 10, 257)
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fresh(folder).fingerprint() == original
    os.utime(folder / "train-00002.bin", ns=(1, 1))
    with pytest.raises(UserError, match=r"token 257 at index 4010 .*train-00002\.bin"):
        fresh(folder).fingerprint()
    with pytest.raises(UserError, match=r"train-00001\.bin"):
        verify(str(folder))


def test_the_cache_of_verified_shards_is_optional(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(shard_check.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    before = sorted(p.name for p in folder.iterdir())
    assert fresh(folder).n_tokens("train") == fresh(folder).tokens("train").size
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_command_verifies(folder):
    argv = [sys.executable, "-m", "scaling_lab.cli.main", "prepare-data", f"verify={folder}"]
    good = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert good.returncode == 0
    assert "all checksums match" in good.stdout
    # A bit flip on the disk changes neither size nor time.
    shard = folder / "train-00003.bin"
    stat = shard.stat()
    put(shard, 10, 200)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bad = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith(
        f"error: verify='{folder}': train-00003.bin has changed since it was written"
    )
