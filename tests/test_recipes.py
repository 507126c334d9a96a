"""The published recipes at published or hand-computed points, and what a plan requires of every recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

from scaling_lab.core.counts import FlopCount, ModelCount, ParamCount
from scaling_lab.core.errors import UserError
from scaling_lab.core.registry import members
from scaling_lab.core.schedules import Constant, Cosine, MultiStep
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.designs.learning_rate import LearningRateDesign
from scaling_lab.planning.plan import make_plan, plan_single
from scaling_lab.planning.recipes.base import SweepHorizons
from scaling_lab.planning.recipes.chinchilla import ChinchillaRecipe
from scaling_lab.planning.recipes.deepseek import DeepSeekRecipe
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.recipes.kaplan import KaplanRecipe
from scaling_lab.planning.recipes.porian import PorianRecipe
from scaling_lab.planning.recipes.step_law import StepLawRecipe
from scaling_lab.planning.settings import ModelSettings, SweepSettings
from scaling_lab.planning.sizes import SizeLadder

RECIPES = members("scaling_lab.planning.recipes")


@dataclass(frozen=True)
class OfSize:
    """A shape that has `n` non-embedding parameters, no head, and attention's FLOPs as given."""

    n: int
    attention_flops_per_token: float = 0.0
    context: int = 2048
    width: int = 64
    depth: int = 2

    def count(self) -> ModelCount:
        return ModelCount(
            ParamCount(0, 0, self.n, 0), FlopCount(6.0 * self.n, 0.0, self.attention_flops_per_token)
        )


ALONE = SweepHorizons(1e9, 1e9)


GRID = IsoFlopDesign(sizes=SizeLadder(width_ratio=1.26))


def settings(recipe, **changes) -> SweepSettings:
    base = SweepSettings(
        sweep="t",
        design=GRID,
        recipe=recipe,
        model=ModelSettings(),
        data=PySource(),
        schedule=Cosine(),
    )
    return replace(base, **changes)


def test_porian_at_its_reference_point_and_an_eighth_of_it():
    chosen = PorianRecipe().decide(OfSize(108_000_000), 2e9, ALONE)
    assert (chosen.optimizer.peak_lr, chosen.batch_tokens) == (pytest.approx(0.0047), 160 * 2048)
    assert chosen.warmup_fraction == pytest.approx(0.054)  # 108M of 2B tokens
    assert chosen.optimizer.beta2 == 0.95
    assert not chosen.notes
    eighth = PorianRecipe().decide(OfSize(13_500_000), 2e9, ALONE)
    assert eighth.optimizer.peak_lr == pytest.approx(0.0094)  # 8^(1/3) = 2
    assert eighth.batch_tokens == 40 * 2048  # 8^(2/3) = 4
    assert eighth.optimizer.beta2 == 0.99
    # The decay per step, LR times weight decay, equals the paper's at every size.
    assert eighth.optimizer.peak_lr * eighth.optimizer.weight_decay == pytest.approx(1e-4)


def test_step_law_by_hand():
    """ln LR = ln 1.79 - .713 ln 1e9 + .307 ln 1e11 = .5822 - 14.7757 + 7.7758; ln B = ln .58 + .571 ln 1e11."""
    chosen = StepLawRecipe().decide(OfSize(10**9), 1e11, ALONE)
    assert chosen.optimizer.peak_lr == pytest.approx(math.exp(-6.4177), rel=1e-3)
    assert chosen.batch_tokens == pytest.approx(math.exp(13.9178), rel=0.07)
    assert chosen.rule_batch_tokens == pytest.approx(math.exp(13.9178), rel=1e-3)
    assert chosen.optimizer.peak_lr * chosen.schedule.multiplier(1.0) == pytest.approx(1e-5)
    assert chosen.warmup_fraction == pytest.approx(2000 * chosen.batch_tokens / 1e11)
    # A tiny run has fewer than 2000 steps: a tenth of it.
    tiny = StepLawRecipe().decide(OfSize(10_000, context=64), 1e6, ALONE)
    assert tiny.warmup_fraction == pytest.approx(0.1)
    assert "was fitted at 6e+07 to 1e+09" in tiny.notes[0]
    (short,) = StepLawRecipe().decide(OfSize(10**9), 1e9, ALONE).notes
    assert "was fitted at 4e+09 to 1e+11 training tokens" in short
    assert not chosen.notes


