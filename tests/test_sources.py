"""Token sources: pysource on this machine's standard library, and token files."""

from __future__ import annotations

import numpy as np
import pytest

from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.pysource import SEPARATOR, PySource
from scaling_lab.core.sources.tokens import TokenFile


def documents(text: bytes) -> list[bytes]:
    return text.split(bytes([SEPARATOR]))[1:]


def test_pysource_is_real_text_split_by_file():
    source = PySource()
    train, validation = documents(source.text("train")), documents(source.text("validation"))
    assert len(source.text("train")) > 5e6
    assert 0.01 < len(validation) / (len(train) + len(validation)) < 0.12
    assert not set(train) & set(validation)
    everything = b"".join(train + validation)
    # Code that every Python has, and nothing of what is excluded.
    assert b"class OrderedDict(dict)" in everything
    assert b"class TestCase" in everything  # unittest itself is library code ...
    assert all(len(line) <= 2000 for doc in train[:50] for line in doc.split(b"\n"))


def test_pysource_leaves_out_tests_encodings_and_tables():
    from scaling_lab.core.sources.pysource import source_files

    names = [name for name, _ in source_files(False)]
    assert "stdlib/argparse.py" in names
    assert not [
        n for n in names if "/test/" in n or "/tests/" in n or "/encodings/" in n or "site-packages" in n
    ]


def test_pysource_is_deterministic_and_has_a_fingerprint():
    a, b = PySource(), PySource(split_seed=1)
    assert a.fingerprint() == PySource().fingerprint()
    assert a.fingerprint() != b.fingerprint()
    assert sorted(documents(a.text("train") + a.text("validation"))) == sorted(
        documents(b.text("train") + b.text("validation"))
    )


def test_pysource_tokens_are_its_bytes():
    source = PySource()
    tokens = source.tokens("validation")
    assert tokens.dtype == np.uint8
    assert tokens.tobytes() == source.text("validation")


def test_token_file_split_and_fingerprint(tmp_path):
    tokens = np.arange(1000) % 300
    np.save(tmp_path / "t.npy", tokens.astype(np.int64))
    tokens.astype(np.uint16).tofile(tmp_path / "t.bin")
    a = TokenFile(path=str(tmp_path / "t.npy"), vocab_size=300, validation_fraction=0.1)
    b = TokenFile(path=str(tmp_path / "t.bin"), vocab_size=300, validation_fraction=0.1)
    assert a.tokens("train").tolist() == tokens[:900].tolist()
    assert b.tokens("validation").tolist() == tokens[900:].tolist()
    assert a.fingerprint() == b.fingerprint()
    own = TokenFile(path=str(tmp_path / "t.npy"), validation_path=str(tmp_path / "t.bin"), vocab_size=300)
    assert own.n_tokens("train") == own.n_tokens("validation") == 1000


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (lambda p: None, {"path": ""}, "data.path is missing"),
        (lambda p: None, {}, "there is no such file"),
        (lambda p: p.write_bytes(b""), {}, "is empty"),
        (lambda p: p.write_bytes(b"abc"), {}, "not a multiple"),
        (
            lambda p: np.array([1, 2, 999, 3], np.uint16).tofile(p),
            {"vocab_size": 500},
            "token 999 at index 2",
        ),
        (lambda p: None, {"dtype": "float32"}, "data.dtype='float32'"),
        (lambda p: None, {"validation_fraction": 1.0}, "data.validation_fraction"),
        (lambda p: None, {"bytes_per_token": 0.0}, "data.bytes_per_token=0.0 must be positive, or null"),
        (lambda p: None, {"bytes_per_token": float("inf")}, "data.bytes_per_token=inf must be positive"),
    ],
)
def test_bad_token_files_are_one_clear_error(tmp_path, make, options, named):
    path = tmp_path / "t.bin"
    make(path)
    with pytest.raises(UserError, match=named) as error:
        TokenFile(**{"path": str(path), "vocab_size": 500, **options}).tokens("train")
    assert "\n" not in str(error.value)


def test_a_damaged_npy_file_is_one_clear_error(tmp_path):
    path = tmp_path / "t.npy"
    path.write_bytes(b"\x93NUMPY not really")
    with pytest.raises(UserError, match="cannot be read as tokens"):
        TokenFile(path=str(path)).tokens("train")
    np.save(path, np.zeros((3, 4)))
    with pytest.raises(UserError, match="expected a 1-d array of integers"):
        TokenFile(path=str(path)).tokens("train")


def test_parquet_tokens_are_those_of_the_array(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokens = np.random.default_rng(0).integers(0, 300, 1000)
    np.save(tmp_path / "t.npy", tokens.astype(np.uint16))
    flat, lists = tmp_path / "flat.parquet", tmp_path / "lists.parquet"
    pq.write_table(pa.table({"ids": tokens, "text": ["x"] * 1000}), flat, row_group_size=77)
    pq.write_table(pa.table({"n": [1] * 10, "ids": [part.tolist() for part in np.split(tokens, 10)]}), lists)
    sources = [
        TokenFile(str(tmp_path / "t.npy"), 300),
        TokenFile(str(flat), 300),
        TokenFile(str(lists), 300, column="ids"),
    ]
    assert len({s.fingerprint() for s in sources}) == 1
    assert sources[2].tokens("train").tolist() == tokens[:950].tolist()
    with pytest.raises(UserError, match="2 integer columns.*Choices: n, ids"):
        TokenFile(str(lists), 300).tokens("train")
    with pytest.raises(UserError, match="data.column='idz' is not known.*Choices: ids, n"):
        TokenFile(str(lists), 300, column="idz").tokens("train")
    with pytest.raises(
        UserError, match=r"has token \d+ at index \d+, outside the range of data.vocab_size=200"
    ):
        TokenFile(str(flat), 200).tokens("train")
    pq.write_table(pa.table({"ids": [1, None, 3]}), tmp_path / "holes.parquet")
    with pytest.raises(UserError, match="1 missing values"):
        TokenFile(str(tmp_path / "holes.parquet"), 300).tokens("train")
    (tmp_path / "no.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        TokenFile(str(tmp_path / "no.parquet"), 300).tokens("train")
