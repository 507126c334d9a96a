"""Plans: sizes, recipes, the isoflop design, errors and notes."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.sweeps import settings
from scaling_lab.core.counts import Convention
from scaling_lab.core.errors import UserError
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.tokens import TokenFile
from scaling_lab.planning.cost import estimate_plan_seconds, estimate_seconds
from scaling_lab.planning.designs.base import RunRequest
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.designs.learning_rate import LearningRateDesign
from scaling_lab.planning.execution import LIBRARY_PARAMS, MIN_COMPILED_FLOPS, program_key
from scaling_lab.planning.plan import describe, make_plan, plan_single, sweep_horizons
from scaling_lab.planning.recipes.base import SweepHorizons, round_batch
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.settings import ExecutionSettings, ModelSettings, heads_for
from scaling_lab.planning.sizes import SizeLadder

# For recipes that do not depend on the sweep.
ALONE = SweepHorizons(1e6, 1e6)


# The ladder and the heads of versions before the ladder was evenly spaced in N.
EARLIER = {
    "design": IsoFlopDesign(sizes=SizeLadder(width_ratio=1.26)),
    "model": ModelSettings(head_dim=16),
}


def test_geometric_widths():
    sizes = SizeLadder(
        16, 256, width_ratio=2, width_multiple=4, aspect_ratio=32, min_depth=1
    ).geometric_sizes()
    assert sizes == [(16, 1), (32, 1), (64, 2), (128, 4), (256, 8)]
    fine = SizeLadder(min_width=16, max_width=64, width_ratio=2**0.5, width_multiple=4).geometric_sizes()
    assert [w for w, _ in fine] == [16, 24, 32, 44, 64]


@given(st.integers(1, 600), st.integers(1, 128))
def test_heads_divide_the_width_into_even_parts(half_width, head_dim):
    width = 2 * half_width
    heads = heads_for(width, head_dim)
    assert width % heads == 0
    assert (width // heads) % 2 == 0


def test_heads_by_hand():
    assert [heads_for(w, 16) for w in (16, 24, 32, 40, 48, 64)] == [1, 2, 2, 2, 3, 4]
    with pytest.raises(UserError, match="model.width=15 is odd"):
        heads_for(15, 16)


def test_isoflop_plan_spends_its_budgets():
    plan = make_plan(settings())
    assert len(plan.budgets_flops) == 3
    assert plan.budgets_flops[-1] / plan.budgets_flops[0] >= 16
    for budget in plan.budgets_flops:
        runs = [r.spec for r in plan.runs if r.spec.budget_flops == budget]
        assert len({s.shape for s in runs}) >= 5
        for s in runs:
            # C = 6 N D under the plan's own convention, within half a step.
            assert abs(s.train_flops() - budget) <= 6 * s.n_params() * s.batch_tokens / 2 * (1 + 1e-9)
    seeds = {b: {r.spec.seed_init for r in plan.runs if r.spec.budget_flops == b} for b in plan.budgets_flops}
    assert sorted(map(len, seeds.values())) == [1, 1, 2]


def test_windows_are_centered_alike():
    """The center of each budget's sizes lies within one step of the ladder of the guess, so no window biases its parabola."""
    design = IsoFlopDesign(sizes=SizeLadder(min_width=8, max_width=1024, width_ratio=1.2, width_multiple=2))
    log_n = sorted(math.log(12 * d * w * w + 256 * w) for w, d in design.sizes.geometric_sizes())
    rung = max(np.diff(log_n))
    for budget in (1e10, 1e11, 1e12, 1e13):
        window = design.window(log_n, budget)
        center = (log_n[window[0]] + log_n[window[-1]]) / 2
        assert abs(center - math.log(design.n_opt_guess(budget))) < rung


def test_a_run_with_too_many_epochs_is_dropped_and_named(tmp_path):
    path = tmp_path / "t.bin"
    np.zeros(200_000, np.uint8).tofile(path)
    data = TokenFile(path=str(path), dtype="uint8")
    with pytest.raises(UserError, match=r"data.max_epochs=0.001"):
        make_plan(settings(data=data, max_epochs=0.001))
    plan = make_plan(settings(data=data, max_epochs=4))
    left_out = [note for note in plan.notes if note.startswith("not planned")]
    assert left_out
    assert "data.max_epochs=4" in left_out[0]
    assert max(r.spec.train_tokens for r in plan.runs) <= 4 * data.n_tokens("train")
    complete = make_plan(settings(data=data, max_epochs=1e9))
    assert len(plan.runs) < len(complete.runs)


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(UserError, match="less than one step") as error:
        make_plan(settings(design=IsoFlopDesign(budgets_flops=(1e6, 1e11))))
    assert "\n" not in str(error.value)


