"""Tests of "any table": files of every kind that people have. Either there is an analysis that is valid JSON by its schema, or
one line that says what is wrong; never a traceback, never a NumPy warning. Random ones: test_random_tables.py."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.tables import (
    PLAIN,
    QUICK,
    analyzed,
    assert_the_laws_numbers,
    grid,
    read,
    refused,
    same_numbers,
)
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.table_observations import from_table
from scaling_lab.analysis.data.tables import files as table_files
from scaling_lab.analysis.data.tables.table import read_table, table_from_frame
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings

# -- files


CSV_DIALECTS: dict[str, Any] = {
    "a byte order mark": lambda t: ("\ufeff" + t).encode(),
    "UTF-16": lambda t: t.encode("utf-16"),
    "UTF-16 big-endian": lambda t: b"\xfe\xff" + t.encode("utf-16-be"),
    "Latin-1 beside the numbers": lambda t: t.replace("b0s0", "modèle").encode("latin-1"),
    "semicolons": lambda t: t.replace(",", ";").encode(),
    "semicolons and decimal commas": lambda t: t.replace(",", ";").replace(".", ",").encode(),
    "tabs": lambda t: t.replace(",", "\t").encode(),
    "bars": lambda t: t.replace(",", "|").encode(),
    "Windows line ends": lambda t: t.replace("\n", "\r\n").encode(),
    "blank lines": lambda t: t.replace("\n", "\n\n").encode(),
    "blanks after commas": lambda t: t.replace(",", ", ").encode(),
    "quotes": lambda t: "\n".join(
        ",".join(f'"{c}"' for c in x.split(",")) for x in t.split("\n")[:-1]
    ).encode(),
    "a comma after every row": lambda t: "\n".join(
        x + ("," if i else "") for i, x in enumerate(t.split("\n")[:-1])
    ).encode(),
    "row names without a header": lambda t: "\n".join(
        (f'"{i}",' if i else "") + x for i, x in enumerate(t.split("\n")[:-1])
    ).encode(),
    "no end of the last line": lambda t: t.rstrip("\n").encode(),
}


@pytest.mark.parametrize("dialect", CSV_DIALECTS)
def test_a_csv_in_any_dialect_is_the_same_table(tmp_path: Path, dialect: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(CSV_DIALECTS[dialect](grid().to_csv(index=False)))
    obs = read(path)
    same_numbers(obs)
    assert obs.n_runs == len(grid())
    assert table_files.header_names(path)[:5] == list(grid())


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_compressed_files(tmp_path: Path, ending: str, kind: str) -> None:
    text = grid().to_csv(index=False) if kind == "csv" else grid().to_json(orient="records", lines=True)
    data = text.encode()
    packed = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda d: pa.Codec("zstd").compress(d, asbytes=True),
    }[ending](data)
    path = tmp_path / f"t.{kind}.{ending}"
    path.write_bytes(packed)
    same_numbers(read(path))


def test_only_a_row_with_too_many_cells_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = grid().to_csv(index=False).splitlines()
    lines[4] += ",1,2"
    path.write_text("\n".join(lines))
    obs = read(path)
    assert obs.n_points == len(grid()) - 1
    assert [d.row for d in obs.dropped] == [4]
    assert any("1 row(s) have more cells than the header's 5" in w for w in obs.warnings)


def test_json_in_every_form(tmp_path: Path) -> None:
    g = grid()
    records = g.to_dict(orient="records")
    texts = {
        "records.json": json.dumps(records),
        "columns.json": json.dumps({c: g[c].tolist() for c in g}),
        "wrapped.json": json.dumps({"runs": records, "made": "today"}),
        "lines.json": "\n".join(map(json.dumps, records)),
        "lines.jsonl": "\n".join(map(json.dumps, records)) + "\n",
        "bom.json": "\ufeff" + json.dumps(records),
        "indented.json": json.dumps(records, indent=2),
        "nested.ndjson": "\n".join(
            json.dumps({"run_id": r.pop("run_id"), "m": r}) for r in map(dict, records)
        ),
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        nested = name.startswith("nested")
        columns = {c: f"m.{c}" for c in ("params", "tokens", "flops", "loss")} if nested else {}
        same_numbers(read(path, columns=columns))


def test_only_a_bad_line_of_json_lines_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(r) for r in grid().to_dict(orient="records")]
    path.write_text("\n".join([*lines[:3], "[1, 2]", *lines[3:], '{"params": 1e8, "tok']))
    obs = read(path)
    assert obs.n_points == len(grid())
    assert [d.row for d in obs.dropped] == [4, len(grid()) + 2]
    assert any("2 line(s) are not JSON objects" in w and "line 4" in w for w in obs.warnings)


def test_the_fast_reader_of_large_json_lines_gives_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    records = [
        {"run_id": r["run_id"], "when": "2026-01-01", "eval": {"code": 1.5}, **r}
        for r in grid().to_dict(orient="records")
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    slow = read_table(path, where={"when": "2026-01-01"})
    monkeypatch.setattr(table_files, "LARGE_JSON_BYTES", 0)
    fast = read_table(path, where={"when": "2026-01-01"})
    assert sorted(slow.names) == sorted(fast.names)
    for name in ("params", "loss", "eval.code"):
        np.testing.assert_array_equal(slow.numbers(name), fast.numbers(name))
    # Arrow's reader is used if no text looks like a time.
    path.write_text("\n".join(json.dumps({k: v for k, v in r.items() if k != "when"}) for r in records))
    with monkeypatch.context() as patched:
        patched.setattr(table_files.json, "loads", forbidden)  # as the other reader does
        same_numbers(read(path))


def test_a_column_that_starts_late_in_large_json_lines_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "LARGE_JSON_BYTES", 0)
    path = tmp_path / "t.jsonl"
    records = grid().to_dict(orient="records")
    filler = [{"note": "x" * 1000}] * 5000  # more than one block
    late = {**records[-1], "eval": {"code": 2.5}}
    path.write_text("\n".join(map(json.dumps, [*filler, *records[:-1], late])))
    table = read_table(path)
    assert table.numbers("eval.code")[-1] == 2.5
    obs = read(path)
    assert obs.n_points == len(records)
    assert len(obs.dropped) == len(filler)


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be called")


def test_parquet_of_every_type(tmp_path: Path) -> None:
    g = grid()
    path = tmp_path / "t.parquet"
    g.set_index("run_id").to_parquet(path)  # the index is a column too
    assert read(path).n_runs == len(g)
    g.assign(params=g["params"].astype("Int64"), loss=g["loss"].astype("float32")).to_parquet(path)
    assert read(path).n_points == len(g)
    table = pa.table({c: g[c] for c in g}).set_column(0, "run_id", pa.array(g["run_id"]).dictionary_encode())
    pa.parquet.write_table(table.append_column("loss", table["loss"]), path)  # two columns of one name
    same_numbers(read(path))
    pa.parquet.write_table(
        table.append_column("tags", pa.array([["a"]] * len(g))).append_column(
            "when", pa.array([0] * len(g), pa.timestamp("s"))
        ),
        path,
    )
    same_numbers(read(path))
    assert "loss is not a number" in refused(path, columns={"loss": "when"})
    assert "loss is not a number" in refused(path, columns={"loss": "tags"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b""),
        ("t.csv", b"\x00\x01\x02\xff\xfe" * 50),
        ("t.csv", b"params,tokens,loss\n"),
        ("t.csv", b"just some words\nand more, of them\n"),
        ("t.csv", b'params,tokens,loss\n1,2,"3\n1,2,3\n'),
        ("t.tsv", b"\n\n\n"),
        ("t.json", b""),
        ("t.json", b"null"),
        ("t.json", b"[]"),
        ("t.json", b"[1, 2, 3]"),
        ("t.json", b'{"a": 1}'),
        ("t.json", b'{"a": [1, 2], "b": [1]}'),
        ("t.json", b"[" * 100_000),
        ("t.json", b'[{"params": 1}'),
        ("t.jsonl", b"nonsense\nmore\n"),
        ("t.jsonl", b"\xff\xfe\x00"),
        ("t.parquet", b"PAR1"),
        ("t.parquet", b""),
        ("t.csv.gz", b"not gzip"),
        ("t.json.xz", b"not xz"),
    ],
)
def test_files_without_a_table_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert name in refused(path)


# -- columns and cells


NAMES = {"params": "N (non-emb) / 1", "tokens": "#tokens = D", "flops": "C [FLOP]", "loss": "eval/loss, nats"}


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_column_names_with_anything_in_them(tmp_path: Path, kind: str) -> None:
    g = grid().rename(columns=NAMES)
    path = tmp_path / f"my file (1) = 2.{kind}"
    if kind == "csv":
        g.to_csv(path, index=False)
    elif kind == "parquet":
        g.to_parquet(path)
    else:
        g.to_json(path, orient="records", lines=True)
    same_numbers(read(path, columns=NAMES))
    assert "columns.loss" in refused(path) or "columns.params" in refused(path)


@pytest.mark.parametrize("missing", ["params", "tokens", "flops"])
def test_the_missing_one_of_params_tokens_flops_is_derived(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "t.csv"
    grid().drop(columns=missing).to_csv(path, index=False)
    obs = read(path)
    same_numbers(obs)
    assert any(w.startswith(f"{missing} is not in the table; computed as") for w in obs.warnings)
    assert_the_laws_numbers(analyzed(obs, QUICK))


def test_single_missing_cells_are_derived_only_if_flops_are_six_n_d(tmp_path: Path) -> None:
    g = grid()
    g.loc[3, "flops"] = np.nan
    g.loc[7, "tokens"] = np.nan
    path = tmp_path / "t.csv"
    g.to_csv(path, index=False)
    obs = read(path)
    same_numbers(obs, grid())
    assert any("flops is missing in 1 row(s); computed as 6 params tokens" in w for w in obs.warnings)
    g["flops"] *= 1.3  # with attention and head, unlike a derived value
    g.to_csv(path, index=False)
    dropped = {d.row: d.reason for d in read(path).dropped}
    assert dropped == {4: "flops is missing", 8: "tokens is missing"}


def test_integers_do_not_overflow(tmp_path: Path) -> None:
    g = grid().assign(params=lambda t: t["params"].astype("int64") * 10**6)
    g["tokens"] = 10**13
    path = tmp_path / "t.parquet"
    g.drop(columns="flops").astype({"params": "int64", "tokens": "int64"}).to_parquet(path)
    obs = read(path)
    np.testing.assert_allclose(obs.compute_flops, 6.0 * g["params"].to_numpy(float) * 1e13)
    assert obs.compute_flops.min() > 2**63


def test_every_bad_row_is_dropped_with_its_reason_and_the_rest_is_analyzed(tmp_path: Path) -> None:
    g = grid().astype(object)
    bad: dict[int, tuple[str, Any, str]] = {
        0: ("loss", np.nan, "loss is missing"),
        1: ("loss", "diverged", "loss is not a number: 'diverged'"),
        2: ("loss", -1.0, "loss is not positive: -1.0"),
        3: ("params", 0, "params is not positive: 0"),
        4: ("tokens", "inf", "tokens is not finite: inf"),
        5: ("tokens", "1e300", "tokens is out of range: 1e+300 (must be 1e-60 to 1e+60)"),
        6: ("loss", "n/a", "loss is missing"),
        7: ("params", "70X", "params is not a number: '70X'"),
        8: ("loss", "1e-200", "loss is out of range: 1e-200 (must be 1e-60 to 1e+60)"),
        9: ("flops", "two\nlines", "flops is not a number: 'two lines'"),
    }
    for at, (column, value, _) in bad.items():
        g.loc[at, column] = value
    path = tmp_path / "t.csv"
    g.to_csv(path, index=False)
    obs = read(path)
    assert [(d.row, d.reason) for d in obs.dropped] == [(at + 1, why) for at, (_, _, why) in bad.items()]
    assert obs.n_points == len(g) - len(bad)
    analysis = analyzed(obs)
    assert_the_laws_numbers(analysis, ("parametric",))
    data = analysis.to_json_dict("x")
    assert data["observations"]["n_dropped"] == len(bad)
    assert "strict=true" in refused(path, strict=True)


def test_duplicates_are_kept_and_reported(tmp_path: Path) -> None:
    g = grid()
    path = tmp_path / "t.csv"
    pd.concat([g, g.iloc[:3]]).to_csv(path, index=False)
    obs = read(path, points="all")
    assert obs.n_points == len(g) + 3
    assert any("3 exact duplicate row(s) are kept" in w for w in obs.warnings)
    # The same numbers under another run id, or of an unnamed run, do not duplicate a named one.
    other = pd.concat([g, g.iloc[:3].assign(run_id=["x", "y", None])])
    other.to_csv(path, index=False)
    assert not any("duplicate" in w for w in read(path).warnings)


def test_numbers_in_millions_and_billions_are_noticed(tmp_path: Path) -> None:
    g = grid()
    g["params"] /= 1e6
    g["tokens"] /= 1e9
    path = tmp_path / "t.csv"
    g.to_csv(path, index=False)
    assert "units.params=M units.tokens=B" in refused(path)
    obs = read(path, units={"params": 1, "tokens": 1})
    assert any("flops is about 1e+15 times 6 params tokens" in w for w in obs.warnings)
    assert not any(
        "times 6 params tokens" in w for w in from_table(table_from_frame(grid(), "table")).warnings
    )


def test_several_curves_make_an_envelope(tmp_path: Path) -> None:
    rows = [
        (f"w{n:.0f}", n, d, 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28)
        for n in np.geomspace(1e6, 1e9, 9)
        for d in np.geomspace(1e8, 1e11, 30)
    ]
    path = tmp_path / "t.csv"
    pd.DataFrame(rows, columns=["run_id", "params", "tokens", "loss"]).sample(frac=1, random_state=0).to_csv(
        path, index=False
    )
    obs = read(path)
    assert (obs.n_runs, obs.n_points) == (9, 270)
    frontier = analyzed(obs).estimate("envelope").frontier
    assert frontier is not None
    assert frontier.params.exponent == pytest.approx(0.28 / 0.62, abs=0.02)


# -- tables with too little data to fit


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"loss": None}, ["no column 'loss'", "columns.loss=NAME"]),
        ({"params": None, "tokens": None}, ["two of params, tokens and flops", "'params'"]),
        ({"params": None, "tokens": None, "flops": None}, ["two of params, tokens and flops"]),
        ({"loss": np.nan}, ["0 usable row(s) of 24", "loss is missing"]),
        ({"loss": "good"}, ["0 usable row(s) of 24", "'good'"]),
        ({"params": -1, "tokens": np.nan}, ["0 usable row(s)", "params is not positive"]),
    ],
)
def test_a_table_with_nothing_to_fit_names_what_is_missing(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    g = grid().drop(columns=[c for c, v in change.items() if v is None])
    path = tmp_path / "t.csv"
    g.assign(**{c: v for c, v in change.items() if v is not None}).to_csv(path, index=False)
    text = refused(path)
    for part in parts:
        assert part in text


TOO_POOR = {
    "one run": lambda: grid().assign(run_id="a", params=1e8, flops=lambda t: 6e8 * t["tokens"]),
    "one budget": lambda: grid(1, 9),
    "one size": lambda: grid().assign(params=1e8, flops=lambda t: 6e8 * t["tokens"]),
    "equal losses": lambda: grid().assign(loss=2.5),
    "six rows": lambda: grid().iloc[:6],
    "all the same": lambda: pd.concat([grid().iloc[:1]] * 8),
}


@pytest.mark.parametrize("points", ["final", "all"])
@pytest.mark.parametrize("kind", TOO_POOR)
def test_a_table_with_too_little_data_gets_no_exponent_and_a_reason(kind: str, points: str) -> None:
    s = replace(PLAIN, points=points, backtest=False, bootstrap=BootstrapSettings(resamples=20))
    analysis = analyzed(observations(TOO_POOR[kind]()), s)
    for estimate in analysis.estimates:
        assert estimate.frontier is None, estimate
        assert estimate.status in (FitStatus.NOT_APPLICABLE, FitStatus.NOT_IDENTIFIED)
        assert estimate.message
        assert analysis.band(estimate.approach).interval("params_exponent") is None
    assert "needs curves" in analysis.estimate("envelope").message
    assert "at least two budgets" in analysis.estimate("isoflop").message


@pytest.mark.parametrize("points", ["final", "all"])
def test_repeated_rows_of_a_run_are_not_a_curve(points: str) -> None:
    analysis = analyzed(observations(pd.concat([grid(), grid()])), replace(QUICK, points=points))
    assert "needs curves" in analysis.estimate("envelope").message
    assert_the_laws_numbers(analysis)


def observations(frame: pd.DataFrame) -> Observations:
    return from_table(table_from_frame(frame, "table"))
