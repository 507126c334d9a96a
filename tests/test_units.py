"""Tests of the units of a table's columns: the same results as from a converted table, notes, and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest

from helpers.known_truth import Truth
from scaling_lab.analysis.analysis import AnalysisSettings, analyze, read_observations
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.tables.units import read_units
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError

LAW = Truth(0.34, 0.28)
LN2 = float(np.log(2.0))
# The factor of the unit of each column, and the option that sets it.
FACTORS = {
    "params": 1e6,
    "tokens": 1e9,
    "flops": 1e18,
    "budget_flops": 1e18,
    "unique_tokens": 1e9,
    "loss": LN2,
    "loss_sem": LN2,
    "code": LN2,
}
UNITS = {"params": "M", "tokens": "B", "flops": "1e18", "loss": "bits"}


def in_units() -> pd.DataFrame:
    """An IsoFLOP grid in millions of parameters, billions of tokens, 1e18 FLOPs and bits per token."""
    budget = np.repeat([1.0, 4.0, 16.0, 64.0], 6)
    n = np.tile(np.geomspace(40.0, 900.0, 6), 4) * np.repeat([1.0, 2.0, 4.0, 8.0], 6)
    d = budget * 1e18 / (6 * n * 1e6) / 1e9
    loss = LAW.loss(n * 1e6, d * 1e9) / LN2
    return pd.DataFrame(
        {
            "run_id": [f"r{i}" for i in range(n.size)],
            "params": n,
            "tokens": d,
            "flops": budget,
            "budget_flops": budget,
            "unique_tokens": d,
            "loss": loss + 0.002 * np.random.default_rng(0).standard_normal(n.size),
            "loss_sem": np.full(n.size, 0.01),
            "code": 0.8 * loss,
        }
    )


def converted(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{c: frame[c].astype(np.float64) * FACTORS[c] for c in FACTORS if c in frame})


def read(frame: pd.DataFrame, folder: Path, **settings: Any) -> Observations:
    path = folder / "t.csv"
    frame.to_csv(path, index=False)
    return read_observations(path, AnalysisSettings(**settings))


def assert_same(one: Observations, two: Observations) -> None:
    for name in ("n_params", "n_tokens", "compute_flops", "budget_flops", "loss_nats", "loss_sem_nats"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    for name in two.extra:
        np.testing.assert_array_equal(one.extra[name], two.extra[name], err_msg=name)


@pytest.mark.parametrize("missing", [None, "params", "tokens", "flops"])
def test_a_table_in_units_is_the_table_converted_beforehand(tmp_path: Path, missing: str | None) -> None:
    frame = in_units().drop(columns=[missing, "code"] if missing else "code")
    units = {k: v for k, v in UNITS.items() if k != missing}
    if missing == "flops":
        units["budget_flops"] = "1e18"
    if missing == "tokens":
        units["unique_tokens"] = "B"
    assert_same(read(frame, tmp_path, units=units), read(converted(frame), tmp_path))


def test_analyses_of_both_are_equal(tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "bootstrap": BootstrapSettings(resamples=40),
        "sensitivity": False,
        "backtest": False,
    }
    settings = AnalysisSettings(units=UNITS, metrics=("loss", "code"), weights="loss_sem", **common)
    plain = AnalysisSettings(metrics=("loss", "code"), weights="loss_sem", **common)
    one = analyze(read(in_units(), tmp_path, units=UNITS, metrics=("loss", "code")), settings).to_json_dict()
    two = analyze(read(converted(in_units()), tmp_path, metrics=("loss", "code")), plain).to_json_dict()
    units = one["observations"].pop("units")
    assert two["observations"].pop("units") == {}
    assert units["params"] == {"unit": "M", "factor": 1e6}
    assert units["flops"] == units["budget_flops"] == {"unit": "1e+18", "factor": 1e18}
    assert units["tokens"] == units["unique_tokens"] == {"unit": "B", "factor": 1e9}
    assert units["loss"] == units["loss_sem"] == units["code"] == {"unit": "bits", "factor": LN2}
    said = [w for w in one["observations"]["warnings"] if w.startswith("units: ")]
    assert said == [
        "units: params in M (1e+06), tokens in B (1e+09), flops in 1e+18, budget_flops in 1e+18, unique_tokens in B (1e+09),"
        " loss in bits per token, loss_sem in bits per token, code in bits per token."
    ]
    one["observations"]["warnings"].remove(said[0])
    assert one == two
    assert two["estimates"][1]["status"] == "converged"


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "code", "units": UNITS},
        {"metric": "code", "units": {**UNITS, "loss": "nats", "code": "bits"}},
        {"metrics": ("code",), "units": UNITS},
    ],
)
def test_units_of_other_loss_columns(tmp_path: Path, options: Mapping[str, Any]) -> None:
    """They have the unit of `loss` unless they have their own; text cells are read as before."""
    frame = in_units()
    if "metrics" in options:
        frame = frame.drop(columns="loss")
        frame["code"] = frame["code"].astype(object)
        frame.loc[3, "code"] = "lost"
    raw = read(
        converted(frame.drop(columns="code")).assign(code=pd.to_numeric(frame["code"], "coerce") * LN2),
        tmp_path,
        **{k: v for k, v in options.items() if k != "units"},
    )
    found = read(frame, tmp_path, **options)
    np.testing.assert_array_equal(found.loss_nats, raw.loss_nats)
    np.testing.assert_array_equal(found.extra["code"], raw.extra["code"])


def test_a_loss_may_stay_in_nats_while_another_is_in_bits(tmp_path: Path) -> None:
    found = read(in_units(), tmp_path, metrics=("code",), units={**UNITS, "loss": "nats", "code": "bits"})
    np.testing.assert_array_equal(found.loss_nats, in_units()["loss"])
    np.testing.assert_array_equal(found.extra["code"], in_units()["code"] * LN2)


def test_integers_are_floats_before_they_are_multiplied(tmp_path: Path) -> None:
    frame = (
        in_units().assign(tokens=np.arange(24) + 10**13, params=np.arange(24) + 10**12).drop(columns="flops")
    )
    path = tmp_path / "t.parquet"
    frame.to_parquet(path)  # int64; times a million it exceeds 2^63
    found = read_observations(path, AnalysisSettings(units={"tokens": "T", "params": 1_000_000}))
    np.testing.assert_array_equal(found.n_tokens, (np.arange(24) + 1e13) * 1e12)
    np.testing.assert_array_equal(found.compute_flops, 6.0 * found.n_params * found.n_tokens)
    assert (found.compute_flops > 1e40).all()


def test_filters_and_reasons_keep_the_tables_own_numbers(tmp_path: Path) -> None:
    frame = in_units().astype({"loss": object})
    frame.loc[2, "loss"] = -3.5
    found = read(frame, tmp_path, units=UNITS, where={"flops.max": 16})
    assert found.n_points == 17
    assert [d.reason for d in found.dropped] == ["loss is not positive: -3.5"]


@pytest.mark.parametrize(
    ("value", "factor"),
    [
        ("K", 1e3),
        ("m", 1e6),
        ("B", 1e9),
        ("T", 1e12),
        ("PF-days", 8.64e19),
        ("2.5e17", 2.5e17),
        (1e18, 1e18),
        (7, 7.0),
    ],
)
def test_every_unit_of_flops(value: Any, factor: float) -> None:
    assert read_units({"flops": value})["flops"].factor == factor


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ({"params": "million"}, ["units.params=million", "K, M, B, T", "positive number"]),
        ({"tokens": "PF-days"}, ["units.tokens=PF-days", "K, M, B, T"]),
        ({"flops": "EF"}, ["units.flops=EF", "PF-days"]),
        ({"flops": -1.0}, ["units.flops=-1.0"]),
        ({"flops": "0"}, ["units.flops=0"]),
        ({"flops": "nan"}, ["units.flops=nan"]),
        ({"flops": "inf"}, ["units.flops=inf"]),
        ({"flops": True}, ["units.flops=True"]),
        ({"flops": None}, ["units.flops=None"]),
        ({"loss": "2"}, ["units.loss=2", "nats, bits"]),
        ({"loss": "bits_per_byte"}, ["units.loss=bits_per_byte", "nats, bits"]),
        ({"code": "bits"}, ["units.='code'", "loss", "params"]),
        ({"parms": "M"}, ["units.='parms'", "Did you mean 'params'"]),
        ({"run_id": "M"}, ["units.='run_id'"]),
    ],
)
def test_an_unknown_unit_is_one_clear_error(units: Mapping[str, Any], says: Sequence[str]) -> None:
    with pytest.raises(UserError) as caught:
        AnalysisSettings(units=units)
    text = str(caught.value)
    assert "\n" not in text
    for words in says:
        assert words in text


def test_a_unit_of_a_column_that_the_table_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"units.flops=1e18: t.csv has no column 'flops'; its columns are run_id, "
    ):
        read(in_units().drop(columns="flops"), tmp_path, units=UNITS)


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_units().rename(columns={"code": "eval.code", "loss": "bpt"}).to_csv("t.csv", index=False)
    quick = ["bootstrap.resamples=0", "sensitivity=false", "backtest=false", "profile=false"]
    units = [f"units.{k}={v}" for k, v in UNITS.items() if k != "loss"] + ["units.eval.code=bits"]
    given = ["runs=t.csv", "columns.loss=bpt", "metric=eval.code", *units]
    assert main(["analyze", *given, *quick, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    schema = resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text("utf-8")
    jsonschema.validate(data, json.loads(schema))
    assert data["observations"]["units"]["eval.code"] == {"unit": "bits", "factor": LN2}
    assert "units.eval.code=bits" in data["command"]
    assert data["observations"]["compute_range_flops"] == [1e18, 6.4e19]
    assert main(["analyze", *given, *quick]) == 0
    out = capsys.readouterr().out
    assert "params in M (1e+06)" in out
    assert "units.flops=1e18" in out.split("next:")[1]
    assert main(["predict", *given, "bootstrap.resamples=0", "compute_flops=1e20"]) == 0
    assert "params in M (1e+06)" in capsys.readouterr().out
    assert main(["analyze", *given, "units.loss=bit"]) == 2
    assert (
        "units.loss=bit is not a unit of a loss per token. Choices: nats, bits, perplexity."
        in capsys.readouterr().err
    )
    assert main(["analyze", "sweep=none", "units.params=M"]) == 2
    assert "units.: this option is for tables" in capsys.readouterr().err
