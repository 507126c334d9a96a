"""scale=: which file of an experiment is taken, that it is decided once, and plans of the scales that ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaling_lab.cli.main import main
from scaling_lab.cli.options import machine
from scaling_lab.cli.options.configs import ConfigGroup, config_folders
from scaling_lab.cli.options.hydra_config import composed_for_launch, group_overrides
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.engine import devices


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine with a GPU, as far as planning can tell."""
    monkeypatch.setattr(machine, "torch_may_find_a_gpu", lambda: True)
    monkeypatch.setattr(devices, "resolve_device", lambda name: "cuda" if name == "auto" else name)
    monkeypatch.setattr(devices, "cuda_has_bfloat16", lambda: True)


def plan(*words: str, sweep: str = "quickstart") -> dict:
    """plan.json after `scaling-lab plan` with these options."""
    assert main(["plan", "--quiet", *words]) == 0
    return json.loads(Path(f"results/{sweep}/plan.json").read_text())


def budgets(made: dict) -> list[float]:
    return sorted({run["spec"]["budget_flops"] for run in made["runs"]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=quickstart", "scale=large"], "scale='large' is not known. Choices: auto, cpu, gpu, gpu_day, smoke"),
        (["experiment=quickstart", "scale=gpu_day"], "experiment=quickstart scale='gpu_day' is not known"),
        (["experiment=quickstart", "scale=gpu_day"], "Choices: cpu, gpu, smoke."),
        (["experiment=known_entropy", "scale=gpu"], "experiment=known_entropy has no scales"),
        (["experiment=known_entropy", "scale=gpu"], "leave scale= out. Experiments with scales: chinchilla, quickstart."),
        (["sweep=s", "scale=gpu"], "scale=gpu is the scale of an experiment: give one experiment=NAME."),
        (["experiment=quickstart", "experiment_scale=quickstart_gpu"], "cannot be set: choose with scale=NAME."),
        (["experiment=no_such", "scale=gpu"], "experiment='no_such' is not known"),
    ],
)  # fmt: skip
def test_a_bad_scale_is_one_line_with_the_choices(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("results").exists()


def test_help_shows_the_option_but_not_the_group(capsys):
    assert main(["quickstart", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "scale=" in printed
    assert "experiment_scale" not in printed


def test_auto_is_by_the_device(gpu):
    made = plan("experiment=quickstart", "device=cpu")
    assert made["settings"]["scale"] == "cpu"
    assert budgets(made) == [5e10, 2e11, 8e11]
    made = plan("experiment=chinchilla", sweep="chinchilla")
    assert made["settings"]["scale"] == "gpu"
    assert {run["spec"]["dtype"] for run in made["runs"]} == {"bfloat16"}
    assert min(budgets(made)) > 1e15


def test_the_cpu_scales_are_the_experiments_themselves(monkeypatch):
    """So that sweeps from before there were scales are planned alike."""
    with_scale = plan("experiment=quickstart", "scale=cpu", "sweep=a", sweep="a")
    monkeypatch.setattr("scaling_lab.cli.commands.plan.choose_scale", lambda arguments, experiment: None)
    without = plan("experiment=quickstart", "sweep=b", sweep="b")
    assert without["settings"]["scale"] is None
    assert [run["run_id"] for run in with_scale["runs"]] == [run["run_id"] for run in without["runs"]]


@pytest.mark.parametrize("given", [[], ["scale=auto"]])
def test_a_sweep_keeps_its_scale(given, gpu, capsys):
    before = plan("experiment=quickstart", "scale=smoke")
    assert plan("experiment=quickstart", *given) == before  # though this machine has a GPU
    assert main(["sweep", "experiment=quickstart", "scale=cpu"]) == 2
    assert 'Differences: scale (on disk "smoke", now "cpu"). ' in capsys.readouterr().err


def test_a_sweep_from_before_there_were_scales_goes_on_without(gpu):
    path = Path("results/quickstart/plan.json")
    old = plan("experiment=quickstart", "scale=cpu")
    for key in ("scale", "options"):
        del old["settings"][key]
    path.write_text(json.dumps(old | {"given": ["experiment"]}))
    assert plan("experiment=quickstart")["runs"] == old["runs"]


def test_the_users_options_come_last():
    words = [
        "experiment=chinchilla",
        "scale=gpu",
        "data=context_tree",
        "design.budgets_flops=[1e14]",
        "gpu=h100",
    ]
    made = plan(*words, sweep="chinchilla")
    assert budgets(made) == [1e14]
    assert made["settings"]["data"]["kind"] == "context_tree"
    assert made["settings"]["model"]["context"] == 1024  # of the scale
    assert made["settings"]["options"]["scale"] == "gpu"


def test_launchers_compose_the_scale_too():
    """Hydra's own composition of a sweep takes the experiment, then its scale, then what the user chose."""
    groups = {"experiment": "chinchilla", "experiment_scale": "chinchilla_gpu", "data": "zipf_facts"}
    overrides = group_overrides({ConfigGroup(key): value for key, value in groups.items()})
    with composed_for_launch("sweep", overrides, {"scale": "gpu"}, config_folders(None)) as (config, _):
        assert config.data.kind == "zipf_facts"
        assert config.model.context == 1024
        assert config.scale == "gpu"


def own_experiment(name: str, **scales: str) -> None:
    """A user's experiment in ./own, with scales of the given budgets."""
    for group in ("experiment", "experiment_scale"):
        Path("own", group).mkdir(parents=True)
    head = "# @package _global_\n"
    Path(f"own/experiment/{name}.yaml").write_text(
        head + "data: {max_mb: 1}\ndesign: {budgets_flops: [1e9]}\n"
    )
    for scale, budget in scales.items():
        text = f"{head}design: {{budgets_flops: [{budget}]}}\n"
        Path(f"own/experiment_scale/{name}_{scale}.yaml").write_text(text)


def test_a_users_experiment_without_scales(gpu, capsys):
    own_experiment("mine")
    made = plan("config_dir=own", "experiment=mine", "device=cpu", sweep="mine")
    assert (budgets(made), made["settings"]["scale"]) == ([1e9], None)
    assert main(["plan", "config_dir=own", "experiment=mine", "scale=gpu"]) == 2
    assert "experiment=mine has no scales" in capsys.readouterr().err


def test_a_users_own_scales(capsys):
    own_experiment("mine", smoke="2e9", cpu="3e9")
    assert budgets(plan("config_dir=own", "experiment=mine", sweep="mine")) == [3e9]
    words = ["config_dir=own", "experiment=mine", "scale=smoke", "sweep=small"]
    assert budgets(plan(*words, sweep="small")) == [2e9]
    assert main(["plan", "config_dir=own", "experiment=mine", "scale=gpu"]) == 2
    assert "Choices: cpu, smoke." in capsys.readouterr().err
    Path("own/experiment_scale/mine_cpu.yaml").write_text("design: {budgets_flops: [1e10]}\n")
    assert main(["plan", "config_dir=own", "experiment=mine", "sweep=new"]) == 2
    assert "mine_cpu.yaml must begin with the line '# @package _global_'" in capsys.readouterr().err


def test_a_users_experiment_does_not_take_the_scales_of_a_built_in_one(gpu):
    own_experiment("quickstart")
    made = plan("config_dir=own", "experiment=quickstart", "device=cpu")
    assert (budgets(made), made["settings"]["scale"]) == ([1e9], None)


@pytest.mark.slow
def test_the_smoke_scale_goes_from_plan_to_report():
    assert main(["quickstart", "scale=smoke"]) == 0
    assert RunStore(Path("results/quickstart")).report_folder.joinpath("report.html").is_file()
