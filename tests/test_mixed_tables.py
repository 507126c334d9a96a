"""Tables that mix groups or hold a grid of hyperparameters, and budgets as compute: `where.`, `best_of=`, `pool=`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_lab.analysis.analysis import read_observations
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.settings import AnalysisSettings
from scaling_lab.core.errors import UserError


def clean() -> pd.DataFrame:
    n = np.tile(np.geomspace(0.2, 5, 7), 5) * 0.08 * np.sqrt(np.repeat(np.geomspace(1e18, 1e20, 5), 7))
    d = np.repeat(np.geomspace(1e18, 1e20, 5), 7) / (6 * n)
    return pd.DataFrame({"params": n, "tokens": d, "loss": 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28})


def over_lr(table: pd.DataFrame, lrs: list[float], curvature: float = 0.05) -> pd.DataFrame:
    """A loss that is a parabola in ln LR around .003, with the table's loss as its minimum."""
    return pd.concat(
        [table.assign(lr=lr, loss=table.loss + curvature * np.log(lr / 0.003) ** 2) for lr in lrs],
        ignore_index=True,
    )


def read(folder: Path, table: pd.DataFrame, **settings: object) -> Observations:
    path = folder / "t.csv"
    table.to_csv(path, index=False)
    return read_observations(path, AnalysisSettings(**settings))  # type: ignore[arg-type]


def refused(folder: Path, table: pd.DataFrame, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        read(folder, table, **settings)
    return str(error.value)


def test_two_datasets_are_not_one_law(tmp_path: Path) -> None:
    t = pd.concat([clean().assign(dataset="web"), clean().assign(dataset="code", loss=0.6 * clean().loss)])
    text = refused(tmp_path, t)
    assert "the column dataset: web, code" in text
    assert "where.dataset=web" in text
    assert "best_of" not in text  # the best dataset is no answer
    web = read(tmp_path, t, where={"dataset": "web"})
    np.testing.assert_allclose(web.loss_nats, clean().loss, rtol=1e-12)
    assert read(tmp_path, t, pool=True).n_points == 70
    assert "web, code" in refused(tmp_path, t, where={"dataset": "books"})


def test_seeds_and_properties_of_a_size_are_no_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seeds = pd.concat(
        [clean().assign(init=k, loss=clean().loss * np.exp(rng.normal(0, 0.005, 35))) for k in range(3)]
    )
    assert read(tmp_path, seeds).n_points == 105
    widths = pd.concat(
        [clean().assign(width=np.round(clean().params ** 0.5), loss=clean().loss * k) for k in (1, 2)]
    )
    assert read(tmp_path, widths).n_points == 70  # nothing in the table tells these apart


@pytest.mark.parametrize("lrs", [[3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [1e-3, 2e-3, 8e-3]])
def test_the_best_of_a_grid_is_the_vertex(tmp_path: Path, lrs: list[float]) -> None:
    t = over_lr(clean(), lrs, 0.2)
    text = refused(tmp_path, t)
    assert "best_of=lr" in text
    obs = read(tmp_path, t, best_of="lr")
    assert obs.n_runs == 35
    # The loss is a parabola, so its vertex is exact though .003 is not on the second grid.
    np.testing.assert_allclose(np.sort(obs.loss_nats), np.sort(clean().loss), rtol=1e-9)
    assert any("35 at the vertex" in note for note in obs.warnings)


def test_a_best_value_at_the_edge_of_the_grid_is_marked(tmp_path: Path) -> None:
    obs = read(tmp_path, over_lr(clean(), [1e-3, 2e-3]), best_of="lr")
    assert any("35 at an edge of its grid" in note for note in obs.warnings)
    np.testing.assert_allclose(
        np.sort(obs.loss_nats), np.sort(clean().loss + 0.05 * np.log(2 / 3) ** 2), rtol=1e-12
    )


def test_the_best_of_a_grid_does_not_choose_the_easier_dataset(tmp_path: Path) -> None:
    t = over_lr(clean(), [1e-3, 3e-3, 9e-3], 0.01)
    t = pd.concat([t.assign(dataset="web"), t.assign(dataset="code", loss=0.6 * t.loss)])
    assert "dataset" in refused(tmp_path, t, best_of="lr")
    assert read(tmp_path, t, best_of="lr", where={"dataset": "code"}).n_runs == 35


@pytest.mark.parametrize(("column", "said"), [("lrr", "Did you mean best_of=lr"), ("kind", "not all numbers"), ("zero", "must be positive")])  # fmt: skip
def test_a_column_that_is_no_grid_is_refused(tmp_path: Path, column: str, said: str) -> None:
    t = over_lr(clean(), [1e-3, 3e-3, 9e-3]).assign(kind="a", zero=0)
    assert said in refused(tmp_path, t, best_of=column)


def test_lists_of_values(tmp_path: Path) -> None:
    t = over_lr(clean(), [1e-3, 3e-3, 9e-3])
    assert read(tmp_path, t, where={"lr": "[1e-3, 3e-3]"}, pool=True).n_points == 70
    assert (
        read(
            tmp_path, t.assign(d=t.lr.map("x{:g}".format)), where={"d": ["x0.001", "x0.009"]}, pool=True
        ).n_points
        == 70
    )
    odd = t.assign(tag=np.where(t.lr == 1e-3, "[a,b]", "c"))
    assert read(tmp_path, odd, where={"tag": "[a,b]"}).n_points == 35


def test_a_budget_is_the_compute_where_flops_are_missing(tmp_path: Path) -> None:
    budget = np.repeat(np.geomspace(1e18, 1e20, 5), 7)
    t = clean().assign(budget_flops=1.2 * budget)
    obs = read(tmp_path, t)
    np.testing.assert_allclose(obs.compute_flops, 1.2 * budget, rtol=1e-12)
    assert any(
        "C is budget_flops, which is 1.2 to 1.2 times 6 params tokens" in note for note in obs.warnings
    )
    derived = read(tmp_path, clean().drop(columns="tokens").assign(budget_flops=budget))
    np.testing.assert_allclose(derived.n_tokens, clean().tokens, rtol=1e-9)


def test_a_budget_is_not_the_compute_of_points_on_a_curve(tmp_path: Path) -> None:
    t = clean().assign(
        budget_flops=np.repeat(np.geomspace(1e18, 1e20, 5), 7), run_id=[f"r{k}" for k in range(35)]
    )
    curves = pd.concat([t.assign(tokens=share * t.tokens, loss=t.loss + 1 - share) for share in (0.1, 1.0)])
    obs = read(tmp_path, curves)
    np.testing.assert_allclose(obs.compute_flops, 6 * obs.n_params * obs.n_tokens, rtol=1e-12)
