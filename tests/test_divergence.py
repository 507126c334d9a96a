"""When a run is lost: hand-made curves of losses, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
import random

import pytest

from helpers.specs import tiny
from scaling_lab.training.measure.divergence import DivergenceDetector

UNIFORM = math.log(256)


def first_lost(losses: list[float], steps: int | None = None) -> int | None:
    """The step (from 1) at which a run with these losses counts as lost."""
    detector = DivergenceDetector(tiny(steps or len(losses)))
    return next((i for i, loss in enumerate(losses, 1) if detector.step(loss)), None)


def descent(steps: int, noise: float = 0.2) -> list[float]:
    """5.5 nats down to 2, with the scatter of small batches."""
    rng = random.Random(0)
    return [2 + 3.5 * math.exp(-10 * i / steps) + rng.gauss(0, noise) for i in range(steps)]


def test_an_ordinary_run_is_not_lost():
    for steps in (1, 5, 40, 300, 5_000):
        assert first_lost(descent(steps)) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_at_once(loss):
    assert first_lost([3.0, 2.9, loss, 2.8]) == 3


def test_far_above_a_uniform_guess():
    assert first_lost([UNIFORM + 3.01] * 100, 10_000) == 32
    assert first_lost([UNIFORM + 2.9] * 100, 10_000) is None
    assert first_lost([*[UNIFORM + 3.01] * 31, 3.0] * 5, 10_000) is None


def test_far_above_its_own_best_and_it_stays():
    """4 nats are below a uniform guess of 5.5, and two above what the run had reached: 5% of 4,000 steps are 200."""
    before = descent(2_000, noise=0.1)
    assert first_lost(before + [4.0] * 2_000) == 2_200
    # A spike that comes back, however high below the other limit.
    assert first_lost(before + [8.0] * 31 + [4.0] * 160 + descent(1_809, noise=0.1)[1_000:], 4_000) is None
    # Less than a nat above its best is a bad run, but a run.
    assert first_lost(before + [2.9] * 2_000) is None


def test_at_the_end_of_a_run_a_rise_need_not_stay_as_long():
    before = descent(3_960, noise=0.1)
    assert first_lost(before + [4.0] * 40) == 4_000
    assert first_lost(before + [4.0] * 40, 8_000) is None
    assert first_lost(descent(3_980, noise=0.1) + [4.0] * 20) is None


def test_a_resumed_run_is_lost_at_the_same_step():
    losses = descent(500, noise=0.1) + [4.0] * 500
    whole = first_lost(losses)
    assert whole == 550
    for stop in (1, 20, 31, 32, 400, 510, 549):
        detector = DivergenceDetector(tiny(1_000))
        for loss in losses[:stop]:
            detector.step(loss)
        resumed = DivergenceDetector(tiny(1_000), json.loads(json.dumps(detector.state(), allow_nan=False)))
        assert stop + next(i for i, loss in enumerate(losses[stop:], 1) if resumed.step(loss)) == whole
        assert resumed.reason is not None
        assert "its own best of 1.9" in resumed.reason
