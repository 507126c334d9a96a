"""Tests of "any table": real files of every kind that people have, and random ones. Either there is an analysis that is
valid JSON by its schema, or one line that says what is wrong; never a traceback, never a NumPy warning."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze, read_observations
from scaling_lab.analysis.data import table_files
from scaling_lab.analysis.data.observations import Observations, from_table
from scaling_lab.analysis.data.tables import read_table, table_from_mapping
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.core.errors import UserError

SCHEMA = json.loads(
    resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
PLAIN = AnalysisSettings(bootstrap=BootstrapSettings(resamples=0), profile=False)


def grid(budgets: int = 4, sizes: int = 6) -> pd.DataFrame:
    """An IsoFLOP grid from the Chinchilla law, exact."""
    rows = []
    for i, c in enumerate(np.geomspace(1e18, 1e21, budgets)):
        for j, n in enumerate(0.1 * c**0.5 * np.geomspace(0.25, 4, sizes)):
            d = c / (6 * n)
            loss = 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28
            rows.append((f"b{i}s{j}", round(n), d, 6 * round(n) * d, loss))
    return pd.DataFrame(rows, columns=["run_id", "params", "tokens", "flops", "loss"])


def read(path: Path, **options: Any) -> Observations:
    """Observations of a file, warnings being errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_observations(path, AnalysisSettings(**options))