def test_golden_plan():
    """The plan of a started sweep: these ids, in this order, are on users' disks."""
    plan = make_plan(settings(**EARLIER))
    digest = hashlib.sha256("\n".join(run.run_id for run in plan.runs).encode()).hexdigest()
    assert digest[:16] == "9a00b1a3893c03f9"
    assert [r.spec.role for r in plan.runs[:3]] == ["isoflop", "noise", "isoflop"]
    assert plan.runs[0].run_id == "gpt-w12-d2-c5e10-s0-028ce33d2d"


def lr_design(**changes) -> LearningRateDesign:
    return LearningRateDesign(
        **{"budgets_flops": (5e10,), "widths": (16, 64), "lr_multipliers": (0.5, 1.0, 2.0)} | changes
    )


def test_the_learning_rate_design_multiplies_the_recipes_values():
    plan = make_plan(settings(design=lr_design(seeds=2, batch_multipliers=(1.0, 2.0))))
    specs = [run.spec for run in plan.runs]
    assert len(specs) == 2 * 3 * 2 * 2
    assert {s.role for s in specs} == {"lr_sweep"}
    assert {s.seed_init for s in specs} == {0, 1}
    for width, lr in ((16, 0.0075 * 4**0.67), (64, 0.0075)):
        at = [s for s in specs if s.shape.width == width]
        assert sorted({s.optimizer.peak_lr for s in at}) == pytest.approx([lr / 2, lr, lr * 2])
        small, large = sorted({s.batch_tokens for s in at})
        assert large == 2 * small
        # Twice the batch and half the steps at the same budget.
        assert all(abs(s.train_flops() / 5e10 - 1) < 0.02 for s in at)


def test_the_center_of_an_lr_sweep_is_the_isoflop_run():
    """One results folder can hold both, and nothing is trained twice."""
    isoflop = {r.run_id for r in make_plan(settings()).runs if r.spec.shape.width == 28}
    middle = make_plan(settings(design=lr_design(widths=(28,), lr_multipliers=(1.0,)))).runs[0]
    assert middle.run_id in isoflop


def test_learning_rate_design_at_horizons_and_depths():
    design = lr_design(budgets_flops=(), horizons_tokens=(2e5, 1e5), depths=(2, 4), lr_multipliers=(1.0,))
    specs = [run.spec for run in make_plan(settings(design=design)).runs]
    assert [(s.shape.width, s.shape.depth) for s in specs] == 2 * [(16, 2), (16, 4), (64, 2), (64, 4)]
    for spec, wanted in zip(specs, [1e5] * 4 + [2e5] * 4, strict=True):
        assert abs(spec.train_tokens - wanted) <= spec.batch_tokens / 2
        assert spec.budget_flops == spec.train_flops()


def test_learning_rates_at_sizes_of_a_grid():
    """The smallest, middle and largest size of the IsoFLOP sweep with the same options, at each budget."""
    grid = make_plan(settings())
    tuned = make_plan(
        settings(
            design=LearningRateDesign(
                IsoFlopDesign().budgets_flops, grid_sizes=6, sizes_per_budget=2, lr_multipliers=(1,)
            )
        )
    )
    for budget in grid.budgets_flops:
        widths = sorted(r.spec.shape.width for r in grid.runs if r.spec.budget_flops == budget)
        found = [r.spec.shape.width for r in tuned.runs if r.spec.budget_flops == budget]
        assert found == [widths[0], widths[-1]]
    assert {r.run_id for r in tuned.runs} < {r.run_id for r in grid.runs}


def test_multipliers_that_round_to_one_run_are_one_run():
    # 64 tokens per step are one sequence, the minimum.
    recipe = DefaultRecipe(batch_tokens=64)
    design = lr_design(widths=(16,), lr_multipliers=(1.0,), batch_multipliers=(0.5, 1.0, 2.0))
    plan = make_plan(settings(design=design, recipe=recipe))
    assert [r.spec.batch_tokens for r in plan.runs] == [64, 128]
    assert any("1 x batch, 1 x LR rounds to a run that is already planned" in line for line in plan.rounding)


