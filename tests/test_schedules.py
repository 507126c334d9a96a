"""Schedules at hand-computed points, and their properties."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_lab.core.errors import UserError
from scaling_lab.core.schedules import Constant, Cosine, InverseSqrt, MultiStep, WarmupStableDecay


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.05, 0.5),  # half of the warm-up
        (0.1, 1.0),  # its end
        (0.55, 0.55),  # half of the cosine: the mean of 1 and 0.1
        (0.325, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        (1.0, 0.1),  # exactly the final multiplier
    ],
)
def test_cosine_by_hand(progress, expected):
    assert Cosine(warmup_fraction=0.1, final_fraction=0.1).multiplier(progress) == pytest.approx(
        expected, abs=1e-12
    )


def test_longer_horizon_ends_early_in_its_cosine():
    """A horizon of twice the run: at the end of the run half of the cosine is done."""
    schedule = Cosine(warmup_fraction=0.0, final_fraction=0.0, horizon_fraction=2.0)
    assert schedule.multiplier(1.0) == pytest.approx(0.5)


def test_shorter_horizon_stays_at_the_end():
    schedule = Cosine(warmup_fraction=0.0, final_fraction=0.1, horizon_fraction=0.5)
    assert schedule.multiplier(0.5) == pytest.approx(0.1)
    assert schedule.multiplier(1.0) == pytest.approx(0.1)


@given(st.floats(0, 0.9), st.floats(0, 1), st.lists(st.floats(1e-6, 1), min_size=2, max_size=20))
def test_cosine_falls_after_warmup_and_stays_in_range(warmup, final, points):
    schedule = Cosine(warmup_fraction=warmup, final_fraction=final)
    after = [schedule.multiplier(p) for p in sorted(points) if p >= warmup]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(0 <= schedule.multiplier(p) <= 1 + 1e-12 for p in points)


def test_a_horizon_that_is_all_warmup_has_nothing_to_decay():
    schedule = Cosine(warmup_fraction=1.0)
    assert [schedule.multiplier(p) for p in (0.25, 0.5, 1.0)] == [0.25, 0.5, 1.0]


def test_without_warmup_the_schedule_starts_at_the_peak():
    assert Cosine(warmup_fraction=0.0).multiplier(1e-9) == pytest.approx(1.0)
    assert Constant(warmup_fraction=0.0).multiplier(1e-9) == 1.0


def test_constant():
    assert [Constant(warmup_fraction=0.5).multiplier(p) for p in (0.25, 0.5, 1.0)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("field", ["warmup_fraction", "final_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_fractions_are_checked(field, value):
    with pytest.raises(UserError, match=f"schedule.{field}"):
        Cosine(**{field: value})


@pytest.mark.parametrize(
    ("cooldown", "progress", "expected"),
    [
        ("sqrt", 0.05, 0.5),
        ("sqrt", 0.1, 1.0),
        ("sqrt", 0.8, 1.0),
        ("sqrt", 0.85, 0.5),  # a quarter of the cooldown: 1 - sqrt(1/4)
        ("linear", 0.85, 0.75),
        ("sqrt", 1.0, 0.0),
        ("linear", 1.0, 0.0),
    ],
)
def test_wsd_by_hand(cooldown, progress, expected):
    schedule = WarmupStableDecay(warmup_fraction=0.1, decay_fraction=0.2, cooldown=cooldown)
    assert schedule.multiplier(progress) == pytest.approx(expected, abs=1e-12)


def test_wsd_ends_at_its_final_fraction():
    assert WarmupStableDecay(final_fraction=0.1).multiplier(1.0) == pytest.approx(0.1)
    with pytest.raises(UserError, match="schedule.cooldown='cosine'"):
        WarmupStableDecay(cooldown="cosine")
    with pytest.raises(UserError, match="overlap"):
        WarmupStableDecay(warmup_fraction=0.5, decay_fraction=0.6)


def test_inverse_sqrt_by_hand():
    schedule = InverseSqrt(warmup_fraction=0.04)
    assert [schedule.multiplier(p) for p in (0.02, 0.04, 0.16, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.2])


def test_multi_step_by_hand():
    schedule = MultiStep(warmup_fraction=0.1)
    points = (0.05, 0.1, 0.8, 0.85, 0.9, 0.95, 1.0)
    assert [schedule.multiplier(p) for p in points] == [0.5, 1.0, 1.0, 0.316, 0.316, 0.1, 0.1]
    with pytest.raises(UserError, match="schedule.second_step"):
        MultiStep(first_step=0.9, second_step=0.8)


@given(st.floats(1e-9, 1))
def test_every_schedule_stays_between_zero_and_one(progress):
    for schedule in (Cosine(), Constant(), WarmupStableDecay(), InverseSqrt(), MultiStep()):
        assert 0 <= schedule.multiplier(progress) <= 1
