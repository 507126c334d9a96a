"""The gradient noise scale: the estimator on gradients with known noise, and the probe compared with a whole corpus."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from helpers.runs import train
from helpers.specs import tiny
from scaling_lab.core.spec import EvalSpec, Execution
from scaling_lab.core.storage.store import RunStore
from scaling_lab.training.engine.gradient import make_gradient
from scaling_lab.training.measure.noise_scale import (
    PROBE_SEQUENCES,
    NoiseProbe,
    measured_steps,
    noise_from_norms,
)
from scaling_lab.training.run.session import open_session


def test_estimator_by_hand():
    """|G|^2 = 2 and tr(S) = 12 per token: |g|^2 is 2 + 12/4 = 5 at 4 tokens and 2 + 12/24 = 2.5 at 24."""
    found = noise_from_norms(5.0, 2.5, 4, 24)
    assert (found.gradient_square, found.trace_tokens) == (pytest.approx(2), pytest.approx(12))
    assert found.scale_tokens == pytest.approx(6)
    assert noise_from_norms(5.0, 0.5, 4, 24).scale_tokens is None  # all noise: |G|^2 would be negative


def test_estimator_is_unbiased_on_gaussian_gradients():
    rng = np.random.default_rng(0)
    g = rng.normal(size=50)
    true_trace = 50 * 9.0
    found = []
    for _ in range(2000):
        parts = g + rng.normal(scale=3 / np.sqrt(8), size=(PROBE_SEQUENCES, 50))  # means of 8 tokens each
        found.append(
            noise_from_norms((parts**2).sum(1).mean(), (parts.mean(0) ** 2).sum(), 8, 8 * PROBE_SEQUENCES)
        )
    assert np.mean([n.trace_tokens for n in found]) == pytest.approx(true_trace, rel=0.02)
    assert np.mean([n.gradient_square for n in found]) == pytest.approx((g**2).sum(), rel=0.02)


def test_probe_agrees_with_the_gradients_of_all_sequences():
    """tr(S) and |G|^2 over 1,600 sequences by brute force, and the probe's means over 25 measurements."""
    spec = tiny(10)
    session = open_session(spec, Execution())
    step = session.step
    gradient = make_gradient(step.model, step.layout, spec, 1)
    probe = NoiseProbe(step.model, step.layout, spec)
    # Batches of 4 sequences: every sixteenth step's probe sees 64 others.
    measured = [probe.measure(step.flat, session.feed.windows(0, 64 * k, PROBE_SEQUENCES)) for k in range(25)]
    starts = torch.from_numpy(session.order.windows(0, 1600) * 64)
    gradients = torch.stack([gradient(step.flat, start[None], step.tokens)[0] for start in starts])
    mean = gradients.mean(0)
    trace = (gradients - mean).square().sum(1).mean().item() * 64 * 1600 / 1599
    square = mean.square().sum().item() - trace / (64 * 1600)
    assert np.mean([m.trace_tokens for m in measured]) == pytest.approx(trace, rel=0.05)
    assert np.mean([m.gradient_square for m in measured]) == pytest.approx(square, rel=0.05)


def test_a_measurement_causes_no_warnings():
    """`scaling-lab train` shows torch's warnings, and a user can do nothing about the one on vmap."""
    spec = tiny(10)
    session = open_session(spec, Execution())
    windows = session.feed.windows(0, 0, PROBE_SEQUENCES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseProbe(session.step.model, session.step.layout, spec).measure(session.step.flat, windows)


def test_measured_at_as_many_evaluations_as_the_cost_allows(tmp_path):
    spec = tiny(
        400,
        batch_tokens=1024,
        train_tokens=409_600,
        eval=EvalSpec(tokens=64, points=4, max_cost_fraction=1.0),
    )
    # 409,600 tokens at 2%: 8,192 tokens, two measurements of 4,096.
    assert measured_steps(spec, (141, 200, 283, 400)) == {283, 400}
    assert measured_steps(tiny(100), (100,)) == frozenset()
    record = train(RunStore(tmp_path), spec)
    measured = {p.step: p.noise_scale_tokens for p in record.curve if p.noise_scale_tokens is not None}
    assert measured  # None is allowed if a measurement does not determine the scale
    assert set(measured) <= {283, 400}
    assert all(100 < scale < 1e6 for scale in measured.values())


def test_with_enough_micro_batches_the_steps_own_norms_are_used(monkeypatch):
    spec = tiny(400, batch_tokens=64 * 16, train_tokens=64 * 16 * 400)
    session = open_session(spec, Execution(micro_batch_sequences=1))
    monkeypatch.setattr(NoiseProbe, "measure", lambda *_: pytest.fail("not needed"))
    metrics = torch.tensor([3.0, 5.0, 2.5])
    found = session.measure_noise(400, metrics, 1)
    assert found == noise_from_norms(5.0, 2.5, 64, 1024)