def test_sweep_horizons_by_hand():
    requests = [RunRequest(GPTShape(width=8, depth=1, heads=1), train_tokens=t) for t in (3.0, 5.0)]
    assert sweep_horizons(requests, Convention.SIX_N_TOTAL) == SweepHorizons(pytest.approx(3.0), 5.0)
    small, large = GPTShape(width=8, depth=1, heads=1), GPTShape(width=64, depth=4, heads=4)
    n_small, n_large = (s.count().n_params(Convention.SIX_N_TOTAL) for s in (small, large))
    budgets = [RunRequest(s, budget_flops=b) for b in (6e9, 6e8) for s in (small, large)]
    found = sweep_horizons(budgets, Convention.SIX_N_TOTAL)
    assert found.smallest_budget_tokens == pytest.approx(1e8 / math.sqrt(n_small * n_large))
    assert found.longest_tokens == pytest.approx(1e9 / n_small)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: IsoFlopDesign(budgets_flops=()), "design.budgets_flops"),
        (lambda: IsoFlopDesign(budgets_flops=(1e9, 1e9)), "design.budgets_flops"),
        (lambda: IsoFlopDesign(sizes_per_budget=3), "design.sizes_per_budget=3"),
        (lambda: IsoFlopDesign(noise_budget=3), "design.noise_budget=3"),
        (lambda: LearningRateDesign(), "design.horizons_tokens"),
        (lambda: lr_design(horizons_tokens=(1e6,)), "give exactly one of the two"),
        (lambda: lr_design(lr_multipliers=(1, 1)), "design.lr_multipliers"),
        (lambda: lr_design(batch_multipliers=(0.0,)), "design.batch_multipliers"),
        (lambda: lr_design(widths=(0,)), "design.widths"),
        (lambda: lr_design(seeds=0), "design.seeds=0"),
        (lambda: lr_design(grid_sizes=6), "cannot be combined with design.widths"),
        (lambda: lr_design(grid_sizes=6, widths=(), sizes_per_budget=7), "design.sizes_per_budget=7"),
        (
            lambda: make_plan(settings(design=lr_design(budgets_flops=(), horizons_tokens=(3.0,)))),
            "design.horizons_tokens: 3 is less than one step",
        ),
        (lambda: SizeLadder(min_width=64, max_width=32), "design.sizes.min_width=64"),
        (lambda: SizeLadder(width_ratio=1.0), "design.sizes.width_ratio"),
        (
            lambda: make_plan(settings(design=replace(EARLIER["design"], sizes_per_budget=50))),
            "gives .* sizes, fewer than",
        ),
        (lambda: make_plan(settings(recipe=DefaultRecipe(batch_tokens=100))), "recipe.batch_tokens=100"),
        (lambda: make_plan(settings(model=ModelSettings(options={"mpl": "gelu"}))), "model.mpl"),
        (lambda: make_plan(settings(model=ModelSettings(kind="lstm"))), "model='lstm'"),
        (lambda: plan_single(settings(), 1e6), "model.width is missing"),
        (
            lambda: plan_single(settings(model=ModelSettings(width=32, depth=2)), 3),
            "train_tokens=3 is less than one step",
        ),
        (
            lambda: plan_single(settings(model=ModelSettings(width=32, depth=2)), 1e12),
            "epochs over a corpus of",
        ),
    ],
)
def test_an_impossible_plan_is_one_clear_error(make, named):
    with pytest.raises(UserError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


def test_recipe_scales_and_can_be_overridden():
    small, large = GPTShape(width=16, depth=1, heads=1), GPTShape(width=64, depth=2, heads=4)
    recipe = DefaultRecipe()
    assert recipe.decide(small, 1e6, ALONE).optimizer.peak_lr == pytest.approx(
        4**0.67 * recipe.decide(large, 1e6, ALONE).optimizer.peak_lr
    )
    assert recipe.decide(small, 1e7, ALONE).batch_tokens > recipe.decide(small, 1e5, ALONE).batch_tokens
    # 512 * (2^2.5)^0.4 = 1,024 tokens at 2^2.5 = 5.66M tokens, 16 sequences of 64.
    assert recipe.decide(large, 2**2.5 * 1e6, ALONE).batch_tokens == 1024
    fixed = DefaultRecipe(peak_lr=0.003, batch_tokens=640).decide(small, 1e6, ALONE)
    assert (fixed.optimizer.peak_lr, fixed.batch_tokens) == (0.003, 640)


def test_the_recipe_warns_outside_its_measured_range():
    """Once for a plan: beyond 3.3e5 parameters or 6.6e6 tokens with the published rules' spread, and for very short runs."""
    inside = max((r.spec for r in make_plan(settings()).runs), key=lambda s: s.n_params())
    recipe = DefaultRecipe()
    assert recipe.overview([inside]) == ()
    wide = replace(
        inside,
        shape=GPTShape(width=1024, depth=12, heads=16),
        batch_tokens=65_536,
        train_tokens=65_536 * 16_000,
    )
    (beyond,) = recipe.overview([inside, wide])
    assert beyond.startswith("recipe=default: 1 of 2 runs are beyond 3.3e5 parameters or 6.6e6 tokens")
    assert "published, not measured here" in beyond
    low, high = (
        float(x) for x in re.findall(r"published rules give LR ([\d.e-]+) \(\w+\) to ([\d.e-]+)", beyond)[0]
    )
    assert 1.5 < high / low < 10
    short = replace(inside, train_tokens=inside.batch_tokens * 10)
    (below,) = recipe.overview([inside, short])
    assert below.startswith(
        "recipe=default: 1 of 2 runs are below 6.6e+03 parameters or 1.4e+05 training tokens"
    )


@given(st.floats(1, 1e9), st.sampled_from([16, 64, 1024]))
def test_batches_are_whole_sequences_near_what_was_wanted(tokens, context):
    batch = round_batch(tokens, context)
    assert batch % context == 0
    assert batch >= context
    if tokens >= 8 * context:
        assert abs(batch / tokens - 1) < 0.07


def test_batches_by_hand():
    assert [round_batch(64 * s, 64) // 64 for s in (0.3, 1.4, 7.4, 15.6, 17, 18.9, 100, 1000)] == [
        1,
        1,
        7,
        16,
        16,
        18,
        96,
        1024,
    ]


def test_compile_rule_depends_on_the_plan_alone(monkeypatch):
    monkeypatch.setattr("scaling_lab.planning.execution.can_compile_on_cpu", lambda: True)
    plan = make_plan(settings())
    flops: dict[object, float] = {}
    for run in plan.runs:
        flops[run.spec.shape] = flops.get(run.spec.shape, 0) + run.spec.train_flops()
    for run in plan.runs:
        assert run.execution.compile == (flops[run.spec.shape] >= MIN_COMPILED_FLOPS)
    assert {r.execution.compile for r in plan.runs} == {True, False}
    monkeypatch.setattr("scaling_lab.planning.execution.can_compile_on_cpu", lambda: False)
    assert not any(r.execution.compile for r in make_plan(settings()).runs)
    forced = settings(execution=ExecutionSettings(compile="true"))
    assert all(r.execution.compile for r in make_plan(forced).runs)
    assert not any(
        r.execution.compile for r in make_plan(settings(execution=ExecutionSettings(device="mps"))).runs
    )


def test_runs_of_a_small_shape_share_a_program_whatever_their_batch():
    runs = [run.spec for run in make_plan(settings()).runs]
    assert len({spec.batch_tokens for spec in runs}) > 1
    assert {program_key(spec) for spec in runs} == {(spec.shape,) for spec in runs}
    large = replace(runs[0], shape=replace(runs[0].shape, width=512, depth=8, heads=8))
    assert large.count().params.total > LIBRARY_PARAMS
    assert program_key(large) != program_key(replace(large, batch_tokens=2 * large.batch_tokens))


def test_budgets_in_another_convention():
    plan = make_plan(settings(convention=Convention.MATMUL_PLUS_ATTENTION))
    run = plan.runs[-1].spec
    per_token = run.count().flops_per_token(Convention.MATMUL_PLUS_ATTENTION)
    assert run.train_flops() == pytest.approx(per_token * run.train_tokens)
    assert run.train_flops() == pytest.approx(run.budget_flops, rel=0.02)


def test_cost_and_description():
    plan = make_plan(settings())
    rows = describe(plan, 10_000_000)
    assert [r.run_id for r in rows] == [r.run_id for r in plan.runs]
    assert rows[0].epochs == pytest.approx(rows[0].train_tokens / 1e7)
    one, two = estimate_plan_seconds(plan.runs, 1), estimate_plan_seconds(plan.runs, 2)
    assert one is not None
    assert two is not None
    assert two < one < 2 * two + 10
    gpu = make_plan(settings(execution=ExecutionSettings(device="cuda")))
    assert estimate_seconds(gpu.runs[0]) is None
    assert estimate_plan_seconds(gpu.runs, 2) is None


def test_a_single_run_without_a_depth_takes_the_ladders():
    run = plan_single(settings(model=ModelSettings(width=160)), 200_000)
    assert run.spec.shape.depth == SizeLadder().depth(160) == 4


def test_single_run():
    run = plan_single(settings(model=ModelSettings(width=32, depth=2)), 200_000)
    assert run.spec.role == "single"
    assert run.spec.train_tokens % run.spec.batch_tokens == 0
    assert abs(run.spec.train_tokens - 200_000) <= run.spec.batch_tokens / 2
    assert run.spec.budget_flops == run.spec.train_flops()
