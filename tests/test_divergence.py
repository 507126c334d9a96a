"""When a run has diverged: hand-made loss curves, and the state kept in checkpoints."""

from __future__ import annotations

import json
import math
import random

import pytest

from helpers.specs import tiny
from scaling_lab.training.measure.divergence import DivergenceDetector

UNIFORM = math.log(256)


def first_diverged(losses: list[float], steps: int | None = None) -> int | None:
    """The step (from 1) at which a run with these losses has diverged."""
    detector = DivergenceDetector(tiny(steps or len(losses)))
    return next((i for i, loss in enumerate(losses, 1) if detector.step(loss)), None)


def descent(steps: int, noise: float = 0.2) -> list[float]:
    """Losses from 5.5 nats down to 2, with the scatter of small batches."""
    rng = random.Random(0)
    return [2 + 3.5 * math.exp(-10 * i / steps) + rng.gauss(0, noise) for i in range(steps)]


def test_an_ordinary_run_has_not_diverged():
    for steps in (1, 5, 40, 300, 5_000):
        assert first_diverged(descent(steps)) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_non_finite_loss_ends_the_run_immediately(loss):
    assert first_diverged([3.0, 2.9, loss, 2.8]) == 3


def test_a_loss_far_above_a_uniform_guess_is_divergence():
    assert first_diverged([UNIFORM + 3.01] * 100, 10_000) == 32
    assert first_diverged([UNIFORM + 2.9] * 100, 10_000) is None
    assert first_diverged([*[UNIFORM + 3.01] * 31, 3.0] * 5, 10_000) is None


def test_far_above_its_own_best_and_staying_there():
    """4 nats are below a uniform guess of 5.5, but two above the run's best: 5% of 4,000 steps are 200."""
    before = descent(2_000, noise=0.1)
    assert first_diverged(before + [4.0] * 2_000) == 2_200
    # A spike that recovers, however high it is.
    assert (
        first_diverged(before + [8.0] * 31 + [4.0] * 160 + descent(1_809, noise=0.1)[1_000:], 4_000) is None
    )
    # A run that stays less than a nat above its best has not diverged.
    assert first_diverged(before + [2.9] * 2_000) is None


def test_at_the_end_of_a_run_a_shorter_rise_is_enough():
    before = descent(3_960, noise=0.1)
    assert first_diverged(before + [4.0] * 40) == 4_000
    assert first_diverged(before + [4.0] * 40, 8_000) is None
    assert first_diverged(descent(3_980, noise=0.1) + [4.0] * 20) is None


def test_a_resumed_run_diverges_at_the_same_step():
    losses = descent(500, noise=0.1) + [4.0] * 500
    whole = first_diverged(losses)
    assert whole == 550
    for stop in (1, 20, 31, 32, 400, 510, 549):
        detector = DivergenceDetector(tiny(1_000))
        for loss in losses[:stop]:
            detector.step(loss)
        resumed = DivergenceDetector(tiny(1_000), json.loads(json.dumps(detector.state(), allow_nan=False)))
        assert stop + next(i for i, loss in enumerate(losses[stop:], 1) if resumed.step(loss)) == whole
        assert resumed.reason is not None
        assert "its own best of 1.9" in resumed.reason
