"""Times, disk use and job limits of plans: by hand, and where they come from."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, exp, log
from types import SimpleNamespace

import pytest
from hydra_plugins.scaling_lab.submitit_launcher import SubmititSlurm

from helpers.specs import spec
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError
from scaling_lab.core.formatting import human_amount, human_bytes
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.files.shard_check import CACHE_VARIABLE
from scaling_lab.core.spec import Execution, PlannedRun
from scaling_lab.launching import cluster, probing, submitit_backends
from scaling_lab.launching.progress import LineReporter
from scaling_lab.launching.speeds import gpu_of_job, gpus_of_job, speeds_for
from scaling_lab.planning.cost import DiskUse, Speeds, disk_use, job_needs
from scaling_lab.planning.devices import COMPILE_S, get_device, run_seconds
from scaling_lab.planning.probe import (
    Probe,
    StepTime,
    load_probe,
    probe_of,
    processor_name,
    program_text,
    save_probe,
    step_flops,
    steps_to_measure,
)

SHAPE = GPTShape(width=64, depth=2, heads=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No measurements of other tests."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def planned(width: int = 64, execution: Execution | None = None, **changes) -> PlannedRun:
    run = spec(shape=replace(SHAPE, width=width), **changes)
    return PlannedRun(run, execution or Execution())


def measured(run: PlannedRun, seconds: float) -> StepTime:
    execution = run.execution
    return StepTime(
        program_text(run), run.spec.dtype, execution.compile, execution.threads, step_flops(run), seconds,
        "2.9.0", "2026-11-27",
    )  # fmt: skip


def test_disk_use_by_hand():
    """Curves of at most 4,096 lines; three checkpoints of each concurrent run, a stack's together; what runs leave."""
    n = SHAPE.count().params.total
    alone = [
        planned(train_tokens=512 * 100),
        planned(train_tokens=512 * 10_000),
        planned(keep_steps=(10, 20)),
    ]
    use = disk_use(alone, concurrent=2, keep="weights")
    assert use.curves == (100 + 4096 + 1000) * 170
    assert use.running == 12 * n * (3 * 2 + 2)
    assert use.left == 4 * n * 3
    stack = [replace(run, execution=Execution(stack="s", stack_size=3)) for run in alone]
    assert disk_use(stack, concurrent=1, keep="none") == DiskUse(use.curves, 12 * n * (3 * 3 + 2), 0)
    assert disk_use(alone, concurrent=1, keep="resume").left == 12 * n * 3


def test_units_people_read():
    sizes = (3, 999_600, 13.3e9, 2.5e12, 4e15)
    assert [human_bytes(size) for size in sizes] == ["3 bytes", "1 MB", "13.3 GB", "2.5 TB", "4,000 TB"]
    assert [human_amount(x) for x in (0.123, 9.9, 9.97, 1234.4)] == ["0.12", "9.9", "10", "1,234"]


def test_a_probe_gives_measured_steps_and_interpolates_between_them():
    """In ln FLOPs: the geometric mean of two speeds halfway between them; nothing far outside what was measured."""
    small, large = planned(32), planned(64)
    probe = Probe("gpu", (measured(small, 0.01), measured(large, 0.02)))
    assert probe.run_seconds(small) == pytest.approx(1000 * 0.01)
    branch = planned(32, parent="p", parent_step=400)
    assert probe.run_seconds(branch) == pytest.approx(600 * 0.01)
    between = planned(32, batch_tokens=1024, train_tokens=1024 * 1000)
    a, b, x = (step_flops(run) for run in (small, large, between))
    assert a < x < b
    share = (log(x) - log(a)) / (log(b) - log(a))
    speed = exp((1 - share) * log(a / 0.01) + share * log(b / 0.02))
    assert probe.step_seconds(between) == pytest.approx(x / speed)
    twice = planned(64, batch_tokens=1024, train_tokens=1024 * 1000)
    assert probe.step_seconds(twice) == pytest.approx(0.04)  # the speed of the largest
    assert probe.step_seconds(planned(64, batch_tokens=5120, train_tokens=5_120_000)) is None
    assert probe.step_seconds(planned(64, dtype="bfloat16")) is None
    assert probe.step_seconds(planned(64, Execution(compile=True))) is None
    # Half of a stack's step belongs to each of two members.
    stack = planned(32, Execution(stack="s", stack_size=2))
    assert Probe("gpu", (measured(stack, 0.01),)).run_seconds(stack) == pytest.approx(1000 * 0.01 / 2)


