"""How text becomes documents in every format: rows without text, giant rows, line ends, byte order marks; and
what is shown meanwhile."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.corpora import TEXTS, command, documents_of, folder_bytes, jsonl
from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.prepared import Prepared
from scaling_lab.corpora import pipeline, reading
from scaling_lab.corpora.documents import HubText, LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, Stage, prepare


def hub_of(folder: Path, rows: list[dict]) -> HubText:
    """A dataset in a local folder laid out as the hub stores it, read by the hub's loader."""
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return HubText(str(folder), None, "text")


def lines_of(path: Path, rows: list) -> LocalText:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return LocalText(path)


ROWS = [{"text": t if k % 5 else None, "n": k} for k, t in enumerate(TEXTS)]


@pytest.mark.parametrize("form", ["hub", "jsonl", "parquet"])
def test_rows_whose_text_is_null_are_left_out_and_counted(tmp_path, form):
    if form == "hub":
        source = hub_of(tmp_path / "hub", ROWS)
    elif form == "jsonl":
        source = lines_of(tmp_path / "a.jsonl", ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
        source = LocalText(tmp_path / "a.parquet")
    # They count in `skip`; otherwise a resumed preparation would read other rows.
    assert list(source.documents(skip=391)) == [r["text"] for r in ROWS[391:]]
    meta = prepare(source, tmp_path / "out", PrepareSettings(validation_fraction=0.2))
    assert meta["without_text"] == 80
    assert sum(meta["splits"][s]["documents"] for s in ("train", "validation")) == 320
    clean = lines_of(tmp_path / "clean.jsonl", [r for r in ROWS if r["text"] is not None])
    same = prepare(clean, tmp_path / "clean", PrepareSettings(validation_fraction=0.2))
    assert meta["content_sha256"] == same["content_sha256"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3}, {"text": 4}], r"text_column='text' has no text in '.*', row 0\. The row has: text"),
        ([{"body": "a"}], r"text_column='text' has no text in '.*', row 0\. The row has: body"),
    ],
)
def test_rows_of_the_hub_without_the_text_column_are_one_clear_error(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        list(hub_of(tmp_path / "hub", rows).documents())
    assert "\n" not in str(caught.value)


def test_a_row_that_is_not_text_is_named_beyond_the_first_thousand(tmp_path):
    table = pa.table({"text": pa.array([b"x"] * 2000 + [b"y"], pa.binary())})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(UserError, match="row 0. The row has: text"):
        list(LocalText(tmp_path / "b.parquet").documents())
    rows = [{"text": "x"}] * 2000 + [{"text": 5}]
    with pytest.raises(UserError, match="line 2001. The row has: text"):
        list(lines_of(tmp_path / "b.jsonl", rows).documents())


@pytest.mark.parametrize("form", ["hub", "jsonl", "parquet", "marks", "folder"])
def test_giant_documents_are_split_alike_in_every_format(tmp_path, form, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_CHARACTERS", 1000)
    # Reads end anywhere within documents, which must not change where documents are split.
    monkeypatch.setattr(reading, "READ_BYTES", 1531)
    rng = random.Random(2)
    texts = ["".join(rng.choices("abcdefgh ", k=k)) for k in (10, 1999, 2000, 2001, 7777, 30, 12_345)]
    rows = [{"text": t} for t in texts]
    if form == "hub":
        source = hub_of(tmp_path / "hub", rows)
    elif form == "jsonl":
        source = lines_of(tmp_path / "a.jsonl", rows)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        source = LocalText(tmp_path / "a.parquet")
    elif form == "marks":
        (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
        source = LocalText(tmp_path / "a.txt")
    else:
        (tmp_path / "folder").mkdir()
        for k, text in enumerate(texts):
            (tmp_path / "folder" / f"{k}.txt").write_text(text)
        source = LocalText(tmp_path / "folder")
    found = list(source.documents())
    sizes = [10, 1999, 2000, 1000, 1001, *[1000] * 6, 1777, 30, *[1000] * 11, 1345]
    assert [len(piece) for piece in found] == sizes
    assert "".join(found) == "".join(texts)
    assert list(source.documents(skip=7)) == found[7:]


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("single", [True, False])
def test_text_is_the_same_however_it_is_read(tmp_path, monkeypatch, read_bytes, single):
    """Two-character line ends, marks and multi-byte letters may span two reads; the byte order mark is not text."""
    monkeypatch.setattr(reading, "READ_BYTES", read_bytes)
    text = "first\r\nline\r\n\r\nca\u00f1\u00f3n \U0001f980\r\n\r\nlone \r return\r\n\r\r\nend\r"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = text.replace("\r\n", "\n")
    source = LocalText(folder / "a.txt" if single else folder)
    assert list(source.documents()) == (expected.split("\n\n") if single else [expected])


def test_a_byte_order_mark_before_json_lines_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert list(LocalText(tmp_path / "a.jsonl").documents()) == ["one", "two"]


def test_a_file_that_ends_within_a_character_is_one_clear_error(tmp_path):
    (tmp_path / "a.txt").write_bytes("abc caf\u00e9".encode()[:-1])
    with pytest.raises(UserError, match="not UTF-8 .*0xc3 near offset 7"):
        list(LocalText(tmp_path / "a.txt").documents())


def test_compressed_text_is_not_reported_as_wrongly_encoded(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match="is compressed: unpack it first"):
        LocalText(tmp_path / "a.txt.gz")


def test_a_published_vocabulary_with_holes(tmp_path):
    """The model has a row for the largest id, and the separator does not occur in the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"document": 0, "7": 40, "[unk]": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "holes.json"))
    source = LocalText(jsonl(tmp_path / "a.jsonl", TEXTS))
    settings = PrepareSettings(tokenizer=str(tmp_path / "holes.json"), validation_fraction=0.2)
    meta = prepare(source, tmp_path / "out", settings)
    assert meta["tokenizer"]["separator"] == 41
    assert Prepared(str(tmp_path / "out")).vocab_size == 42
    assert (
        len(documents_of(Prepared(str(tmp_path / "out")), "train", 41))
        == meta["splits"]["train"]["documents"]
    )


class Stop(Exception):
    pass


def interrupted(source: LocalText, out: Path, settings: PrepareSettings) -> None:
    """A preparation that was stopped after its first batch, with its progress saved."""

    def stop(stage):
        if stage.doing == pipeline.TOKENIZING:
            raise Stop

    with pytest.raises(Stop):
        prepare(source, out, settings, stop)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_DOCUMENTS", 30)
    monkeypatch.setattr(pipeline, "SAVE_EVERY_S", 0.0)


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_preparation_does_not_resume_with_other_text(tmp_path):
    path, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    interrupted(LocalText(path), out, PrepareSettings())
    with pytest.raises(UserError, match="started with text_column='text', but now it is 'body'"):
        prepare(LocalText(path, "body"), out, PrepareSettings())
    jsonl(path, TEXTS[1:])
    with pytest.raises(UserError, match=r"started before the files of a.jsonl were changed"):
        prepare(LocalText(path), out, PrepareSettings())


def test_a_failed_attempt_does_not_block_the_folder(tmp_path):
    """The error suggests another command, which must then work in the same folder."""
    (tmp_path / "bad.txt").write_bytes(b"good\n\nbad \xff\n\nbetter\n\n" * 50)
    path, out = tmp_path / "bad.txt", tmp_path / "out"
    with pytest.raises(UserError, match="give errors=replace"):
        prepare(LocalText(path), out, PrepareSettings(tokenizer="bpe", vocab_size=300))
    settings = PrepareSettings(validation_fraction=0.5)
    meta = prepare(LocalText(path, errors="replace"), out, settings)
    prepare(LocalText(path, errors="replace"), tmp_path / "calm", settings)
    assert meta["settings"]["tokenizer"] == "bytes"
    assert folder_bytes(out) == folder_bytes(tmp_path / "calm")


def test_max_tokens_can_end_within_a_batch(tmp_path):
    source = LocalText(jsonl(tmp_path / "a.jsonl", TEXTS))
    meta = prepare(source, tmp_path / "out", PrepareSettings(validation_fraction=0.2, max_tokens=2000))
    longest = max(map(len, TEXTS)) + 1
    assert 2000 <= meta["splits"]["train"]["tokens"] < 2000 + longest
    whole = prepare(source, tmp_path / "all", PrepareSettings(validation_fraction=0.2))
    few, all_of_them = (documents_of(Prepared(str(tmp_path / n)), "train", 256) for n in ("out", "all"))
    assert few == all_of_them[: len(few)]
    assert meta["splits"]["validation"] == whole["splits"]["validation"]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("form", ["jsonl", "parquet", "txt"])
def test_progress_is_the_share_of_the_files_bytes(tmp_path, form):
    """With repeated text that compresses well, neither stored bytes nor kept documents are proportional to progress."""
    texts = [t for t in TEXTS for _ in range(3)]
    if form == "parquet":
        pq.write_table(pa.table({"text": [t * 20 for t in texts]}), tmp_path / "a.parquet")
    elif form == "jsonl":
        jsonl(tmp_path / "a.jsonl", texts)
    else:
        (tmp_path / "a.txt").write_text("\n\n".join(texts))
    stages: list[Stage] = []
    settings = PrepareSettings(validation_fraction=0.9)
    prepare(LocalText(tmp_path / f"a.{form}"), tmp_path / "out", settings, stages.append)
    shares = [s.share for s in stages if s.doing == pipeline.TOKENIZING]
    assert len(shares) == 40
    assert shares[-1] == 1.0
    if form == "jsonl":
        assert 0.45 < shares[19] < 0.55
        assert all(a < b for a, b in itertools.pairwise(shares))


def test_training_a_bpe_is_shown(tmp_path, monkeypatch):
    from scaling_lab.corpora import tokenizing

    monkeypatch.setattr(tokenizing, "PROGRESS_EVERY_BYTES", 5000)
    source, stages = LocalText(jsonl(tmp_path / "a.jsonl", TEXTS)), []
    settings = PrepareSettings(tokenizer="bpe", vocab_size=300, tokenizer_mb=0.02, validation_fraction=0.2)
    prepare(source, tmp_path / "out", settings, stages.append)
    names = [name for name, _ in itertools.groupby(stage.doing for stage in stages)]
    assert names == [
        "reading",
        "reading text to train the BPE",
        "training the BPE",
        "tokenizing",
        "writing checksums",
    ]
    shares = [s.share for s in stages if s.doing == pipeline.READING_FOR_BPE]
    assert shares[0] == pytest.approx(0.25, abs=0.05)


def shown(stages: list[Stage], terminal: bool, *, quiet: bool = False) -> str:
    """What the display writes to stderr."""
    from rich.console import Console as RichConsole

    from scaling_lab.cli.display.console import Console
    from scaling_lab.cli.display.prepare_display import PrepareDisplay

    console, file = Console(quiet=quiet), io.StringIO()
    console.err = RichConsole(file=file, force_terminal=terminal, width=150, highlight=False)
    with PrepareDisplay.open(console, "books") as display:
        for stage in stages:
            display.show(stage)
    return file.getvalue()


STAGES = [
    Stage(pipeline.OPENING),
    Stage(pipeline.READING_FOR_BPE, 0, 0.5),
    Stage(pipeline.TRAINING_BPE),
    Stage(pipeline.TOKENIZING, 1_000_000, 0.25),
    Stage(pipeline.TOKENIZING, 2_000_000, 0.5),
    Stage(pipeline.CHECKSUMS, 4_000_000),
]


def test_a_terminal_shows_a_bar_with_speed_and_time_left():
    text = shown(STAGES[:-1], terminal=True)
    assert "\u2501" in text
    for word in ("books: tokenizing", "50%", "2M tokens", "tokens/s", "ETA"):
        assert word in text, word
    # The total is unknown, so no remaining time may be shown.
    assert "%" not in shown(STAGES, terminal=True).split("writing checksums")[-1]


def test_without_a_terminal_there_are_a_few_plain_lines(monkeypatch):
    from scaling_lab.cli.display import prepare_display

    assert shown(STAGES, terminal=False) == "books: training the BPE\n"
    assert shown([Stage(pipeline.OPENING, 10**9)], terminal=False) == "books: reading, 1B tokens\n"
    assert shown(STAGES, terminal=True, quiet=True) == shown(STAGES, terminal=False, quiet=True) == ""
    monkeypatch.setattr(prepare_display, "LINE_EVERY_S", 0.0)
    lines = shown(STAGES, terminal=False).splitlines()
    assert len(lines) == len(STAGES)
    assert "\x1b" not in "".join(lines)
    assert lines[4].startswith("books: tokenizing 50%, 2M tokens, ")
    assert "ETA" in lines[4]


def test_the_command_writes_no_bar_into_a_pipe_and_does_not_read_its_own_output(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    done = subprocess.run(command(path, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    argv = [sys.executable, "-m", "scaling_lab.cli.main", "prepare-data", "path=."]
    inside = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert inside.returncode == 2
    assert inside.stderr.count("\n") == 1
    assert "inside path='.'" in inside.stderr
