"""Tests of reading tables: formats, renames, filters, and errors that name the file, the column and a near match."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_lab.analysis.data.table_observations import from_table
from scaling_lab.analysis.data.tables.table import read_table
from scaling_lab.core.errors import UserError


def frame(n: int = 8) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    params = np.geomspace(1e7, 1e9, n)
    return pd.DataFrame(
        {
            "run_id": [f"r{i}" for i in range(n)],
            "params": params,
            "tokens": 20 * params,
            "flops": 120 * params**2,
            "loss": 3.0 + rng.random(n),
            "data set": ["c4", "pile"] * (n // 2),
        }
    )


@pytest.mark.parametrize(
    "kind", ["csv", "parquet", "json", "jsonl", "columns.json", "lines.json", "csv.gz", "tsv"]
)
def test_every_format_gives_the_same_observations(tmp_path: Path, kind: str) -> None:
    data, path = frame(), tmp_path / f"t.{kind}"
    if kind in ("csv", "csv.gz"):
        data.to_csv(path, index=False)
    elif kind == "tsv":
        data.to_csv(path, index=False, sep="\t")
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "columns.json":
        path.write_text(json.dumps({c: data[c].tolist() for c in data}))
    else:
        data.to_json(path, orient="records", lines=kind in ("jsonl", "lines.json"))
    obs = from_table(read_table(path))
    np.testing.assert_allclose(obs.loss_nats[np.argsort(obs.n_params)], data.loss, rtol=1e-9)
    assert obs.n_runs == 8
    assert obs.n_params.dtype == np.float64


def test_nested_json_records_are_flattened_so_that_metrics_have_names(tmp_path: Path) -> None:
    records = [
        {"params": 1e8 * i, "tokens": 1e9, "loss": 3.0, "eval": {"code": 1.0 + i}} for i in range(1, 9)
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(records))
    obs = from_table(read_table(path, metric="eval.code"))
    np.testing.assert_allclose(sorted(obs.loss_nats), np.arange(2, 10))


def test_renames_and_filters(tmp_path: Path) -> None:
    data = frame().rename(columns={"loss": "val loss (nats)"})
    path = tmp_path / "t.csv"
    data.to_csv(path, index=False)
    table = read_table(path, columns={"loss": "val loss (nats)"}, where={"data set": "c4", "params.min": 2e7})
    assert len(table.frame) == 3
    assert list(table.row) == [3, 5, 7]  # rows of the file, the first row of data being 1


def test_a_filter_by_number_matches_however_it_is_written(tmp_path: Path) -> None:
    data = frame().assign(budget=[1e18, 6e18] * 4)
    path = tmp_path / "t.csv"
    data.to_csv(path, index=False)
    assert len(read_table(path, where={"budget": "6e18"}).frame) == 4
    assert len(read_table(path, where={"budget.max": 1e18}).frame) == 4


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        (
            {"columns": {"loss": "val_los"}},
            ["columns.loss=val_los", "t.csv", "Did you mean columns.loss=val_loss"],
        ),
        ({"columns": {"los": "val_loss"}}, ["columns.", "los", "loss"]),
        ({"where": {"datset": "c4"}}, ["where.datset", "t.csv", "dataset"]),
        ({"where": {"dataset": "c5"}}, ["where.dataset=c5", "no row", "8 rows"]),
        ({"where": {"params.min": "big"}}, ["where.params.min=big", "number"]),
        ({"where": {"params": "big"}}, ["where.params=big", "numbers"]),
        ({"metric": "valloss"}, ["metric=valloss", "metric=val_loss"]),
    ],
)
def test_errors_are_one_line_and_name_the_option(tmp_path: Path, kwargs: dict, parts: list[str]) -> None:
    path = tmp_path / "t.csv"
    frame().rename(columns={"loss": "val_loss", "data set": "dataset"}).to_csv(path, index=False)
    with pytest.raises(UserError) as error:
        read_table(path, **kwargs)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(UserError, match=r"runs\.csv"):
        read_table(tmp_path / "rums.csv")
    with pytest.raises(UserError, match="is a directory"):
        read_table(tmp_path)
    (tmp_path / "runs.xlsx").write_text("")
    with pytest.raises(UserError, match="xlsx"):
        read_table(tmp_path / "runs.xlsx")


@pytest.mark.parametrize("text", ["", "params,tokens,loss\n", "not, a\n table,,,,,\n1"])
def test_a_file_without_a_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError):
        from_table(read_table(path))


def test_broken_json_and_parquet_are_refused(tmp_path: Path) -> None:
    for name in ("t.json", "t.jsonl", "t.parquet"):
        (tmp_path / name).write_text("{broken")
        with pytest.raises(UserError, match="could not be read"):
            read_table(tmp_path / name)
