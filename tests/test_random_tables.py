"""Property tests of tables. A table of a known law gives the law's numbers in whatever form it is written. From any other table
every number used is the table's own, and every refused row or table has the fault that the message names."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from helpers.tables import (
    PARAMS_EXPONENT,
    PLAIN,
    QUICK,
    analyzed,
    assert_the_laws_numbers,
    grid,
    law_loss,
    one_line,
    read,
)
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.data.table_observations import MIN_ROWS, from_table
from scaling_lab.analysis.data.tables.table import table_from_frame
from scaling_lab.analysis.estimate import FitStatus
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.core.errors import UserError

COUNTS = ("params", "tokens", "flops")
SLOW = [HealthCheck.too_slow]
# An analysis takes about a second: looking for a smaller failing table would take many minutes.
NO_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]

# -- a known law, written in ways that lose no information


Frame = pd.DataFrame


def with_empty_cells(frame: Frame, rng: np.random.Generator) -> Frame:
    """One count in each of a few rows: it follows from flops = 6 params tokens."""
    frame = frame.astype(object)
    for at in rng.choice(len(frame), 5, replace=False):
        frame.loc[at, str(rng.choice(COUNTS))] = rng.choice(["", "n/a", "-"])
    return frame


def with_bad_rows(frame: Frame, rng: np.random.Generator) -> Frame:
    """Runs without a usable loss; their ids begin with bad."""
    losses = rng.permutation(np.array([np.nan, "diverged", -1.0, 0, "inf", "70M", "1e99"], dtype=object))[:3]
    bad = frame.iloc[:3].astype(object).assign(loss=losses, run_id=["bad0", "bad1", "bad2"])
    return pd.concat([frame.astype(object), bad], ignore_index=True)


def with_copies(frame: Frame, rng: np.random.Generator) -> Frame:
    """Exact copies of some rows: each run counts once."""
    good = frame[~frame["run_id"].astype(str).str.startswith("bad")]
    return pd.concat([frame, good.iloc[rng.choice(len(good), 4)]], ignore_index=True)


def in_millions(frame: Frame, rng: np.random.Generator) -> Frame:
    numbers = pd.to_numeric(frame["params"], errors="coerce")
    return frame.assign(params=numbers.div(1e6).astype(object).where(numbers.notna(), ""))


def among_other_runs(frame: Frame, rng: np.random.Generator) -> Frame:
    others = frame.assign(run_id=[f"other{k}" for k in range(len(frame))], family="b")
    return pd.concat([frame.assign(family="a"), others.assign(loss=9.9)], ignore_index=True)


def shuffled(frame: Frame, rng: np.random.Generator) -> Frame:
    return frame.iloc[rng.permutation(len(frame)), rng.permutation(frame.shape[1])]


# What is done to the table, in this order, and the options for reading it afterwards.
WAYS: dict[str, tuple[Callable[[Frame, np.random.Generator], Frame], dict[str, Any]]] = {
    "empty cells": (with_empty_cells, {}),
    "bad rows": (with_bad_rows, {}),
    "copies": (with_copies, {}),
    "further columns": (lambda frame, rng: frame.assign(note="a, b; c", when="2026-01-01", empty=np.nan), {}),
    "a unit": (in_millions, {"units": {"params": "M"}}),
    "a column's name": (
        lambda frame, rng: frame.rename(columns={"loss": "my loss (1)"}),
        {"columns": {"loss": "my loss (1)"}},
    ),
    "other runs": (among_other_runs, {"where": {"family": "a"}}),
    "another order": (shuffled, {}),
}
WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, sep="\t", index=False),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True, double_precision=15),
    "parquet": lambda frame, path: frame.astype(str).to_parquet(path),
}


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(
    ways=st.sets(st.sampled_from(sorted(WAYS)), min_size=1, max_size=5),
    missing=st.sampled_from(["", *COUNTS]),
    ending=st.sampled_from(sorted(WRITERS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_known_law_is_found_however_its_table_is_written(
    tmp_path_factory: pytest.TempPathFactory, ways: set[str], missing: str, ending: str, seed: int
) -> None:
    if missing:  # derived from the other two, which must be complete then
        ways = ways - ({"empty cells", "a unit"} if missing == "params" else {"empty cells"})
    frame, options, rng = grid(), {}, np.random.default_rng(seed)
    for way in WAYS:
        if way in ways:
            frame, options = WAYS[way][0](frame, rng), options | WAYS[way][1]
    frame = frame.drop(columns=missing, errors="ignore")
    path = tmp_path_factory.mktemp("law") / f"t.{ending}"
    WRITERS[ending](frame, path)
    obs = read(path, **options)
    clean = from_table(table_from_frame(pd.DataFrame(grid()), "table"))
    found, wanted = (by_run(o.final()) for o in (obs, clean))
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-9)
    assert sorted(d.run_id for d in obs.dropped) == (["bad0", "bad1", "bad2"] if "bad rows" in ways else [])
    assert all(d.reason.startswith("loss is ") for d in obs.dropped)
    assert_the_laws_numbers(analyzed(obs, QUICK))


def by_run(obs: Observations) -> dict[str, tuple[float, ...]]:
    numbers = zip(obs.n_params, obs.n_tokens, obs.compute_flops, obs.loss_nats)
    return dict(sorted(zip(map(str, obs.run_id), numbers)))


# -- random tables


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
    loss = law_loss(params, tokens)
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


def as_written(columns: dict[str, Any]) -> dict[str, Any]:
    """Units that say that the numbers are right, however unlikely: random ones are."""
    return {
        name: unit for name, unit in {"params": 1, "tokens": 1, "loss": "nats"}.items() if name in columns
    }


def number(cell: Any) -> float:
    """A cell as a number; NaN where it is none. (True is 1 and not refused: pandas reads it so.)"""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def usable(value: float) -> bool:
    return 1e-60 <= value <= 1e60


def assert_the_tables_own_numbers(obs: Observations, columns: dict[str, Any]) -> None:
    """Every row is used or dropped; a used number is its cell's or derived from the other two; a dropped row has a fault."""
    cells = {
        name: [number(cell) for cell in values]
        for name, values in columns.items()
        if name in (*COUNTS, "loss")
    }
    dropped = {d.row: d.reason for d in obs.dropped}
    rows = [at for at in range(len(cells["loss"])) if at + 1 not in dropped]
    assert obs.n_points == len(rows)
    used = {"params": obs.n_params, "tokens": obs.n_tokens, "flops": obs.compute_flops, "loss": obs.loss_nats}
    for k, at in enumerate(rows):
        row = {name: float(values[k]) for name, values in used.items()}
        for name, value in row.items():
            cell = cells[name][at] if name in cells else math.nan
            if usable(cell):
                assert value == pytest.approx(cell, rel=1e-12), (name, at)
            else:
                assert name in COUNTS, (name, at)
                assert row["flops"] == pytest.approx(6 * row["params"] * row["tokens"], rel=1e-9), at
    for row_number, reason in dropped.items():
        for part in reason.split("; "):
            name = part.split()[0]
            derived = name not in cells or " = " in part
            assert derived or not usable(cells[name][row_number - 1]), (row_number, reason)


