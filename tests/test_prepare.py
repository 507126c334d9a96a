"""Preparing token files: their contents, interrupted preparations that end in the same bytes, and errors for bad input."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from helpers.corpora import TEXTS, command, documents_of, folder_bytes, jsonl
from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.prepared import Prepared, verify
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.corpora.documents import HubText, LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, prepare
from scaling_lab.corpora.tokenizing import TokenizerTokens


def test_bytes_round_trip_and_every_document_is_in_one_split(tmp_path):
    texts = [*TEXTS, "naïve café ☕", TEXTS[3]]
    meta = prepare(
        LocalText(jsonl(tmp_path / "a.jsonl", texts)),
        tmp_path / "out",
        PrepareSettings(validation_fraction=0.2),
    )
    source = Prepared(str(tmp_path / "out"))
    train, validation = (documents_of(source, split, 256) for split in ("train", "validation"))
    assert sorted({*train, *validation}) == sorted({t.encode() for t in texts})
    assert not set(train) & set(validation)
    assert 40 < len(validation) < 130
    assert meta["duplicates"] + len(train) + len(validation) == len(texts)
    assert source.vocab_size == 257
    assert verify(str(tmp_path / "out")) == meta
    bytes_in, tokens = sum(map(len, validation)), sum(map(len, validation)) + len(validation)
    assert source.bytes_per_token == pytest.approx(bytes_in / tokens)


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    settings = PrepareSettings(validation_fraction=0.3)
    prepare(LocalText(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "a", settings)
    prepare(LocalText(jsonl(tmp_path / "b.jsonl", TEXTS[::-1][:300])), tmp_path / "b", settings)
    a = set(documents_of(Prepared(str(tmp_path / "a")), "validation", 256))
    b = set(documents_of(Prepared(str(tmp_path / "b")), "validation", 256))
    assert b == a & {t.encode() for t in TEXTS[::-1][:300]}


def test_every_format_gives_the_same_tokens(tmp_path):
    rows = pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    pq.write_table(rows, tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "marks.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:04d}.txt").write_text(text, encoding="utf-8")
    sums = set()
    for k, path in enumerate(
        (
            jsonl(tmp_path / "t.jsonl", TEXTS),
            tmp_path / "t.parquet",
            tmp_path / "t.txt",
            tmp_path / "marks.txt",
            folder,
        )
    ):
        meta = prepare(LocalText(path), tmp_path / f"out{k}", PrepareSettings(validation_fraction=0.1))
        sums.add(meta["content_sha256"])
    assert len(sums) == 1


def test_the_hubs_loader_gives_the_same_tokens_as_the_file(tmp_path):
    """The code that streams a dataset of the hub, on a folder laid out as the hub stores it."""
    (tmp_path / "hub").mkdir()
    path = jsonl(tmp_path / "hub" / "train.jsonl", TEXTS)
    hub = HubText(str(tmp_path / "hub"), None, "text")
    assert list(hub.documents(skip=390)) == TEXTS[390:]
    ours = prepare(LocalText(path), tmp_path / "a", PrepareSettings())
    theirs = prepare(hub, tmp_path / "b", PrepareSettings())
    assert ours["content_sha256"] == theirs["content_sha256"]
    with pytest.raises(UserError, match="text_column='body' has no text in .*row 0. The row has: n, text"):
        list(HubText(str(tmp_path / "hub"), None, "body").documents())


def test_bpe_decodes_to_the_text_and_its_hash_is_recorded(tmp_path):
    text = PySource(max_mb=0.4).text("train").decode("utf-8").replace("\0", "<|endoftext|>")
    path = tmp_path / "code.txt"
    path.write_text(text, encoding="utf-8")
    settings = PrepareSettings(tokenizer="bpe", vocab_size=600, validation_fraction=0.2, shard_tokens=20_000)
    meta = prepare(LocalText(path), tmp_path / "out", settings)
    tokenizer = TokenizerTokens(tmp_path / "out" / "tokenizer.json", "bpe")
    assert meta["tokenizer"]["sha256"] == tokenizer.hash()
    source = Prepared(str(tmp_path / "out"))
    assert source.vocab_size == meta["vocab_size"] == 600
    tokens = np.asarray(source.tokens("train"))
    assert len(meta["splits"]["train"]["shards"]) > 2
    starts = np.flatnonzero(tokens == tokenizer.separator)
    first = tokens[starts[0] + 1 : starts[1]].tolist()
    on_disk = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert on_disk.decode(first) in text
    assert source.bytes_per_token > 1.5


def test_shards_read_like_one_array(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(LocalText(path), tmp_path / "one", PrepareSettings())
    prepare(LocalText(path), tmp_path / "many", PrepareSettings(shard_tokens=1000))
    one, many = (Prepared(str(tmp_path / name)).tokens("train") for name in ("one", "many"))
    assert one.size == many.size
    places = np.random.default_rng(0).integers(0, one.size, (30, 7))
    np.testing.assert_array_equal(one[places], many[places])
    np.testing.assert_array_equal(one[990:2010], many[990:2010])
    np.testing.assert_array_equal(np.asarray(one), np.asarray(many))


def kill_until_done(argv: list[str], out: Path, kills: int, rng: random.Random) -> int:
    """Run the command, SIGKILL it at random moments of its work `kills` times, then let it finish. Returns how many kills hit it
    half done."""
    hits = 0
    for _ in range(kills):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "progress.json").exists():
            time.sleep(0.01)
        # progress.json exists once the work has started; later attempts find it there.
        time.sleep(rng.uniform(0.0, 0.3))  # the whole work takes a fast machine about a second
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (out / "progress.json").exists():
            break
        hits += 1
    if not (out / "meta.json").exists() or (out / "progress.json").exists():
        assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    return hits


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("tokenizer=bytes",), ("tokenizer=bpe", "vocab_size=512", "tokenizer_mb=1")]
)
def test_100_mb_killed_and_resumed_are_the_same_bytes(tmp_path, options):
    text = PySource().text("train").decode("utf-8").split("\0")
    rng = random.Random(0)
    path = tmp_path / "big.txt"
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < (100e6 if "tokenizer=bytes" in options else 20e6):
            file.write(f"<|endoftext|>{rng.random()}\n{rng.choice(text)}")
    assert subprocess.run(command(path, tmp_path / "calm", *options), check=False).returncode == 0
    hits = kill_until_done(command(path, tmp_path / "killed", *options), tmp_path / "killed", 12, rng)
    assert hits >= 2
    assert folder_bytes(tmp_path / "calm") == folder_bytes(tmp_path / "killed")


def test_interrupted_between_batches_is_the_same_bytes(tmp_path, monkeypatch):
    """Stopped after each of the first batches, with progress saved after every batch and garbage behind it."""
    from scaling_lab.corpora import pipeline

    monkeypatch.setattr(pipeline, "BATCH_DOCUMENTS", 30)
    monkeypatch.setattr(pipeline, "SAVE_EVERY_S", 0.0)
    source = LocalText(jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS]))
    settings = PrepareSettings(validation_fraction=0.2, shard_tokens=3000)
    prepare(source, tmp_path / "calm", settings)

    class Stop(Exception):
        pass

    out, stops = tmp_path / "killed", 0
    while True:
        calls = 0

        def stop_at_second(stage):
            nonlocal calls
            calls += stage.doing == pipeline.TOKENIZING
            if calls == 2:
                raise Stop

        try:
            prepare(source, out, settings, stop_at_second)
            break
        except Stop:
            stops += 1
            shards = sorted(out.glob("train-*.bin"))
            with open(shards[-1], "ab") as file:
                file.write(b"what was written after the last progress")
            (out / "train-00099.bin").write_bytes(b"1234")
    assert stops > 5
    assert folder_bytes(tmp_path / "calm") == folder_bytes(out)


def test_killed_during_a_rename_or_the_cleanup(tmp_path):
    """The state that SIGKILL leaves between writing and renaming a file, and between the metadata and the cleanup."""
    source = LocalText(jsonl(tmp_path / "a.jsonl", TEXTS))
    prepare(source, tmp_path / "calm", PrepareSettings())
    out = tmp_path / "killed"

    def stop(stage):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, PrepareSettings(max_tokens=10), stop)
    (out / ".meta.json.host.12.34.tmp").write_text("{")
    prepare(source, out, PrepareSettings(max_tokens=10))
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train-00000.bin", "validation-00000.bin"]
    finished = tmp_path / "calm"
    before = folder_bytes(finished)
    (finished / "progress.json").write_text("{}")
    (finished / "seen.hashes").write_bytes(b"0" * 16)
    prepare(source, finished, PrepareSettings())
    assert folder_bytes(finished) == before


def test_a_different_command_does_not_resume_it(tmp_path):
    source = LocalText(jsonl(tmp_path / "a.jsonl", TEXTS))
    out = tmp_path / "out"
    prepare(source, out, PrepareSettings())
    with pytest.raises(UserError, match="already contains a finished preparation"):
        prepare(source, out, PrepareSettings())
    (out / "meta.json").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        prepare(source, tmp_path / "other", PrepareSettings())
    assert (tmp_path / "other" / "thesis.tex").exists()


def bad_utf8(path: Path) -> Path:
    lines = b"".join(b"good text %d\n\n" % i for i in range(10))
    (path / "bad.txt").write_bytes(lines + b"bad \xff byte")
    return path / "bad.txt"


def half_json(path: Path) -> Path:
    (path / "half.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    return path / "half.jsonl"


def no_column(path: Path) -> Path:
    (path / "c.jsonl").write_text('{"body": "one"}\n')
    return path / "c.jsonl"


def not_parquet(path: Path) -> Path:
    (path / "p.parquet").write_bytes(b"PAR1 not really")
    return path / "p.parquet"


def empty_file(path: Path) -> Path:
    (path / "empty.txt").write_bytes(b"")
    return path / "empty.txt"


def blank_file(path: Path) -> Path:
    (path / "blank.txt").write_bytes(b" \n\n \n" * 100)
    return path / "blank.txt"


def empty_folder(path: Path) -> Path:
    (path / "nothing").mkdir()
    return path / "nothing"


def mixed_encodings(path: Path) -> Path:
    (path / "mixed").mkdir()
    (path / "mixed" / "a.txt").write_text("fine", encoding="utf-8")
    (path / "mixed" / "b.txt").write_text("gr\u00fc\u00df", encoding="utf-16")
    return path / "mixed"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_utf8, "not UTF-8.*0xff near offset 134"),
        (half_json, "line 2 is not valid JSON"),
        (no_column, "text_column='text' has no text.*The row has: body"),
        (not_parquet, "cannot be read as Parquet"),
        (empty_file, "the train split is empty after"),
        (blank_file, "the train split is empty after"),
        (empty_folder, "contains no file that ends in"),
        (mixed_encodings, "b.txt' is not UTF-8"),
        (lambda path: path / "missing.txt", "there is no such file"),
    ],
)
def test_bad_text_is_one_clear_error(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as caught:
        prepare(LocalText(make(tmp_path)), tmp_path / "out", PrepareSettings())
    assert "\n" not in str(caught.value)


def test_replace_accepts_text_that_is_not_utf8(tmp_path):
    prepare(
        LocalText(bad_utf8(tmp_path), errors="replace"),
        tmp_path / "out",
        PrepareSettings(validation_fraction=0.5),
    )


def test_one_giant_line_is_cut_and_kept_whole(tmp_path):
    path = tmp_path / "giant.txt"
    line = "".join(random.Random(1).choices("abcdefgh ", k=5_000_000))
    path.write_text(line)
    prepare(LocalText(path), tmp_path / "out", PrepareSettings(validation_fraction=0.3))
    source = Prepared(str(tmp_path / "out"))
    parts = [*documents_of(source, "train", 256), *documents_of(source, "validation", 256)]
    assert len(parts) >= 4
    assert sum(map(len, parts)) == len(line)
    assert all(part.decode() in line for part in parts)


def test_the_command_ends_with_the_next_command(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    done = subprocess.run(command(path, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.rstrip().splitlines()[-1].startswith("next: scaling-lab plan sweep=out data=prepared")
    nothing = subprocess.run(command(path, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert nothing.stderr.count("\n") == 1


def test_a_published_tokenizer_neither_truncates_nor_pads_documents(tmp_path):
    """Tokenizer files of encoder models set an input length, which is ignored for documents."""
    from tokenizers import Tokenizer

    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    settings = PrepareSettings(tokenizer="bpe", vocab_size=300, validation_fraction=0.2)
    prepare(LocalText(path), tmp_path / "plain", settings)
    cut = Tokenizer.from_file(str(tmp_path / "plain" / "tokenizer.json"))
    cut.enable_truncation(5)
    cut.enable_padding(length=9)
    cut.save(str(tmp_path / "cut.json"))
    prepare(LocalText(path), tmp_path / "out", replace(settings, tokenizer=str(tmp_path / "cut.json")))
    for split in ("train", "validation"):
        wanted, found = (np.asarray(Prepared(str(tmp_path / n)).tokens(split)) for n in ("plain", "out"))
        np.testing.assert_array_equal(found, wanted)