def analysed(obs: Observations, s: AnalysisSettings = PLAIN) -> Analysis:
    """The analysis, warnings being errors and its JSON valid."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis = analyze(obs, s)
        data = json.loads(json.dumps(analysis.to_json_dict("x"), allow_nan=False))
    error = next(VALIDATOR.iter_errors(data), None)
    assert error is None, error
    return analysis


def refused(path: Path, **options: Any) -> str:
    """The one line for a file that cannot be analysed."""
    with pytest.raises(UserError) as found:
        analysed(read(path, **options))
    return one_line(str(found.value))


def one_line(text: str) -> str:
    """A message that fits on a terminal."""
    assert "\n" not in text
    assert 10 < len(text) < 1500
    return text


def same_numbers(obs: Observations, frame: pd.DataFrame | None = None) -> None:
    """The grid came through whole, in any order."""
    wanted = grid() if frame is None else frame
    assert obs.n_points == len(wanted)
    np.testing.assert_allclose(np.sort(obs.loss_nats), np.sort(wanted["loss"]), rtol=1e-7)
    np.testing.assert_allclose(np.sort(obs.compute_flops), np.sort(wanted["flops"]), rtol=1e-7)
    assert not obs.dropped


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


def test_a_row_with_too_many_cells_is_dropped_alone(tmp_path: Path) -> None:
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


def test_a_bad_line_of_json_lines_is_dropped_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(r) for r in grid().to_dict(orient="records")]
    path.write_text("\n".join([*lines[:3], "[1, 2]", *lines[3:], '{"params": 1e8, "tok']))
    obs = read(path)
    assert obs.n_points == len(grid())
    assert [d.row for d in obs.dropped] == [4, len(grid()) + 2]
    assert any("2 line(s) are not JSON objects" in w and "line 4" in w for w in obs.warnings)


def test_large_json_lines_take_the_fast_way_to_the_same_table(
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
    # Without a text that looks like a time Arrow's reader is used.
    path.write_text("\n".join(json.dumps({k: v for k, v in r.items() if k != "when"}) for r in records))
    with monkeypatch.context() as patched:
        patched.setattr(table_files.json, "loads", forbidden)  # as the other reader does
        same_numbers(read(path))


def test_a_column_that_begins_late_in_large_json_lines_is_read(
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
    assert analysed(obs).estimate("parametric").frontier is not None


def test_single_missing_cells_are_derived_only_where_one_way_of_counting_holds(tmp_path: Path) -> None:
    g = grid()
    g.loc[3, "flops"] = np.nan
    g.loc[7, "tokens"] = np.nan
    path = tmp_path / "t.csv"
    g.to_csv(path, index=False)
    obs = read(path)
    same_numbers(obs, grid())
    assert any("flops is missing in 1 row(s); computed as 6 params tokens" in w for w in obs.warnings)
    g["flops"] *= 1.3  # attention and head are in them: a derived one would not be
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


def test_every_bad_row_is_dropped_with_its_reason_and_the_rest_is_analysed(tmp_path: Path) -> None:
    g = grid().astype(object)
    bad: dict[int, tuple[str, Any, str]] = {
        0: ("loss", np.nan, "loss is missing"),
        1: ("loss", "diverged", "loss is not a number: 'diverged'"),
        2: ("loss", -1.0, "loss is not positive: -1.0"),
        3: ("params", 0, "params is not positive: 0"),
        4: ("tokens", "inf", "tokens is not finite: inf"),
        5: ("tokens", "1e300", "tokens is out of range: 1e+300 (must be 1e-60 to 1e+60)"),
        6: ("loss", "n/a", "loss is missing"),
        7: ("params", "70M", "params is not a number: '70M'"),
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
    data = analysed(obs).to_json_dict("x")
    assert data["observations"]["n_dropped"] == len(bad)
    assert "strict=true" in refused(path, strict=True)


def test_duplicates_are_kept_and_reported(tmp_path: Path) -> None:
    g = grid()
    path = tmp_path / "t.csv"
    pd.concat([g, g.iloc[:3]]).to_csv(path, index=False)
    obs = read(path, points="all")
    assert obs.n_points == len(g) + 3
    assert any("3 exact duplicate row(s) are kept" in w for w in obs.warnings)
    # The same numbers under another run id, or with an unnamed run, are no duplicates of a named one.
    other = pd.concat([g, g.iloc[:3].assign(run_id=["x", "y", None])])
    other.to_csv(path, index=False)
    assert not any("duplicate" in w for w in read(path).warnings)


def test_numbers_in_millions_and_billions_are_noticed(tmp_path: Path) -> None:
    g = grid()
    g["params"] /= 1e6
    g["tokens"] /= 1e9
    path = tmp_path / "t.csv"
    g.to_csv(path, index=False)
    obs = read(path)
    assert any("flops is about 1e+15 times 6 params tokens" in w for w in obs.warnings)
    assert not any(
        "times 6 params tokens" in w for w in from_table(table_from_mapping(dict(grid()))).warnings
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
    frontier = analysed(obs).estimate("envelope").frontier
    assert frontier is not None
    assert frontier.params.exponent == pytest.approx(0.28 / 0.62, abs=0.02)


# -- tables in which little or nothing can be fitted


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
def test_a_table_with_nothing_to_fit_says_what_is_missing(
    tmp_path: Path, change: dict[str, Any], parts: list[str]
) -> None:
    g = grid().drop(columns=[c for c, v in change.items() if v is None])
    path = tmp_path / "t.csv"
    g.assign(**{c: v for c, v in change.items() if v is not None}).to_csv(path, index=False)
    text = refused(path)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "kind", ["one run", "one budget", "one size", "equal losses", "six rows", "one C a run", "all the same"]
)
def test_poor_tables_are_analysed_as_far_as_they_go(kind: str) -> None:
    g = grid()
    g = {
        "one run": g.assign(run_id="a", params=1e8, flops=lambda t: 6e8 * t["tokens"]),
        "one budget": grid(1, 9),
        "one size": g.assign(params=1e8, flops=lambda t: 6e8 * t["tokens"]),
        "equal losses": g.assign(loss=2.5),
        "six rows": g.iloc[:6],
        "one C a run": pd.concat([g, g]),
        "all the same": pd.concat([g.iloc[:1]] * 8),
    }[kind]
    for points in ("final", "all"):
        try:
            obs = from_table(table_from_mapping({c: g[c].to_numpy() for c in g}))
            # Bootstrapped once: the slow part is the same for both.
            resamples = 20 if points == "final" else 0
            s = AnalysisSettings(
                points=points,  # type: ignore[arg-type]
                bootstrap=BootstrapSettings(resamples=resamples),
                profile=False,
                backtest=False,
            )
            analysis = analysed(obs, s)
        except UserError as error:
            one_line(str(error))
        else:
            assert all(e.message for e in analysis.estimates)


# -- anything at all


CELLS = st.one_of(
    st.floats(min_value=1e-3, max_value=1e25),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-5, 2**63),
    st.sampled_from(["", "x", "nan", "1e9", "3,5", "∞", None, True, "-"]),
)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Columns of a small table: mostly a plausible grid, with noise, holes, nonsense and missing columns."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(0, 30))
    sizes = np.exp(rng.uniform(np.log(1e3), np.log(1e11), draw(st.integers(1, 7))))
    budgets = np.exp(rng.uniform(np.log(1e10), np.log(1e24), draw(st.integers(1, 4))))
    params, flops = rng.choice(sizes, n), rng.choice(budgets, n)
    tokens = flops / (6 * params)
    if draw(st.booleans()):
        flops = flops * np.exp(rng.normal(0, draw(st.sampled_from([0.01, 0.5])), n))
    loss = 1.7 + 400 * params**-0.34 + 410 * tokens**-0.28
    loss *= np.exp(rng.normal(0, draw(st.sampled_from([0.0, 1e-3, 0.1, 2.0])), n))
    columns: dict[str, Any] = {"params": params, "tokens": tokens, "flops": flops, "loss": loss}
    if draw(st.booleans()):
        columns["run_id"] = [f"r{k}" for k in rng.integers(0, max(1, n // draw(st.integers(1, 5))), n)]
    if draw(st.booleans()):
        columns["loss_sem"] = np.abs(rng.normal(0, 0.01, n))
    if draw(st.booleans()):
        columns["budget_flops"] = rng.choice([*budgets, np.nan], n)
    for name in draw(st.lists(st.sampled_from(sorted(columns)), max_size=2)):
        cells = [*np.asarray(columns[name], dtype=object)]
        for _ in range(draw(st.integers(0, 3)) if n else 0):
            cells[draw(st.integers(0, n - 1))] = draw(CELLS)
        columns[name] = cells
    columns.pop(draw(st.sampled_from(["", "params", "tokens", "flops", "loss", "none"])), None)
    return columns


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    columns=tables(),
    points=st.sampled_from(["final", "all"]),
    resamples=st.sampled_from([0, 20]),
    unit=st.sampled_from(["auto", "run", "row", "budget", "residual"]),
    weights=st.sampled_from([None, None, "loss_sem"]),
)
def test_a_random_table_is_analysed_or_refused(
    columns: dict[str, Any], points: Any, resamples: int, unit: Any, weights: str | None
) -> None:
    s = AnalysisSettings(
        points=points,
        bootstrap=BootstrapSettings(resamples=resamples, unit=unit),
        weights=weights,
        profile=False,
        metrics=("loss",),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            obs = from_table(table_from_mapping(columns))
        analysed(obs, s)
    except UserError as error:
        one_line(str(error))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cells=st.lists(st.lists(st.text(max_size=6) | CELLS.map(str), min_size=1, max_size=6), max_size=12),
    ending=st.sampled_from(["csv", "tsv", "json", "jsonl"]),
    separator=st.sampled_from([",", ";", "\t", " "]),
    raw=st.binary(max_size=20),
)
def test_a_random_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]], ending: str, separator: str, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"t.{ending}"
    head = separator.join(["params", "tokens", "loss", "x"])
    body = [separator.join(row) for row in cells]
    if ending.startswith("json"):
        body = [json.dumps(dict(zip(["params", "tokens", "loss"], row))) for row in cells]
        head = ""
    path.write_bytes("\n".join([head, *body]).encode("utf-8", errors="surrogatepass") + raw)
    try:
        read(path)
    except UserError as error:
        one_line(str(error))