def test_probes_are_kept_by_device_and_newer_steps_replace_older_ones():
    run = planned()
    name = "NVIDIA H100 80GB HBM3"
    assert load_probe(name) == Probe(name)
    assert probe_of(get_device("h100")) is None
    save_probe(Probe(name).merged([measured(run, 0.01)]))
    path = save_probe(load_probe(name).merged([measured(run, 0.03), measured(planned(32), 0.02)]))
    assert sorted(s.seconds for s in load_probe(name).steps) == [0.02, 0.03]
    assert probe_of(get_device("h100")) == load_probe(name)
    assert probe_of(get_device("a100")) is None
    on_gpu = replace(run, execution=Execution("cuda"))
    speeds = speeds_for("cuda", "h100")
    assert speeds.run_seconds(on_gpu) == pytest.approx(1000 * 0.03)
    assert speeds.source([on_gpu]) == f"measured steps on {name}"
    other = planned(256, Execution("cuda", compile=True), dtype="bfloat16")
    assert speeds.run_seconds(other) == run_seconds(other, get_device("h100"))
    assert speeds.source([on_gpu, other]).startswith("measured steps for 1 of 2 runs, else the data sheet of")
    path.write_text("{}")
    assert load_probe(name) == Probe(name)


def test_planned_steps_are_measured_alone_and_in_a_stack(monkeypatch):
    """The largest of the four programs would take too long, which the speed of the others tells."""
    said: list[str] = []
    monkeypatch.setattr(probing, "PROBE_S", 0.4)
    reporter = SimpleNamespace(say=said.append, warn=said.append)
    runs = [planned(16), planned(32, batch_tokens=64, train_tokens=6400)]
    runs += [planned(16, Execution(stack="s", stack_size=2), seed_init=k) for k in (0, 1)]
    runs += [planned(1024, batch_tokens=65_536, train_tokens=65_536)]
    probe = probing.measure_plan(runs, reporter)
    assert probe.device == processor_name()
    assert [step.program for step in probe.steps] == [program_text(runs[k]) for k in (1, 0, 2)]
    assert all(0 < step.seconds < 10 for step in probe.steps)
    assert probe == load_probe(processor_name())
    assert "4 of 4 programs" in said[0]
    assert sum("ms a step" in line for line in said) == 3
    assert "N=25.4M, batch 65,536: one step would take too long here" in said[-1]
    with pytest.raises(UserError, match="device=cuda is not available"):
        probing.measure_plan([planned(16, Execution("cuda"))], reporter)


def test_the_first_few_of_the_steps_to_measure_cover_the_sizes():
    runs = [planned(width) for width in (16, 24, 32, 48, 64)]
    again = [planned(16, seed_init=5)]
    widths = [run.spec.shape.width for run in steps_to_measure([*runs, *again])]
    assert widths[:3] == [64, 16, 32]
    assert sorted(widths) == [16, 24, 32, 48, 64]


def test_limits_of_gpu_jobs_come_from_the_table():
    """Two runs on one GPU after each other, whatever the number of workers that share it."""
    runs = [planned(512, Execution("cuda", compile=True), dtype="bfloat16", seed_init=k) for k in (0, 1)]
    speeds = Speeds(get_device("a100"))
    one = run_seconds(runs[0], get_device("a100"))
    needs = job_needs(runs, workers=2, speeds=speeds)
    assert needs.known
    assert needs.seconds == pytest.approx(5 + 2 * one + COMPILE_S)
    assert job_needs(runs, workers=2, speeds=speeds, gpus=2).seconds == pytest.approx(5 + one + COMPILE_S / 2)
    assumed = job_needs(runs)
    assert not assumed.known
    assert assumed.seconds > needs.seconds


