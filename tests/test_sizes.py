"""The ladder of sizes: evenly spaced in ln N, within its tolerance, distinct; heads and vocabularies by device."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from helpers.sweeps import settings
from scaling_lab.core.errors import UserError
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.designs.learning_rate import LearningRateDesign
from scaling_lab.planning.plan import Shapes, make_plan, plan_single
from scaling_lab.planning.settings import ExecutionSettings, ModelSettings
from scaling_lab.planning.sizes import ASPECT_FACTOR, SizeLadder, best_windows, evenly_spaced

CUDA = ExecutionSettings(device="cuda", memory_gb=80)
LARGE = IsoFlopDesign(budgets_flops=(1e16, 1e17, 1e18), sizes=SizeLadder(max_width=2048))


@given(
    low=st.integers(2, 200),
    factor=st.floats(1, 8),
    ratio=st.floats(1.02, 4),
    multiple=st.sampled_from([None, 1, 2, 4, 16, 64]),
    device=st.sampled_from(["cpu", "cuda"]),
    offset=st.floats(0, 1),
    vocab=st.sampled_from([50, 256, 50_000]),
)
@examples(max_examples=60, deadline=None)
def test_rungs_are_evenly_spaced_near_their_targets_and_distinct(
    low, factor, ratio, multiple, device, offset, vocab
):
    ladder = SizeLadder(low, int(low * factor), ratio, multiple)
    execution = CUDA if device == "cuda" else ExecutionSettings()
    shapes = Shapes(
        settings(execution=execution, data=ContextTree(symbols=vocab) if vocab == 50 else settings().data)
    )
    if not (candidates := shapes.candidates(ladder)):
        return
    log_n = [math.log(s.count().n_params(shapes.convention)) for s in candidates]
    assert log_n == sorted(log_n)
    for s in candidates:
        rule = max(ladder.min_depth, s.width / ladder.aspect_ratio)
        assert abs(math.log(s.depth / rule)) <= math.log(ASPECT_FACTOR) + 1e-9
        assert low <= s.width <= int(low * factor)
        step = multiple or (4 if device == "cpu" else 64 if s.width >= 256 else 16)
        assert s.width % step == 0
    tolerance = ladder.max_error(device)
    assert tolerance == (0.03 if device == "cpu" else 0.10)
    rungs = evenly_spaced(log_n, candidates, log_n[0] + offset * math.log(ratio), math.log(ratio), tolerance)
    assert all(b - a == pytest.approx(math.log(ratio)) for a, b in pairwise(rungs.targets))
    met = [(s, t) for s, t in zip(rungs.shapes, rungs.targets, strict=True) if s is not None]
    reached = [math.log(s.count().n_params(shapes.convention)) for s, _ in met]
    assert all(b > a for a, b in pairwise(reached))
    for n, (_, target) in zip(reached, met, strict=True):
        assert abs(n - target) <= tolerance
        # The nearest one.
        assert abs(n - target) <= min(abs(other - target) for other in log_n) + 1e-12


def test_a_missing_rung_is_missing_for_a_reason():
    """By hand: targets 0, 1, 2, 3 with shapes at 0.02, 1.05, 2.01, 2.9."""
    rungs = evenly_spaced([0.02, 1.05, 2.01, 2.9], "abcd", 0.0, 1.0, 0.03)
    assert rungs.shapes == ("a", None, "c")
    assert rungs.errors == pytest.approx((0.02, 0.05, 0.01))
    # Two targets nearest to the same shape: the first has it.
    assert evenly_spaced([0.0, 5.0], "ab", 0.0, 0.02, 0.03).shapes[:3] == ("a", None, None)


def test_the_offset_and_the_step_with_the_fewest_missing_sizes_are_taken():
    log_n = [0.3, 1.31, 2.29, 3.3, 4.31, 5.3]
    rungs, windows, step = best_windows(log_n, "abcdef", [1.8, 3.8], 4, [0.9, 1.0, 1.1], 0.03)
    assert step == 1.0
    assert [[rungs.shapes[i] for i in w.met] for w in windows] == [list("abcd"), list("cdef")]
    assert all(abs(w.off_center) < 0.05 for w in windows)
    assert best_windows(log_n, "abcdef", [1.8], 4, [2.0], 0.03) is None


def windows_of(plan) -> dict[float, list]:
    """Shapes by budget, ascending in N."""
    return {
        b: sorted(
            {r.spec.shape for r in plan.runs if r.spec.budget_flops == b},
            key=lambda s: s.count().params.total,
        )
        for b in plan.budgets_flops
    }


@pytest.mark.parametrize("design", [IsoFlopDesign(sizes=SizeLadder(width_multiple=2)), LARGE])
def test_the_sizes_of_a_budget_span_a_factor_10_to_16(design):
    cuda = design is LARGE
    plan = make_plan(settings(design=design, max_epochs=1e9, execution=CUDA if cuda else ExecutionSettings()))
    for budget, shapes in windows_of(plan).items():
        log_n = [math.log(s.count().n_params(plan.convention)) for s in shapes]
        assert len(shapes) == 6
        slack = 2 * design.sizes.max_error("cuda" if cuda else "cpu")
        assert math.log(10) - slack <= log_n[-1] - log_n[0] <= math.log(16) + slack
        step = (log_n[-1] - log_n[0]) / 5
        assert all(abs(b - a - step) < 2 * slack for a, b in pairwise(log_n))
        # The expected optimum is in the middle, at most half a step off.
        assert abs((log_n[0] + log_n[-1]) / 2 - math.log(design.n_opt_guess(budget))) < step / 2 + slack


def test_fewer_sizes_where_widths_are_too_coarse_and_the_plan_says_so():
    plan = make_plan(settings(design=IsoFlopDesign()))
    missing = [note for note in plan.notes if "fewer than design.sizes_per_budget=6 sizes" in note]
    counts = {b: len(s) for b, s in windows_of(plan).items()}
    assert 4 <= min(counts.values()) < 6
    assert len(missing) == 1
    assert all(f"{n} at {b:.3g}" in missing[0] for b, n in counts.items())
    complete = make_plan(settings(design=IsoFlopDesign(sizes=SizeLadder(width_multiple=2))))
    assert not any("fewer than" in note for note in complete.notes)
    assert any("those of a budget span a factor 1" in note for note in complete.notes)


def test_the_ratio_in_n_is_an_option():
    plan = make_plan(settings(design=IsoFlopDesign(sizes=SizeLadder(ratio=1.4, tolerance=0.1))))
    for shapes in windows_of(plan).values():
        n = [s.count().n_params(plan.convention) for s in shapes]
        assert all(math.log(b / a) == pytest.approx(math.log(1.4), abs=0.2) for a, b in pairwise(n))
    with pytest.raises(
        UserError, match=r"design.sizes.ratio=1.4 \(of N\) and design.sizes.width_ratio=1.26 exclude"
    ):
        SizeLadder(ratio=1.4, width_ratio=1.26)
    with pytest.raises(UserError, match=r"design.span=12 and design.sizes.ratio=1.4 exclude"):
        IsoFlopDesign(span=12, sizes=SizeLadder(ratio=1.4))
    with pytest.raises(UserError, match="raise max_width") as error:
        make_plan(settings(design=IsoFlopDesign(sizes=SizeLadder(max_width=16))))
    assert "\n" not in str(error.value)


def test_windows_beyond_the_ladder_are_named():
    plan = make_plan(settings(design=replace(LARGE, sizes=SizeLadder()), execution=CUDA, max_epochs=1e9))
    off = [note for note in plan.notes if "design.sizes.max_width=256" in note]
    assert len(off) == 3
    assert "the expected optimum: raise" in off[0]


def test_heads_never_jump_in_a_valley():
    """Heads are fixed on a CPU; on CUDA fixed below width 256 and 64 wide from there on."""
    plan = make_plan(settings(design=IsoFlopDesign()))
    assert len({run.spec.shape.heads for run in plan.runs}) == 1
    plan = make_plan(settings(design=LARGE, execution=CUDA, max_epochs=1e9))
    for shape in {run.spec.shape for run in plan.runs}:
        assert (
            (shape.heads, shape.head_dim) == (4, shape.width // 4)
            if shape.width < 256
            else shape.head_dim == 64
        )
    # Given numbers of heads, only widths that they divide into even parts.
    plan = make_plan(
        settings(model=ModelSettings(heads=4), design=IsoFlopDesign(sizes=SizeLadder(tolerance=0.2)))
    )
    assert {run.spec.shape.heads for run in plan.runs} == {4}
    assert all(run.spec.shape.width % 8 == 0 for run in plan.runs)
    # A head dimension to aim for is what earlier versions had.
    old = make_plan(
        settings(model=ModelSettings(head_dim=16), design=IsoFlopDesign(sizes=SizeLadder(width_ratio=1.26)))
    )
    assert {run.spec.shape.heads for run in old.runs} == {1, 2, 4, 5}


def test_vocabularies_are_padded_on_cuda_and_counted_as_computed():
    data = ContextTree(symbols=50)
    design = LearningRateDesign(budgets_flops=(1e12,), widths=(64,), lr_multipliers=(1.0,))
    on_cpu, on_cuda = (
        make_plan(settings(data=data, design=design, execution=e)).runs[0].spec
        for e in (ExecutionSettings(), CUDA)
    )
    assert (on_cpu.shape.vocab_size, on_cuda.shape.vocab_size) == (data.vocab_size, 128)
    assert on_cuda.data.vocab_size == data.vocab_size
    more = 64 * (128 - data.vocab_size)
    assert on_cuda.n_params() - on_cpu.n_params() == more
    assert on_cuda.shape.count().params.total - on_cpu.shape.count().params.total == 2 * more
    # The same budget pays for fewer tokens.
    assert on_cuda.train_tokens < on_cpu.train_tokens
    kept = make_plan(
        settings(data=data, design=design, execution=CUDA, model=ModelSettings(vocab_multiple=1))
    )
    assert kept.runs[0].spec.shape.vocab_size == data.vocab_size
    single = plan_single(settings(data=data, execution=CUDA, model=ModelSettings(width=64, depth=2)), 100_000)
    assert single.spec.shape.vocab_size == 128
    with pytest.raises(UserError, match="model.vocab_multiple=0"):
        ModelSettings(vocab_multiple=0)
