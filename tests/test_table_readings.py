"""Tables as people write them: common names, units in headers and cells, marks in numbers, perplexities, ids used twice.

Each is made from one clean table of a known law, and must give its numbers, or an error that a user can act on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_lab.analysis.analysis import read_observations
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.tables.headers import read_header, read_headers
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.counts import FLOPS_PER_PETAFLOP_DAY
from scaling_lab.core.errors import UserError


def clean() -> pd.DataFrame:
    """Five budgets, seven sizes; L = 1.69 + 406.4 / N^.34 + 410.7 / D^.28."""
    rows = []
    for c in np.geomspace(1e18, 1e20, 5):
        for factor in np.geomspace(0.2, 5, 7):
            n = round(factor * 0.08 * np.sqrt(c))
            d = round(c / (6 * n))
            rows.append((f"r{len(rows)}", n, d, 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28))
    return pd.DataFrame(rows, columns=["run_id", "params", "tokens", "loss"])


def read(folder: Path, table: pd.DataFrame | str, **settings: object) -> Observations:
    path = folder / "t.csv"
    path.write_text(table, encoding="utf-8") if isinstance(table, str) else table.to_csv(path, index=False)
    return read_observations(path, AnalysisSettings(**settings))  # type: ignore[arg-type]


def refused(folder: Path, table: pd.DataFrame | str, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        read(folder, table, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_the_clean_numbers(
    obs: Observations, table: pd.DataFrame | None = None, rel: float = 1e-12
) -> None:
    table = clean() if table is None else table
    np.testing.assert_allclose(obs.n_params, table["params"], rtol=rel)
    np.testing.assert_allclose(obs.n_tokens, table["tokens"], rtol=rel)
    np.testing.assert_allclose(obs.loss_nats, table["loss"], rtol=rel)
    np.testing.assert_allclose(obs.compute_flops, 6.0 * table["params"] * table["tokens"], rtol=2 * rel)


def small(table: pd.DataFrame) -> pd.DataFrame:
    """Sizes below 1e9: in millions with three decimals, each number may also be a number of thousands."""
    return table[table.params < 999e6]


def with_commas(number: int) -> str:
    return f"{number:,}"


def with_points(number: int) -> str:
    return f"{number:,}".replace(",", ".")


SPOILED: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame | str], str]] = {
    "units in brackets": (
        lambda t: t.assign(params=t.params / 1e6, tokens=t.tokens / 1e9).rename(
            columns={"params": "Params (M)", "tokens": "Tokens [billions]", "loss": "Val loss", "run_id": "run name"}
        ),
        "params is Params (M)",
    ),
    "units as last words": (
        lambda t: t.assign(params=t.params / 1e6, tokens=t.tokens / 1e9).rename(
            columns={"params": "n_params_millions", "tokens": "train_tokens_B", "loss": "eval_loss"}
        ),
        "tokens in B (1e+09)",
    ),
    "single capitals": (
        lambda t: t.assign(C=6.0 * t.params * t.tokens).rename(columns={"params": "N", "tokens": "D", "loss": "L"}),
        "flops is C",
    ),
    "PF-days": (
        lambda t: t.assign(**{"compute (PF-days)": 6.0 * t.params * t.tokens / FLOPS_PER_PETAFLOP_DAY}),
        "PF-days",
    ),
    "GFLOPs that agree with 6ND": (lambda t: t.assign(GFLOPs=6.0 * t.params * t.tokens / 1e9), "flops is GFLOPs"),
    "perplexity by name": (
        lambda t: t.assign(val_ppl=np.exp(t.loss)).drop(columns="loss"),
        "loss in perplexity",
    ),
    "perplexity by size": (lambda t: t.assign(loss=np.exp(t.loss)), "perplexities"),
    "bits by name": (lambda t: t.assign(loss_bits=t.loss / np.log(2)).drop(columns="loss"), "bits per token"),
    "thousands": (
        lambda t: t.assign(params=t.params.map(with_commas), tokens=t.tokens.map(with_commas)),
        "separates thousands",
    ),
    "decimal comma": (
        lambda t: "\n".join(
            ["run_id;params;tokens;loss"]
            + [
                f"{r.run_id};{with_points(r.params)};{with_points(r.tokens)};{f'{r.loss:.17g}'.replace('.', ',')}"
                for r in t.itertuples()
            ]
        ),
        "decimal comma",
    ),
    "units in cells": (
        lambda t: t.assign(
            params=[f"{n / 1e6!r}M" for n in t.params], tokens=[f"{d / 1e9!r} B tokens" for d in t.tokens]
        ),
        "carry their unit",
    ),
    "spaces": (lambda t: t.assign(params=[f"{n:,}".replace(",", " ") for n in t.params]), "flops is not"),
    "one id for all sizes": (lambda t: t.assign(run_id=[f"b{k // 7}" for k in range(len(t))]), "they are 35 runs"),
    "earlier attempts": (
        lambda t: pd.concat([t.assign(timestamp=2.0), t.iloc[::3].assign(loss=9.0, timestamp=1.0)]),
        "earlier attempts",
    ),
    "crashed rows": (
        lambda t: pd.concat([t.assign(State="finished"), t.iloc[::3].assign(run_id="x", loss=9.0, State="crashed")]),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_a_table_with_one_reading_gives_the_clean_numbers(tmp_path: Path, kind: str) -> None:
    spoil, said = SPOILED[kind]
    obs = read(tmp_path, spoil(clean()))
    assert_the_clean_numbers(obs)
    assert any(said in note for note in obs.warnings), obs.warnings
    assert obs.n_runs == len(clean())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.rename(columns={"loss": "val_loss"}).assign(eval_loss=2.0), ["loss can be val_loss or eval_loss", "columns.loss=val_loss"]),
        (lambda t: t.rename(columns={"params": "a", "tokens": "b", "loss": "c"}), ["'params', has no column 'tokens'", "'loss'", "columns.params="]),
        (lambda t: t.assign(params=t.params / 1e6, tokens=t.tokens / 1e9), ["units.params=M units.tokens=B", "units.params=1 units.tokens=1"]),
        (lambda t: t.assign(tokens=t.tokens / 1e6), ["tokens", "units.params=1 units.tokens=1"]),
        (lambda t: small(t).assign(params=lambda s: [f"{n // 1_000_000},{n // 1000 % 1000:03d}" for n in s.params]), ["decimal=point", "decimal=comma"]),
        (lambda t: t.assign(val_bpb=1.0).drop(columns="loss"), ["val_bpb is in bits per byte", "units.loss=bits"]),
        (lambda t: pd.concat([t, t.iloc[::3].assign(loss=9.0)]), ["12 run(s) have two losses", "points=all"]),
        (lambda t: t.assign(loss=t.loss + np.where(np.arange(35) == 3, 20.0, 0.0)), ["1 final loss(es) are above 15", "units.loss=nats"]),
    ],
)  # fmt: skip
def test_what_has_two_readings_is_refused_with_the_options(
    tmp_path: Path, spoil: Callable[[pd.DataFrame], pd.DataFrame], said: list[str]
) -> None:
    text = refused(tmp_path, spoil(clean()))
    for part in said:
        assert part in text


def test_the_options_that_errors_name_work(tmp_path: Path) -> None:
    t = clean()
    twice = pd.concat([t, t.iloc[::3].assign(loss=9.0)])
    assert read(tmp_path, twice, points="all").n_points == 35 + 12
    millions = t.assign(params=t.params / 1e6, tokens=t.tokens / 1e9)
    assert_the_clean_numbers(read(tmp_path, millions, units={"params": "M", "tokens": "B"}))
    assert read(tmp_path, millions, units={"params": 1, "tokens": 1}).n_params.max() < 1e4
    grouped = small(t).assign(params=lambda s: [f"{n // 1_000_000},{n // 1000 % 1000:03d}" for n in s.params])
    point = read(tmp_path, grouped, decimal="point", units={"params": "K"})
    comma = read(tmp_path, grouped, decimal="comma", units={"params": "M"})
    np.testing.assert_allclose(point.n_params, comma.n_params, rtol=1e-12)
    high = t.assign(loss=t.loss + np.where(np.arange(35) == 3, 20.0, 0.0))
    assert read(tmp_path, high, where={"loss.max": 12}).n_points == 34
    assert read(tmp_path, high, units={"loss": "nats"}).n_points == 35


def test_a_unit_is_not_applied_twice(tmp_path: Path) -> None:
    t = clean().assign(params=[f"{n / 1e6!r}M" for n in clean().params])
    assert_the_clean_numbers(read(tmp_path, t.rename(columns={"params": "Params (M)"})))
    assert "units.params=M" in refused(tmp_path, t, units={"params": "M"})
    header = clean().assign(params=clean().params / 1e6).rename(columns={"params": "Params (M)"})
    assert_the_clean_numbers(read(tmp_path, header, units={"params": "M"}))
    assert_the_clean_numbers(read(tmp_path, header, columns={"params": "Params (M)"}))


def test_a_speed_is_not_read_as_compute(tmp_path: Path) -> None:
    obs = read(tmp_path, clean().assign(tflops=350.0))
    assert_the_clean_numbers(obs)
    assert any("tflops is not read as flops" in note for note in obs.warnings)


def test_non_embedding_parameters_set_the_convention(tmp_path: Path) -> None:
    obs = read(tmp_path, clean().rename(columns={"params": "non_embedding_params"}))
    assert obs.convention == "six_n_non_embedding"
    both = clean().assign(n_params=2 * clean().params).rename(columns={"params": "non_embedding_params"})
    assert read(tmp_path, both).convention == "as_given"


def test_a_run_that_diverged_has_no_final_loss(tmp_path: Path) -> None:
    """Curves that end in NaN are left out; losses that are only logged now and then are not."""
    t = clean()
    curves = pd.concat(
        [
            t.assign(tokens=(t.tokens * share).round(), loss=t.loss + 1 - share)
            for share in (0.25, 0.5, 0.75, 1.0)
        ]
    ).sort_values(["run_id", "tokens"], ignore_index=True)
    curves.loc[(curves.run_id == "r3") & (curves.groupby("run_id").cumcount() > 1), "loss"] = np.nan
    sparse = (curves.run_id == "r5") & (curves.groupby("run_id").cumcount().isin((1, 3)))
    curves.loc[sparse, "loss"] = np.nan
    obs = read(tmp_path, curves)
    assert "r3" not in obs.run_names
    assert "r5" in obs.run_names
    assert any("diverged" in note and "r3" in note for note in obs.warnings)


def test_ids_that_name_sizes_are_pointed_out(tmp_path: Path) -> None:
    rows = [
        (f"d{k}", n, c / (6 * n), 1.69 + 406.4 * n**-0.34 + 410.7 * (c / (6 * n)) ** -0.28)
        for k, n in enumerate(np.geomspace(1e7, 1e9, 7))
        for c in np.geomspace(1e18, 1e20, 5)
    ]
    t = pd.DataFrame(rows, columns=["run_id", "params", "tokens", "loss"])
    assert any("points=all" in note for note in read(tmp_path, t).warnings)
    assert read(tmp_path, t, points="all").n_points == 35
    # Curves follow steps: their rows do not share compute.
    steps = t.assign(tokens=t.groupby("run_id").cumcount().add(1) * 1e9)
    assert not any("points=all" in note for note in read(tmp_path, steps).warnings)


@pytest.mark.parametrize(
    "column", ["d_k", "n", "d", "l", "c", "n_head", "d_model", "train_loss", "step", "lr", "n_b"]
)
def test_names_of_other_things_are_left_alone(column: str) -> None:
    assert read_header(column).meaning is None


def test_a_column_of_ours_is_taken_before_any_other_name() -> None:
    headers = read_headers(["params", "N", "tokens", "D", "loss", "val_loss"], {})
    assert not headers.taken
    assert not headers.unclear
    given = read_headers(["N", "n_params", "tokens", "loss"], {"params": "N"})
    assert not given.unclear


@pytest.mark.parametrize(
    "cell", ["1.2.3", "1,2,3", "1.234,5.6", ",", ".", "M", "12 apples", "1e", "--5", "1,23,456"]
)
def test_what_is_no_number_is_a_bad_row(tmp_path: Path, cell: str) -> None:
    t = clean().astype({"params": object})
    t.loc[4, "params"] = cell
    obs = read(tmp_path, t)
    assert [d.row for d in obs.dropped] == [5]
    assert obs.dropped[0].reason == f"params is not a number: {cell!r}"


@pytest.mark.parametrize(("column", "factor"), [("tokens", 1e-4), ("params", 1e-5)])
def test_a_ratio_of_tokens_to_parameters_that_no_run_has_is_refused(
    tmp_path: Path, column: str, factor: float
) -> None:
    """Each column alone is plausible: some hundred thousand tokens, some thousand parameters."""
    assert "tokens per parameter" in refused(tmp_path, clean().assign(**{column: factor * clean()[column]}))
    few = clean().assign(tokens=0.036 * clean().params)  # the least of a published table
    assert read(tmp_path, few).n_points == 35
