"""Importing W&B runs: the round trip with the real client, online and from run files, and incomplete answers."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from helpers.wandb_fixtures import fresh_wandb, server, synthetic_sweep  # noqa: F401  fixtures
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.tracking.sink.trackers import close_mirror, log_point, open_mirror
from scaling_lab.tracking.sink.wandb_client import Target, wandb_folder
from scaling_lab.tracking.wandb.mapping import (
    Expression,
    ExternalRun,
    IncompleteHistoryError,
    MissingValueError,
    RunMapping,
    rows_of_run,
)
from scaling_lab.tracking.wandb.study import upload_run

pytestmark = pytest.mark.usefixtures("fresh_wandb")
QUICK = ("bootstrap.resamples=50", "sensitivity=false", "backtest=false", "convention=six_n_with_head")


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> RunStore:
    monkeypatch.chdir(tmp_path)
    return synthetic_sweep(Path("results"))


def analysis(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main(["analyze", *argv, "--json", *QUICK]) == 0
    return json.loads(capsys.readouterr().out)


def assert_same_analysis(capsys, table: Path) -> None:
    """Every number of every approach equals that of the local records, including the curves of Approach 1."""
    ours = analysis(capsys, "sweep=synthetic")
    theirs = analysis(capsys, f"runs={table}")
    assert ours["observations"]["n_runs"] == theirs["observations"]["n_runs"] == 24
    for a, b in zip(ours["estimates"], theirs["estimates"]):
        assert a["approach"] == b["approach"]
        for key in ("status", "params_exponent", "params_coefficient", "tokens_exponent", "tokens_coefficient",
                    "parameters", "budgets", "interval", "at_mean_compute"):  # fmt: skip
            assert a[key] == b[key], (a["approach"], key)


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_imported_online_the_table_is_the_curves(sweep, server, capsys):  # noqa: F811
    records, _ = sweep.load_records()
    for record in records[:3]:
        upload_run(record, Target(), sweep)
    assert main(["import-wandb", "project=team/scaling_lab", "group=synthetic"]) == 0
    out = capsys.readouterr().out
    table = Path("results/imports/team-scaling_lab.csv")
    assert f"next: scaling-lab analyze runs={table}" in out
    found = rows(table)
    expected = [(r, p) for r in records[:3] for p in r.curve if p.val_loss_nats is not None]
    assert len(found) == len(expected)
    for row, (record, point) in zip(found, sorted(expected, key=lambda e: e[0].run_id)):
        assert row["run_id"] == record.run_id
        numbers = [
            float(row[name]) for name in ("params", "tokens", "flops", "loss", "loss_sem", "budget_flops")
        ]
        spec = record.spec
        assert numbers == [spec.n_params(), point.tokens, point.train_flops, point.val_loss_nats,
                           point.val_loss_sem_nats, spec.budget_flops]  # fmt: skip
    # A server that returns less than it has.
    server.lose_history_above = 100
    assert main(["import-wandb", "project=team/scaling_lab", "out=again.csv"]) == 2
    error = capsys.readouterr().err
    assert "no table was written because a curve is incomplete" in error
    assert "of its 8 points of 'val_loss_nats' were returned" in error
    assert not Path("again.csv").exists()


@pytest.mark.slow
def test_round_trip_online(sweep, server, capsys):  # noqa: F811
    for record in sweep.load_records()[0]:
        upload_run(record, Target(), sweep)
    assert main(["import-wandb", "project=team/scaling_lab", "out=online.csv"]) == 0
    assert "24 runs" in capsys.readouterr().out
    assert_same_analysis(capsys, Path("online.csv"))


def test_round_trip_from_run_files(sweep, capsys):
    import wandb

    records, _ = sweep.load_records()
    for record in records:
        run = open_mirror(
            PlannedRun(record.spec, record.execution), "abc", Target(), wandb_folder(sweep.folder), "offline"
        )
        for point in record.curve:
            log_point(run, point)
        close_mirror(run, record)
    wandb.teardown()
    assert main(["import-wandb", "path=results/synthetic/wandb", "out=imported.parquet"]) == 0
    assert "24 runs" in capsys.readouterr().out
    assert_same_analysis(capsys, Path("imported.parquet"))


def test_filters_and_states(sweep, server, capsys):  # noqa: F811
    """Failed runs and runs of another group or config are not imported unless requested."""
    import wandb

    def log(name, group, exit_code, width, tags=()):
        run = wandb.init(
            project="other",
            id=name,
            group=group,
            config={"model": {"width": width}, "n": 1e6},
            tags=list(tags),
        )
        for step in range(1, 5):
            run.log({"toks": 1e6 * step, "val/loss": 5.0 - step / 10}, step=step)
        run.finish(exit_code=exit_code)

    log("a", "one", 0, 32)
    log("b", "one", 1, 32)
    log("c", "two", 0, 64, ["keep"])
    mapping = ("mapping.params=n", "mapping.tokens=toks", "mapping.flops=6 * n * toks", "mapping.loss=val/loss",
               "mapping.run_id=null")  # fmt: skip

    def taken(*filters):
        assert main(["import-wandb", "project=team/other", "out=t.csv", *mapping, *filters]) == 0
        return sorted({row["run_id"] for row in rows(Path("t.csv"))})

    assert taken() == ["a", "c"]
    assert taken("state=any") == ["a", "b", "c"]
    assert taken("group=one") == ["a"]
    assert taken("where.model.width=64") == ["c"]
    assert taken("tags=[keep]") == ["c"]
    assert rows(Path("t.csv"))[-1]["loss"] == "4.6"
    assert float(rows(Path("t.csv"))[-1]["flops"]) == 6 * 1e6 * 4e6
    capsys.readouterr()
    assert main(["import-wandb", "project=team/other", *mapping, "group=three"]) == 2
    assert "none of its 0 runs passes the filters" in capsys.readouterr().err
    assert main(["import-wandb", "project=team/none"]) == 2
    assert "there is no such project" in capsys.readouterr().err
    # The default mapping knows none of these names, and lists the ones there are.
    assert main(["import-wandb", "project=team/other"]) == 2
    assert (
        "it has no 'history.val_loss_nats' for mapping.loss (closest: 'val/loss')" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give exactly one of project=ENTITY/PROJECT and path=FOLDER"),
        (["project=p"], "project=p must be ENTITY/PROJECT"),
        (["path=nowhere"], "there is no such folder"),
        (["project=a/b", "out=t.xlsx"], "must end in .csv or .parquet"),
        (["project=a/b", "mapping=nanogtp"], "Did you mean 'nanogpt'"),
        (["project=a/b", "mapping.los=x"], "Did you mean mapping.loss"),
        (["project=a/b", "mapping.params=__import__('os')"], "there is no function '__import__'"),
        (["project=a/b", "mapping.params=[1]"], "is neither a name nor arithmetic"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(["import-wandb", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


# -- mappings
def foreign(history: list[dict], config: dict | None = None, counts: dict | None = None) -> ExternalRun:
    keys = {key for row in history for key in row}
    found = {key: sum(key in row for row in history) for key in keys}
    return ExternalRun(
        "id", "name", config or {}, {"final": 3.0}, counts or found,
        lambda wanted: [row for row in history if all(key in row for key in wanted)],
    )  # fmt: skip


def test_nanogpt_runs(tmp_path):
    """What nanoGPT's train.py logs, with N and D computed by hand from its config."""
    import yaml

    text = (Path(__file__).parent.parent / "conf" / "wandb_mapping" / "nanogpt.yaml").read_text()
    config = {"n_layer": 2, "n_embd": 10, "batch_size": 3, "block_size": 7, "gradient_accumulation_steps": 5}
    history = [{"_step": i, "iter": 100 * i, "val/loss": 4.0 - i, "train/loss": 4.1 - i} for i in range(1, 3)]
    found = rows_of_run(foreign(history, config), RunMapping(**yaml.safe_load(text)))
    assert [(r["params"], r["tokens"], r["loss"]) for r in found] == [(2400, 10500, 3.0), (2400, 21000, 2.0)]
    assert found[0]["flops"] == 6.0 * 2400 * 10500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n", 4), ("config.n", 4), ("model.width", 8), ("config['a/b']", 0.5), ("val/loss", 2.0),
        ("history['val/loss'] / log(2)", 2.0 / math.log(2)), ("-n + 2 ** 3 * width_x", 4.0), ("summary.final", 3.0),
        ("max(n, 5) % 3", 2),
    ],
)  # fmt: skip
def test_expressions(text, value):
    run = foreign([{"val/loss": 2.0}], {"n": 4, "model": {"width": 8}, "a/b": 0.5, "width_x": 1.0})
    assert Expression(text, "mapping.x").value(run, {"val/loss": 2.0}) == value