def test_deepseek_gives_what_deepseek_7b_was_trained_with():
    """Table 2 of the paper: 30 layers, width 4096, context 4096, 2.0T tokens: LR 4.2e-4, batch 2304 sequences of 4096."""
    layers, width, context = 30, 4096, 4096
    shape = OfSize(12 * layers * width**2, 12.0 * layers * width * context, context)
    chosen = DeepSeekRecipe().decide(shape, 2.0e12, ALONE)
    assert chosen.optimizer.peak_lr == pytest.approx(4.2e-4, rel=0.02)
    assert chosen.rule_batch_tokens == pytest.approx(2304 * 4096, rel=0.03)
    assert chosen.schedule == MultiStep()


def test_kaplan_by_hand():
    """LR(1e6) = .003239 - .0001395 * 13.8155; warm-up, batch and horizon are the sweep's for every run."""
    sweep = SweepHorizons(smallest_budget_tokens=1.5e6, longest_tokens=8e6)
    short, long = (KaplanRecipe().decide(OfSize(10**6, context=64), d, sweep) for d in (2e6, 8e6))
    assert short.optimizer.peak_lr == long.optimizer.peak_lr == pytest.approx(0.0013117, rel=1e-4)
    assert short.batch_tokens == long.batch_tokens == 1024  # 1.5e6 / 1500 = 1000, 15.6 sequences
    # 3000 of 6200 steps of the smallest budget: 725,806 tokens.
    assert (short.warmup_fraction * 2e6, long.warmup_fraction * 8e6) == pytest.approx((725806.45, 725806.45))
    # The short run ends where the long run's cosine is at 2M of its 8M tokens.
    at_2m = replace(long.schedule, warmup_fraction=long.warmup_fraction).multiplier(0.25)
    at_its_end = replace(short.schedule, warmup_fraction=short.warmup_fraction).multiplier(1.0)
    assert at_its_end == pytest.approx(at_2m)
    assert at_its_end > 0.8
    assert long.schedule.horizon_fraction == 1.0
    assert (short.optimizer.weight_decay, short.optimizer.beta2) == (0.0, 0.999)
    with pytest.raises(UserError, match="recipe=kaplan: LR"):
        KaplanRecipe().decide(OfSize(10**11), 1e9, ALONE)


def test_a_run_that_ends_within_the_warmup_ends_below_the_peak():
    """Half of the warm-up's tokens: the LR rises linearly to half of the peak, as it would in the longer run."""
    sweep = SweepHorizons(smallest_budget_tokens=6.2e6, longest_tokens=6.2e6)  # warm-up of 3M tokens
    whole = KaplanRecipe().decide(OfSize(10**6, context=64), 6.2e6, sweep)
    half = KaplanRecipe().decide(OfSize(10**6, context=64), 1.5e6, sweep)
    assert half.warmup_fraction == 1.0
    assert half.optimizer.peak_lr == pytest.approx(whole.optimizer.peak_lr / 2)
    assert any("ends during the recipe's warmup" in note for note in half.notes)


