"""Tests of the commands as a user sees them: help, versions, errors in one line, nothing written by a refused command."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling_lab.cli.main import main
from scaling_lab.cli.table import COMMANDS
from scaling_lab.core.storage.store import RunStore


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table(tmp_path):
    """A noise-free table of Chinchilla's law with awkward names: `runs (a=b).csv` with columns `train/loss`, `x=y`."""
    path = tmp_path / "runs (a=b).csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["params", "tokens", "train/loss", "x=y", "set name"])
        for budget in (1e18, 1e19, 1e20):
            for ratio in (0.25, 0.5, 1, 2, 4):
                n = ratio * (budget / 120) ** 0.5
                d = budget / 6 / n
                loss = 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28
                writer.writerow([n, d, loss, 1, "web text"])
                writer.writerow([n, d, 9.0, 2, "code"])
    return path


def run(*argv):
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "scaling_lab.cli.main", *argv], capture_output=True, text=True
    )


def refused(capsys, *argv):
    """The one line on stderr of a command that exits 2."""
    status = main(argv)
    out = capsys.readouterr()
    assert status == 2, out.err
    assert out.out == ""
    lines = out.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_overview_is_fast_and_names_every_command(capsys):
    started = time.process_time()
    assert main(["--help"]) == 0
    assert time.process_time() - started < 0.3
    out = capsys.readouterr().out
    for command in COMMANDS.values():
        assert f"\n  {command.name} " in out
        assert command.example in out
    # Commands that do not exist yet are not listed.
    for later in ("validate", "compare", "observe", "prune"):
        assert later not in out