def test_forbidden_expressions():
    for text in ("(lambda: 1)()", "open('x')", "a if b else c", "f'{n}'", "n.__class__()"):
        with pytest.raises(UserError, match="mapping.x"):
            Expression(text, "mapping.x")
    run = foreign([{"loss": 2.0}], {"n": 9})
    with pytest.raises(ValueError, match="power above"):
        Expression("n ** n ** n", "mapping.x").value(run, {})


def test_incomplete_and_torn_histories():
    mapping = RunMapping(loss="loss", params="n", tokens="tokens")
    history = [{"loss": 3.0, "tokens": 10.0 * i} for i in range(1, 5)]
    assert len(rows_of_run(foreign(history, {"n": 5}), mapping)) == 4
    with pytest.raises(IncompleteHistoryError, match="4 of its 1000 points of 'loss' were returned"):
        rows_of_run(foreign(history, {"n": 5}, {"loss": 1000, "tokens": 1000}), mapping)
    torn = [*history, {"loss": 2.0}, {"tokens": 50.0}]
    with pytest.raises(IncompleteHistoryError, match="4 of its 5 rows with 'loss' also have 'tokens'"):
        rows_of_run(foreign(torn, {"n": 5}), mapping)
    with pytest.raises(MissingValueError, match="it has no 'n' for mapping.params"):
        rows_of_run(foreign(history, {"m": 5}), mapping)