def test_chinchilla_at_the_ends_of_its_range():
    sweep = SweepHorizons(smallest_budget_tokens=1.8e6, longest_tokens=8e6)
    small, large, tiny = (
        ChinchillaRecipe().decide(OfSize(n, context=64), 2e6, sweep) for n in (7 * 10**7, 16 * 10**9, 10**4)
    )
    assert small.optimizer.peak_lr == pytest.approx(2e-4)
    assert large.optimizer.peak_lr == pytest.approx(1.25e-4)
    assert tiny.optimizer.peak_lr == pytest.approx(2e-4)
    assert not small.notes
    assert "was fitted at 7e+07 to 1.6e+10 parameters" in tiny.notes[0]
    assert small.warmup_fraction == pytest.approx(0.15e6 / 2e6)  # a twelfth of 1.8M tokens
    assert small.batch_tokens == 18 * 64  # 1200 tokens are 18.75 sequences, four bits of it 18
    assert small.schedule == Cosine(final_fraction=0.1)


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_every_recipe_plans_a_tiny_sweep_and_reports_its_rounding(kind):
    plan = make_plan(settings(RECIPES[kind]()))
    assert len(plan.runs) >= 20
    for run in plan.runs:
        spec = run.spec
        assert (
            abs(spec.train_flops() / spec.budget_flops - 1)
            <= spec.batch_tokens / 2 / spec.train_tokens * 1.01
        )
        assert spec.steps >= 50
        assert 0 < spec.schedule.multiplier(spec.schedule.warmup_fraction) <= 1
    assert any(line.startswith("batches are rounded to whole sequences") for line in plan.rounding)
    outside = [note for note in plan.notes if "was fitted at" in note]
    # All but our own and Kaplan's, whose sweep started at 768 parameters, were fitted at far larger sizes.
    assert len(outside) == (0 if kind in ("default", "kaplan") else 1)


@pytest.mark.parametrize("kind", sorted(set(RECIPES) - {"default"}))
def test_a_field_that_is_set_replaces_its_rule(kind):
    shape = GPTShape(width=32, depth=2, heads=2)
    chosen = RECIPES[kind](peak_lr=0.01, batch_tokens=640, warmup_fraction=0.1).decide(shape, 1e6, ALONE)
    assert (chosen.optimizer.peak_lr, chosen.batch_tokens, chosen.warmup_fraction) == (0.01, 640, 0.1)
    assert chosen.rule_batch_tokens is None
    for field, value in (("peak_lr", 0.0), ("warmup_fraction", 2.0)):
        with pytest.raises(UserError, match=f"recipe.{field}"):
            RECIPES[kind](**{field: value})
    with pytest.raises(UserError, match="recipe.batch_tokens=100"):
        RECIPES[kind](batch_tokens=100).decide(shape, 1e6, ALONE)


def test_a_recipe_with_its_own_schedule_reports_that_the_given_one_is_unused():
    plan = make_plan(settings(KaplanRecipe(), schedule=Constant()))
    assert "recipe=kaplan has its own schedule (cosine): schedule=constant is not used." in plan.notes
    assert all(run.spec.schedule.kind == "cosine" for run in plan.runs)
    assert not any("not used" in note for note in make_plan(settings(KaplanRecipe())).notes)
    constant = make_plan(settings(PorianRecipe(), schedule=Constant()))
    assert all(run.spec.schedule.kind == "constant" for run in constant.runs)


def test_kaplans_horizon_is_the_longest_run_of_the_sweep():
    specs = [run.spec for run in make_plan(settings(KaplanRecipe())).runs]
    horizons = {s.schedule.horizon_fraction * s.train_tokens for s in specs}
    assert max(horizons) == pytest.approx(max(s.train_tokens for s in specs), rel=1e-3)
    assert min(horizons) == pytest.approx(max(horizons), rel=1e-2)
    assert len({s.batch_tokens for s in specs}) == 1


def test_a_learning_rate_sweep_uses_the_grid_that_it_tunes():
    """Kaplan's batch is the same in the sweep and in its LR sweep, which has only two of the six sizes."""
    tuned = LearningRateDesign(
        GRID.budgets_flops, grid_sizes=6, sizes_per_budget=2, lr_multipliers=(1,), sizes=GRID.sizes
    )
    of_the_grid = {run.run_id for run in make_plan(settings(KaplanRecipe())).runs}
    assert {run.run_id for run in make_plan(settings(KaplanRecipe(), design=tuned)).runs} < of_the_grid


def test_a_single_run_counts_as_its_own_sweep():
    model = ModelSettings(width=32, depth=2)
    spec = plan_single(settings(KaplanRecipe(), model=model), 300_000).spec
    assert spec.schedule.horizon_fraction == 1.0
    assert spec.schedule.warmup_fraction == pytest.approx(3000 / 6200)


def test_default_stays_within_its_own_bounds():
    with pytest.raises(UserError, match="recipe.batch_tokens=100"):
        DefaultRecipe(batch_tokens=100).decide(GPTShape(width=32, depth=2, heads=2), 1e6, ALONE)