def is_the_law(obs: Observations) -> bool:
    return bool(
        obs.is_six_nd
        and np.allclose(obs.loss_nats, law_loss(obs.n_params, obs.n_tokens), rtol=1e-12)
        and np.allclose(obs.compute_flops, 6 * obs.n_params * obs.n_tokens, rtol=1e-12)
    )


def assert_refused_for_a_fault_it_has(text: str, columns: dict[str, Any], weights: str | None) -> None:
    one_line(text)
    missing = [name for name in ("loss", *COUNTS) if name not in columns]
    if "loss" in missing:
        assert "no column 'loss'" in text
    elif len(missing) > 1:
        assert missing[0] in text
    elif "usable row(s)" in text:
        found = re.search(r"(\d+) usable row\(s\) of (\d+)", text)
        assert found is not None
        assert int(found[1]) < MIN_ROWS
        assert int(found[2]) == len(columns["loss"])
    elif "two losses at one number of tokens" in text:
        assert len(set(columns["run_id"])) < len(columns["run_id"])
    else:  # an option's value that this table does not allow
        assert weights is not None
        assert "weights=loss_sem" in text
        assert not all(map(usable, map(number, columns.get("loss_sem", [None]))))


@settings(max_examples=16, deadline=None, derandomize=True, phases=NO_SHRINKING, suppress_health_check=SLOW)
@given(
    columns=tables(),
    points=st.sampled_from(["final", "all"]),
    resamples=st.sampled_from([0, 20]),
    unit=st.sampled_from(["auto", "run", "row", "budget", "residual"]),
    weights=st.sampled_from([None, None, "loss_sem"]),
)
def test_a_random_table_is_analyzed_correctly_or_refused(
    columns: dict[str, Any], points: Any, resamples: int, unit: Any, weights: str | None
) -> None:
    s = replace(
        PLAIN,
        points=points,
        bootstrap=BootstrapSettings(resamples=resamples, unit=unit),
        weights=weights,
        metrics=("loss",),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            obs = from_table(table_from_frame(pd.DataFrame(columns), "table", units=as_written(columns)))
        assert_the_tables_own_numbers(obs, columns)
        analysis = analyzed(obs, s)
    except UserError as error:
        assert_refused_for_a_fault_it_has(str(error), columns, weights)
        return
    fit = analysis.estimate("parametric")
    # The other approaches find the law only on grids centered on the optimum (the first test has one) and warn otherwise.
    if fit.status is FitStatus.CONVERGED and is_the_law(analysis.points):
        assert fit.frontier is not None
        assert fit.frontier.params.exponent == pytest.approx(PARAMS_EXPONENT, abs=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(MIN_ROWS, 30),
    sizes=st.integers(2, 7),
    budgets=st.integers(2, 4),
)
def test_exact_losses_give_the_law_or_a_status_without_convergence(
    seed: int, rows: int, sizes: int, budgets: int
) -> None:
    """Runs at random sizes and budgets: the parametric fit converges to the law, or its status says that it has not."""
    rng = np.random.default_rng(seed)
    params = rng.choice(np.exp(rng.uniform(np.log(1e3), np.log(1e11), sizes)), rows)
    flops = rng.choice(np.exp(rng.uniform(np.log(1e10), np.log(1e24), budgets)), rows)
    tokens = flops / (6 * params)
    table = {"params": params, "tokens": tokens, "flops": flops, "loss": law_loss(params, tokens)}
    fit = analyzed(
        from_table(table_from_frame(pd.DataFrame(table), "table", units=as_written(table))), QUICK
    ).estimate("parametric")
    if fit.frontier is None:
        assert fit.status is FitStatus.NOT_IDENTIFIED
        # Too few distinct points for the law's five parameters, or all of them at one compute.
        assert fit.message
    elif fit.status is FitStatus.CONVERGED:
        assert fit.frontier.params.exponent == pytest.approx(PARAMS_EXPONENT, abs=1e-3)


PLAUSIBLE = st.floats(1e3, 1e12).map(lambda x: f"{x:.6g}")


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(
    cells=st.lists(
        st.one_of(
            st.tuples(PLAUSIBLE, PLAUSIBLE, st.floats(0.5, 9).map(str), st.text(max_size=3)),
            st.tuples(PLAUSIBLE, PLAUSIBLE, st.floats(0.5, 9).map(str)),
            st.lists(st.text(max_size=6) | CELLS.map(str), min_size=1, max_size=6),
        ),
        max_size=24,
    ),
    ending=st.sampled_from(["csv", "tsv", "json", "jsonl"]),
    separator=st.sampled_from([",", ";", "\t", " "]),
    raw=st.binary(max_size=20) | st.just(b""),
)
def test_a_random_file_is_read_correctly_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cells: list[Any], ending: str, separator: str, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"t.{ending}"
    head = separator.join(["params", "tokens", "loss", "x"])
    body = [separator.join(row) for row in cells]
    if ending.startswith("json"):
        body = [json.dumps(dict(zip(["params", "tokens", "loss"], row))) for row in cells]
        head = ""
    path.write_bytes("\n".join([head, *body]).encode("utf-8", errors="surrogatepass") + raw)
    try:
        obs = read(path)
    except UserError as error:
        text = str(error)
    else:
        text = None
    if text is not None:
        assert path.name in one_line(text)
        return
    written = {tuple(map(number, row[:3])) for row in cells if len(row) >= 3}
    used = set(zip(obs.n_params.tolist(), obs.n_tokens.tolist(), obs.loss_nats.tolist()))
    assert used <= written, used - written