def test_columns_present_in_some_rows_only_drop_no_row():
    history = [
        {"_step": i, "loss": 3.0, "tokens": 10.0 * i} | ({"sem": 0.5} if i == 4 else {}) for i in range(1, 5)
    ]
    mapping = RunMapping(loss="loss", params="n", tokens="tokens", loss_sem="sem", seed="config.nothing")
    found = rows_of_run(foreign(history, {"n": 5}), mapping)
    assert [row.get("loss_sem") for row in found] == [None, None, None, 0.5]
    assert [row["tokens"] for row in found] == [10.0, 20.0, 30.0, 40.0]


def test_a_run_file_cut_anywhere_gives_a_correct_prefix(sweep, tmp_path):
    """Cut at every position: never an error, never a wrong row."""
    import wandb

    from scaling_lab.tracking.wandb.run_files import payloads, read_run_file

    run = wandb.init(
        mode="offline", dir=str(tmp_path), id="cut", config={"text": "x" * 40_000}
    )  # crosses a block
    for step in range(20):
        run.log({"loss": 5.0 - step, "nested": {"a": step}}, step=step)
    run.finish()
    wandb.teardown()
    (path,) = tmp_path.rglob("run-cut.wandb")
    whole = read_run_file(path)
    assert [row["loss"] for row in whole.history] == [5.0 - step for step in range(20)]
    assert [row["nested.a"] for row in whole.history] == list(range(20))
    assert whole.config["text"] == "x" * 40_000
    assert whole.state == "finished"
    data, seen = path.read_bytes(), set()
    everything = list(payloads(data))
    for end in range(7, len(data), 97):
        found = list(payloads(data[:end]))
        assert found == everything[: len(found)]
        seen.add(len(found))
    assert len(seen) > 10
    path.write_bytes(data[: len(data) - 40])
    assert read_run_file(path).state == "crashed"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a W&B run file"):
        read_run_file(path)