def test_the_options_of_a_job_name_its_gpus():
    assert gpu_of_job({"gres": "gpu:a100:2", "constraint": None}) is get_device("a100")
    assert gpu_of_job({"constraint": "h100&ib"}) is get_device("h100")
    assert gpu_of_job({"gres": "gpu:2", "partition": "gpu"}) is None
    assert [gpus_of_job(o) for o in ({"gres": "gpu:a100:2"}, {"gpus_per_node": 4}, {})] == [2, 4, 1]


def test_slurm_limits_are_those_of_the_card_that_is_named(monkeypatch, capsys):
    """By `gpu=`, else by the options of the job; the message says where the estimate comes from."""
    seen: dict = {}
    monkeypatch.setattr(cluster, "launch_jobs", lambda *args, **options: seen.update(options))
    monkeypatch.setattr(submitit_backends, "SlurmBackend", lambda *args: None)
    runs = (planned(512, Execution("cuda", compile=True), dtype="bfloat16"),)
    for gpu, gres, expected in (
        (None, "gpu:a100:2", ("a100", 2)),
        ("h100", "gpu:a100:2", ("h100", 2)),
        (None, None, (None, 1)),
    ):
        jobs = SimpleNamespace(plan=SimpleNamespace(runs=runs), gpu=gpu)
        SubmititSlurm(gres=gres).launch_runs(jobs)
        named = seen["speeds"].gpu
        assert (named and named.name, seen["gpus"]) == expected
    reporter = LineReporter()
    queue = SimpleNamespace(array_size=lambda: 9, limit=lambda time_min, mem_gb: (time_min, mem_gb, None))
    for speeds, words in (
        (
            Speeds(get_device("a100")),
            "(from the data sheet of NVIDIA A100 80GB and an assumed MFU, not measured)",
        ),
        (
            Speeds(),
            "(from assumed low speeds, not measured; gpu=NAME (h100, a100, ...) gives a closer estimate)",
        ),
    ):
        needs = [(("r",), job_needs(runs, 1, speeds))]
        (array,) = cluster.make_arrays(queue, needs, cluster.JobRequest(), reporter, speeds.source(runs))
        assert array.time_min == max(10, ceil(3 * needs[0][1].seconds / 60))
        assert words in capsys.readouterr().out


def test_plan_says_where_its_time_comes_from_and_what_it_takes_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = ["plan", "sweep=s", "device=cpu", "compile=false", "design.budgets_flops=[1e10]"]
    plan += [
        "design.sizes_per_budget=4",
        "design.sizes.min_width=16",
        "design.sizes.max_width=128",
        "workers=1",
    ]
    assert main(plan) == 0
    printed = capsys.readouterr().out
    assert "with 1 worker on cpu (from speeds measured on another machine)" in printed
    assert "of curves; checkpoints while it runs: up to" in printed
    from scaling_lab.core.storage.store import RunStore

    runs = RunStore("results/s").read_plan().runs
    save_probe(Probe(processor_name()).merged(measured(run, 10.0) for run in runs))
    assert main(plan) == 0
    printed = capsys.readouterr().out
    assert f"(from measured steps on {processor_name()})" in " ".join(printed.split())
    assert "about 5 s" not in printed
    monkeypatch.setattr(probing, "PROBE_S", 0.1)
    before = RunStore("results/s").plan_path.read_bytes()
    assert main([*plan, "probe=true"]) == 0
    assert "ms a step" in capsys.readouterr().out
    assert RunStore("results/s").plan_path.read_bytes() == before
    assert min(step.seconds for step in load_probe(processor_name()).steps) < 10
    assert main(["sweep", "sweep=s", "probe=true"]) == 2
    assert "probe" in capsys.readouterr().err
