"""Plans for a GPU that an engineer would start: batches, steps, precision, time, and what the real Chinchilla sweep has."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from scaling_lab.cli.main import main
from scaling_lab.core.spec import Plan
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.devices import get_device, gpu_cost
from scaling_lab.planning.preparation import needed_tokens
from scaling_lab.planning.recipes.default import critical_batch_tokens

ISOFLOP = [
    "device=cuda",
    "model.context=1024",
    "data=context_tree",
    "memory_gb=80",
    "design.sizes.max_width=2048",
]
# The quickstart's source is as large as this installation: a corpus of bytes that holds what is needed stands for it.
QUICKSTART = [
    *("experiment=quickstart", "scale=gpu", "gpu=h100"),
    *("data=prepared", "data.path=bytes", "data.expected_vocab_size=256"),
]
CHINCHILLA = ["experiment=chinchilla", "gpu=h100"]
# Rounding to four significant bits.
ROUNDING = 1 / 16


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def planned(*words: str) -> Plan:
    assert main(["plan", "--quiet", "sweep=s", *words]) == 0
    return RunStore.for_sweep("results", "s").read_plan()


def hours(plan: Plan, gpu: str = "h100") -> float:
    cost = gpu_cost(plan.runs, get_device(gpu))
    assert cost is not None
    return cost.seconds / 3600


def assert_sensible(plan: Plan) -> None:
    """From 1e7 parameters on no batch below 65,536 tokens or an eighth of the critical batch; never more than 100,000 steps."""
    for run in plan.runs:
        spec = run.spec
        assert spec.steps <= 100_000, run.run_id
        floor = min(65_536, critical_batch_tokens(spec.train_tokens) / 8)
        if spec.n_params() >= 1e7:
            assert spec.batch_tokens >= (1 - ROUNDING) * floor, run.run_id


def random_budgets(seed: int) -> str:
    """Three budgets, each 3 to 15 times the one before, from 1e15 to 1e20 FLOPs."""
    draw = random.Random(seed)
    budgets = [10 ** draw.uniform(15, 17.6)]
    for _ in range(2):
        budgets.append(budgets[-1] * draw.uniform(3, 15))
    return f"design.budgets_flops=[{','.join(f'{b:.3g}' for b in budgets)}]"


@pytest.mark.parametrize(
    "words",
    [
        [*ISOFLOP, "design.budgets_flops=[1e16,1e17,1e18]"],
        *([*ISOFLOP, random_budgets(seed), "design.n_opt_at_1e12=9.1e4"] for seed in range(6)),
        [*CHINCHILLA, "scale=gpu"],
        [*CHINCHILLA, "scale=gpu_day"],
        QUICKSTART,
    ],
    ids=lambda words: " ".join(words)[-60:],
)
def test_batches_and_steps(words):
    plan = planned(*words)
    assert_sensible(plan)
    assert {run.execution.device for run in plan.runs} == {"cuda"}
    assert {run.spec.dtype for run in plan.runs} == {"bfloat16"}


def test_the_quickstart_takes_minutes():
    """With budgets hundreds of times the CPU's, and text that any installation with torch has (its own source is 46 MB)."""
    plan = planned(*QUICKSTART)
    assert 1 / 60 < hours(plan) < 6 / 60
    assert min(plan.budgets_flops) > 100 * 5e10
    assert needed_tokens(plan) <= 60e6
    assert not any(run.execution.compile for run in plan.runs)


@pytest.mark.parametrize(
    ("scale", "least", "most", "vocabulary"), [("gpu", 1, 4, 8192), ("gpu_day", 18, 30, 32_768)]
)
def test_the_real_chinchilla_sweep(scale, least, most, vocabulary, capsys):
    plan = planned(*CHINCHILLA, f"scale={scale}")
    assert least < hours(plan) < most
    assert (plan.total_flops > 1e19) is (vocabulary == 32_768)
    assert {(r.spec.shape.context, r.spec.shape.vocab_size) for r in plan.runs} == {(1024, vocabulary)}
    # Five budgets over two decades, two seeds at one of them.
    budgets = plan.budgets_flops
    assert len(budgets) >= 5
    assert budgets[-1] / budgets[0] >= 100 * (1 - 1e-9)
    assert Counter(r.spec.budget_flops for r in plan.runs if r.spec.seed_init == 1) == {budgets[0]: 6}
    # Approach 1: sizes with four cosine horizons or more, over a factor of 16 or more.
    horizons = defaultdict(set)
    for run in plan.runs:
        horizons[run.spec.shape].add(run.spec.train_tokens)
    assert sum(len(tokens) >= 4 and max(tokens) >= 16 * min(tokens) for tokens in horizons.values()) >= 3
    # No more unique tokens than 4 epochs of the longest run demand.
    longest = max(run.spec.train_tokens for run in plan.runs)
    assert longest / 4 <= needed_tokens(plan) <= 1.1 * longest / 4
    # Each budget's sizes surround 20 tokens per parameter.
    for budget in budgets:
        ratios = [r.spec.train_tokens / r.spec.n_params() for r in plan.runs if r.spec.budget_flops == budget]
        assert min(ratios) < 5
        assert max(ratios) > 80
    # The plan says what it costs.
    assert main(["plan", "sweep=s", *CHINCHILLA, f"scale={scale}", "price_per_hour=2"]) == 0
    printed = capsys.readouterr().out
    for said in ("GPU hours, cost", "corpus not prepared", "GB of download", "GB on disk", "left behind"):
        assert said in printed, said
