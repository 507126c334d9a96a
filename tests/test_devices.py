"""The table of GPUs: times by hand, names, and that showing a time changes no plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from helpers.specs import spec
from scaling_lab.cli.main import main
from scaling_lab.cli.options import machine
from scaling_lab.core.errors import UserError
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.spec import Execution, PlannedRun
from scaling_lab.planning.devices import (
    COMPILE_S,
    DEVICES,
    MFU,
    START_S,
    STEP_OVERHEAD_S,
    device_of_label,
    get_device,
    gpu_cost,
    mfu,
    run_seconds,
)

LARGE = GPTShape(width=768, depth=12, heads=12, vocab_size=8192, context=1024)


def planned(**changes) -> PlannedRun:
    run = spec(shape=LARGE, batch_tokens=65_536, train_tokens=65_536 * 1000, dtype="bfloat16", **changes)
    return PlannedRun(run, Execution("cuda", compile=True))


def test_seconds_by_hand():
    """6 N D over 989 TFLOP/s times the MFU of its size, and 1,000 steps of 100 us."""
    run = planned()
    n = run.spec.n_params()
    assert 8e7 < n < 1e8
    expected = 6 * n * 65_536_000 / (989e12 * mfu(n)) + 0.1
    assert run_seconds(run, get_device("h100")) == pytest.approx(expected, rel=1e-6)
    # Half of a stack of two: the GPU is as full as with a model of twice the size, and one launch serves both.
    stacked = PlannedRun(run.spec, replace(run.execution, stack="s", stack_size=2))
    expected = 6 * n * 65_536_000 / (989e12 * mfu(2 * n)) + 1000 * STEP_OVERHEAD_S / 2
    assert run_seconds(stacked, get_device("h100")) == pytest.approx(expected, rel=1e-6)


def test_mfu_goes_through_its_points_and_rises():
    assert [mfu(n) for n, _ in MFU] == pytest.approx([share for _, share in MFU])
    assert mfu(1e3) == pytest.approx(MFU[0][1])
    assert mfu(1e12) == pytest.approx(MFU[-1][1])
    sizes = [10 ** (5 + 0.1 * k) for k in range(41)]
    assert all(mfu(a) < mfu(b) for a, b in pairwise(sizes))


def test_cost_by_hand():
    """Four runs on two GPUs: two each, one compilation, and both GPUs paid for until the end."""
    runs = [planned(seed_init=k) for k in range(4)]
    one = run_seconds(runs[0], get_device("a100"))
    cost = gpu_cost(runs, get_device("a100"), count=2, price_per_hour=3.0)
    assert cost.gpu_seconds == pytest.approx(4 * one + COMPILE_S)
    assert cost.seconds == pytest.approx(START_S + (4 * one + COMPILE_S) / 2)
    assert cost.price == pytest.approx(3.0 * 2 * cost.seconds / 3600)
    assert gpu_cost(runs, get_device("t4")) is None  # no bfloat16


def test_names_and_labels():
    assert device_of_label("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_of_label("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert device_of_label("Tesla T4") is DEVICES["t4"]
    assert device_of_label("AMD Instinct MI300X") is None
    with pytest.raises(UserError, match=r"gpu='h1000'.*Did you mean 'h100'"):
        get_device("h1000")


PLAN = [
    *(
        "plan",
        "sweep=g",
        "device=cuda",
        "dtype=bfloat16",
        "compile=true",
        "data=context_tree",
        "model.context=256",
    ),
    *("design.budgets_flops=[1e15,1e16]", "design.sizes.max_width=512", "memory_gb=80"),
]


def test_plan_shows_time_and_money_and_stays_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*PLAN, "gpu=h100", "count=2", "price_per_hour=2.5"]) == 0
    printed = capsys.readouterr().out
    assert "on 2 x NVIDIA H100 80GB" in printed
    assert "not measured" in printed
    assert "GPU hours" in printed
    before = (tmp_path / "results/g/plan.json").read_bytes()
    assert main([*PLAN, "gpu=t4"]) == 0
    assert "NVIDIA T4 has no bfloat16" in capsys.readouterr().out
    assert main(PLAN) == 0
    assert "gpu=NAME" in capsys.readouterr().out
    assert (tmp_path / "results/g/plan.json").read_bytes() == before
    assert main([*PLAN, "gpu=h1"]) == 2
    assert "gpu='h1'" in capsys.readouterr().err
    monkeypatch.setattr(machine, "torch_may_find_a_gpu", lambda: False)
    assert main([*(option for option in PLAN if option != "device=cuda"), "gpu=auto"]) == 2
    assert "gpu=auto: this machine has no GPU" in capsys.readouterr().err
    assert main([*PLAN, "gpu=h100", "count=0"]) == 2
    assert "count=0" in capsys.readouterr().err