def test_overview_and_version_load_nothing_heavy():
    code = (
        "import sys; from scaling_lab.cli.main import main; main(['--help']); main(['--version'])\n"
        "print(sorted({'torch','hydra','numpy','rich','omegaconf','wandb'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "scaling-lab 0." in done.stdout


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_every_command_needs_neither_hydra_nor_torch(command):
    code = (
        f"import sys; from scaling_lab.cli.main import main; assert main([{command!r}, '--help']) == 0\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'wandb'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"scaling-lab {command}" in done.stdout


def test_help_follows_the_choice_of_a_group(capsys):
    main(["plan", "--help"])
    assert "model.mlp=relu2" in capsys.readouterr().out
    main(["plan", "--help", "model=gpt2"])
    out = capsys.readouterr().out
    assert "model=gpt2" in out
    assert "model.mlp=" not in out
    assert "[gpt, gpt2]" in out


def test_help_shows_null_and_the_type_of_each_item(capsys):
    main(["analyze", "--help"])
    out = capsys.readouterr().out
    assert "[list of text]" in out
    assert "list of list" not in out
    assert "None" not in out


def test_every_option_of_help_has_a_meaning(capsys):
    for command in COMMANDS.values():
        form = command.load().form(
            __import__("scaling_lab.cli.options.arguments", fromlist=["parse"]).parse([command.name])
        )
        nameless = [
            key
            for key, option in form.options.items()
            if not option.meaning and not key.startswith(("approach.", "bootstrap.", "seed"))
        ]
        assert nameless == [], command.name


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["Did you mean 'train'?", "quickstart"]),
        (["plan", "sweep=x", "model.widht=3"], ["'model.widht'"]),
        (
            ["plan", "sweep=x", "model.hedas=3"],
            ["'model.hedas'", "Did you mean model.heads?", "model.context"],
        ),
        (["plan", "sweep=x", "model=gtp"], ["model='gtp'", "'gpt'", "gpt2"]),
        (["plan", "sweep=x", "model=null"], ["model='null'", "gpt2"]),
        (["plan", "sweep=x", "experiment=null"], ["experiment='null'", "quickstart"]),
        (["plan", "sweep=x", "data.kind=tokens"], ["data.kind", "choose with data=NAME", "context_tree"]),
        (["plan", "sweep=x", "seed=1.5"], ["seed='1.5'", "integer"]),
        (["plan", "sweep=x", "model.width=64"], ["model.width", "design.sizes.min_width"]),
        (["plan", "sweep=x", "schedule.warmup_fraction=0.1"], ["recipe.warmup_fraction"]),
        (["plan", "sweep=x", "model.mlp=swish"], ["model.mlp='swish'", "swiglu"]),
        (["plan", "sweep=x", "design.budgets_flops=[1e3]"], ["less than one step"]),
        (["plan", "sweep=x", "data=tokens", "data.path=no.npy"], ["data.path='no.npy'", "no such file"]),
        (["plan", "sweep=../x", "seed=1"], ["sweep='../x'", "not a valid name"]),
        (["plan", "sweep=x", "hydra/launcher=local", "hydra.launcher.wrokers=1"], ["hydra/launcher"]),
        (["plan"], ["sweep=NAME"]),
        (["sweep", "sweep=x", "seed=1", "workers=0"], ["workers=0"]),
        (["sweep", "sweep=x"], ["sweep='x'"]),
        (["sweep", "sweep=x", "seed=1", "hydra/launcher=slurmm"], ["slurmm"]),
        (["plan", "experiment=quick"], ["'quickstart'"]),
        (["plan", "sweep=x", "config_dir=none", "seed=1"], ["config_dir", "none"]),
        (["train", "model.width=64", "model.depth=2"], ["train_tokens"]),
        (["train", "model.width=63", "model.depth=2", "train_tokens=2K"], ["model.width=63"]),
        (["train", "model.width=64", "model.depth=2", "train_tokens=10"], ["less than one step"]),
        (["train", "-m", "model.width=16,17", "model.depth=1", "train_tokens=2K"], ["model.width=17"]),
        (["train", "model.depth=2", "train_tokens=2K"], ["model.width is missing"]),
        (["analyze"], ["runs=FILE"]),
        (["analyze", "runs=no.csv"], ["no.csv"]),
        (["analyze", "runs=no.csv", "sweep=x"], ["give one of them"]),
        (["analyze", "sweep=x"], ["sweep='x'"]),
        (["analyze", "runs=no.csv", "convention=six"], ["convention='six'", "six_n_total"]),
        (["analyze", "runs=no.csv", "bootstrap.unit=rnu"], ["Did you mean 'run'?"]),
        (["predict", "runs=no.csv"], ["compute_flops"]),
        (["status", "sweep=x"], ["sweep='x'"]),
        (["report", "sweep=x"], ["sweep='x'"]),
        (["reproduce"], ["published", "besiroglu2024", "all"]),
        (["reproduce", "published=porian2023"], ["Did you mean 'porian2024'?", "all"]),
        (["reproduce", "publised=all"], ["Did you mean published?"]),
        (["report"], ["sweep"]),
        (["status", "--watch", "-m"], ["multirun"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals_are_one_line_and_write_nothing(capsys, in_an_empty_folder, argv, parts):
    line = refused(capsys, *argv)
    for part in parts:
        assert part in line
    assert os.listdir(in_an_empty_folder) == []


def test_tracebacks_are_for_developers_only(monkeypatch, capsys):
    monkeypatch.setenv("SCALING_LAB_TRACEBACK", "1")
    assert main(["plan", "sweep=x", "seed=a"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_analyze_reads_awkward_names_and_prints_only_json(capsys, table):
    argv = [
        "analyze",
        f"runs={table}",
        "columns.loss=train/loss",
        "where.x=y=1",
        "where.params.min=1e6",
        "--json",
    ]
    assert main([*argv, "bootstrap.resamples=0"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert analysis["observations"]["n_points"] == 15
    fitted = analysis["estimates"][2]["parameters"]
    assert fitted["alpha"] == pytest.approx(0.34, abs=1e-3)
    assert fitted["E"] == pytest.approx(1.69, abs=1e-2)
    assert not (table.parent / "results").exists()


def test_where_on_text_columns_and_the_summary(capsys, table):
    argv = [
        "analyze",
        f"runs={table.name}",
        "columns.loss=train/loss",
        "where.set name=web text",
        "out=my out",
    ]
    assert main([*argv, "bootstrap.resamples=30"]) == 0
    out = capsys.readouterr().out
    for word in ("envelope", "isoflop", "parametric", "alpha", "next: scaling-lab predict"):
        assert word in out
    written = json.loads((table.parent / "my out/analysis.json").read_text())
    assert written["observations"]["n_points"] == 15
    assert (table.parent / "my out/report.html").is_file()
    assert "where.set name=web text" in written["command"]


def test_analyze_of_a_table_never_imports_torch(table):
    code = (
        "import sys; from scaling_lab.cli.main import main\n"
        f"assert main(['analyze', 'runs={table}', 'columns.loss=train/loss', 'where.x=y=1', 'bootstrap.resamples=20']) == 0\n"
        "assert not {'torch', 'wandb', 'datasets'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_predict_from_a_table(capsys, table):
    argv = [
        "predict",
        f"runs={table}",
        "columns.loss=train/loss",
        "where.x=y=1",
        "compute_flops=[1e21,5.76e23]",
        "--json",
    ]
    assert main([*argv, "bootstrap.resamples=0"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    parametric = [row for row in rows if row["approach"] == "parametric"]
    assert [row["compute_flops"] for row in parametric] == [1e21, 5.76e23]
    # Hoffmann's closed form at 1e21 FLOPs: N = G (C/6)^a, G = (alpha A / (beta B))^(1/(alpha+beta)).
    growth = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert parametric[0]["params_opt"]["estimate"] == pytest.approx(
        growth * (1e21 / 6) ** (0.28 / 0.62), rel=0.02
    )


def test_plan_prints_the_grid_and_writes_it(capsys):
    argv = [
        "plan",
        "sweep=small",
        "data.max_mb=1",
        "design.budgets_flops=2e9,8e9",
        "device=cpu",
        "data.max_epochs=0.1",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "data.max_epochs=0.1" in out  # excluded sizes are reported
    assert "next: scaling-lab sweep sweep=small" in out
    plan = json.loads(Path("results/small/plan.json").read_text())
    assert plan["settings"]["max_epochs"] == 0.1
    assert main(argv) == 0
    assert "(unchanged)" in capsys.readouterr().out
    # Nothing has started: the plan may change, with a note; a sweep continues with the existing plan or refuses.
    assert main([*argv, "seed=7", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {r["spec"]["seed_init"] for r in json.loads(out)["runs"]} == {7, 8}
    assert "replaced the previous plan" in err
    assert "seed (on disk 0, now 7)" in err
    line = refused(capsys, "sweep", *argv[1:], "seed=7,9")
    assert "seed (on disk 7, now 7,9)" in line
    assert "no run has started" in line
    assert main([*argv, "seed=7", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_plan_with_too_little_data_names_one_size_of_each_budget(capsys, in_an_empty_folder):
    assert main(["plan", "sweep=x", "device=cpu", "data.max_mb=1", "design.budgets_flops=[5e10,1e16]"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert len(re.findall(r"note: not planned: width \d+, depth \d+ at 1e\+16 FLOPs", out)) == 1
    assert "not planned: 5 more sizes of this budget" in out
    assert "the budget of 1e+16 FLOPs has none of its 6 sizes." in out


def test_a_single_run_prints_its_recipes_warnings(capsys):
    """As a plan does."""
    argv = [
        "train",
        "sweep=one",
        "device=cpu",
        "data.max_mb=1",
        "model.width=16",
        "model.depth=2",
        "model.context=16",
    ]
    assert main([*argv, "train_tokens=4096", "recipe=porian", "recipe.batch_tokens=256"]) == 0
    out = capsys.readouterr().out
    assert (
        "note: recipe=porian was fitted at 5e+06 to 9e+08 parameters, but this plan has runs outside" in out
    )
    assert main([*argv, "train_tokens=81920", "recipe.batch_tokens=2048"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_a_token_file_needs_its_vocabulary_size(capsys, tmp_path):
    import numpy as np

    np.save(tmp_path / "words.npy", np.arange(5000, dtype=np.uint16) % 99)
    np.save(tmp_path / "bytes.npy", np.arange(5000, dtype=np.uint8) % 99)
    few = ["device=cpu", "design.budgets_flops=2e9", "data=tokens", "data.max_epochs=1e9"]
    line = refused(capsys, "plan", "sweep=words", *few, f"data.path={tmp_path}/words.npy")
    assert "data.vocab_size is missing" in line
    assert "uint16" in line
    assert main(["plan", "sweep=words", *few, f"data.path={tmp_path}/words.npy", "data.vocab_size=99"]) == 0
    assert main(["plan", "sweep=bytes", *few, f"data.path={tmp_path}/bytes.npy"]) == 0
    assert {r.spec.shape.vocab_size for r in RunStore("results/bytes").read_plan().runs} == {256}


def test_errors_name_the_users_option(capsys):
    line = refused(capsys, "plan", "sweep=x", "device=cpu", "data.max_mb=1", "recipe.clip_norm=-1")
    assert "recipe.clip_norm=-1" in line


def test_own_configs_are_found_first(capsys, tmp_path):
    for name, text in {
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /model: big\nseed: 5\n",
        "experiment/quickstart.yaml": "# @package _global_\nsweep: other\n",
        "model/big.yaml": "kind: gpt\ncontext: 128\nmlp: swiglu\n",
    }.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    assert (
        main(
            [
                "plan",
                "config_dir=own",
                "experiment=mine",
                "data.max_mb=1",
                "device=cpu",
                "data.max_epochs=99",
                "--json",
            ]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["sweep"] == "mine"
    assert {(r["spec"]["shape"]["context"], r["spec"]["shape"]["mlp"]) for r in plan["runs"]} == {
        (128, "swiglu")
    }
    assert (
        main(
            [
                "plan",
                "config_dir=own",
                "experiment=quickstart",
                "data.max_mb=1",
                "device=cpu",
                "data.max_epochs=99",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["sweep"] == "other"
    (tmp_path / "own/model/big.yaml").write_text("kind: gpt\nwidht: 3\n")
    assert "model.width" in refused(capsys, "plan", "config_dir=own", "experiment=mine")


def test_doctor_reports_what_is_installed(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {f["what"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["python"]["ok"]
    assert "tokens" in found["corpus pysource"]["found"]


KEY_NAMES = (
    "sweep seed model data model.width data.max_mb design.budgets_flops experiment runs where.a columns.loss results_dir "
    "compute_flops points bootstrap.resamples hydra/launcher hydra.x config_dir"
)
KEYS = st.sampled_from(KEY_NAMES.split())
VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "gpt",
            "1e9",
            "1,2",
            "[1,2]",
            "null",
            "${x}",
            "'",
            '"',
            "a b",
            "{a: 1}",
            "\\",
            "range(0,3)",
            "=",
            "@",
            "~",
        ]
    ),
)
WORDS = st.one_of(
    st.builds(lambda k, v: f"{k}={v}", st.one_of(KEYS, st.text(max_size=8)), VALUES),
    st.sampled_from(["--json", "--help", "-m", "--watch", "-q", "-x", "--", "-", "", "="]),
    st.text(max_size=8),
)


# Without quickstart and sweep, which would train. Their arguments are parsed by the same code as plan's.
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(
        ["plan", "train", "analyze", "predict", "status", "report", "nonsense", "--help"]
    ),
    words=st.lists(WORDS, max_size=4),
    first=st.booleans(),
    good=st.sampled_from([[], ["sweep=x", "data.max_mb=1"], ["runs=runs.csv"]]),
)
def test_any_argument_list_runs_or_is_refused_naming_one_of_its_words(capsys, command, words, first, good):
    words = [*good, *words]
    argv = [command, *words] if first else [*words, command]
    status = main(argv)
    out, err = capsys.readouterr()
    assert status in (0, 2), (words, err)
    assert "Traceback" not in err
    assert "internal error" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if status == 0:
        assert not errors
        assert out.strip()
    else:
        (line,) = errors
        assert blames_one_of(line, argv), line


def blames_one_of(line: str, argv: list[str]) -> bool:
    """Whether an error quotes an argument of the command line (at least its option), or names a missing one."""
    # Arguments are shown with escapes where a terminal cannot show them, any blanks as one, and long ones shortened.
    keys = [arg.partition("=")[0] for arg in argv]
    words = {word for key in keys for word in (key, key.strip(), key.lstrip("+"))} | {*argv}
    quoted = {text[:40] for word in words if word.strip() for text in (word, repr(word)[1:-1])}
    quoted |= {repr(arg) for arg in argv if not arg.strip()}
    missing = [" is missing", "no command was given", "there are no sweeps in"]
    line = " ".join(line.split())
    return any(" ".join(text.split()) in line for text in (*quoted, *missing))
