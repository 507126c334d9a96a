"""Training tiny models on real text: the step, the loop, the record, and interruptions."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from helpers.runs import train
from helpers.specs import SHAPE, tiny
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import MAX_CURVE_POINTS, RunStatus, curve_block_steps
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.spec import EvalSpec, Execution, OptimizerSpec, Plan, PlannedRun
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import longest_first, train_claimed, train_pending
from scaling_lab.training.engine.gradient import token_loss
from scaling_lab.training.measure.evaluation import ValidationSet, evaluation_steps, standard_error
from scaling_lab.training.models import build_model
from scaling_lab.training.run.loop import blocks
from scaling_lab.training.run.member import StepCounter
from scaling_lab.training.run.session import open_session, train_block


@pytest.mark.parametrize("shape", [SHAPE, GPT2Shape(width=16, depth=1, heads=1)], ids=["gpt", "gpt2"])
def test_training_learns_real_text(tmp_path, shape):
    """From about ln 256 = 5.5 nats to well under the 3.3 nats of the corpus's byte frequencies."""
    record = train(RunStore(tmp_path), tiny(400, shape=shape))
    assert record.status is RunStatus.COMPLETED
    assert record.curve[0].train_loss_nats > 5.0
    assert record.final_val_loss_nats < 3.1
    assert 0 < record.final_val_loss_sem_nats < 0.2


def test_record_and_curve(tmp_path):
    store, spec = RunStore(tmp_path), tiny(40)
    record = train(store, spec)
    assert store.read_record(spec.run_id()) == record
    assert [p.step for p in record.curve] == list(range(1, 41))
    assert (
        [p.step for p in record.curve if p.val_loss_nats is not None]
        == list(evaluation_steps(spec))
        == [14, 20, 28, 40]
    )
    last = record.curve[-1]
    assert last.tokens == spec.train_tokens
    assert last.train_flops == spec.train_flops()
    assert last.lr == pytest.approx(spec.optimizer.peak_lr * 0.1)
    assert last.val_loss_nats == record.final_val_loss_nats
    environment = record.environment
    assert environment.data_fingerprint == spec.data.fingerprint()
    assert environment.torch == torch.__version__
    on_disk = json.loads((store.run_folder(spec.run_id()) / "record.json").read_text())
    assert on_disk["status"] == "completed"
    assert "curve" not in on_disk
    assert store.claim(spec) is None  # finished, so it cannot be claimed again


def test_same_spec_same_losses_bit_for_bit(tmp_path):
    a, b = train(RunStore(tmp_path / "a"), tiny()), train(RunStore(tmp_path / "b"), tiny())
    assert [p.train_loss_nats for p in a.curve] == [p.train_loss_nats for p in b.curve]
    assert a.final_val_loss_nats == b.final_val_loss_nats
    other = train(RunStore(tmp_path / "c"), tiny(seed_init=1, seed_data=1))
    assert other.final_val_loss_nats != a.final_val_loss_nats


def test_step_equals_plain_torch():
    """The functional step equals the ordinary module with autograd, clip_grad_norm_ and torch.optim.AdamW."""
    spec = tiny(12)
    session = open_session(spec, Execution())
    ours = train_block(session, 0, 12)
    torch.manual_seed(spec.seed_init)
    model = build_model(spec.shape)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.95),
    )
    theirs = []
    for step in range(12):
        windows = session.order.windows(step * spec.batch_sequences, spec.batch_sequences)
        rows = torch.stack([session.step.tokens[w * 64 : w * 64 + 65] for w in windows.tolist()]).long()
        loss = token_loss(model(rows[:, :-1]), rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate(step)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=2e-5)


def test_compiled_step_equals_eager():
    eager = train_block(open_session(tiny(30), Execution()), 0, 30)
    compiled = train_block(open_session(tiny(30), Execution(compile=True)), 0, 30)
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_bfloat16_is_within_seed_noise_of_float32(tmp_path):
    """Compared seed by seed, so that differences between seeds cancel: a shift of a tenth of their spread would be detected.
    Weights stored in bfloat16, without float32 master weights, fail this test: they shift the loss by a quarter of it."""

    def loss(dtype: str, seed: int) -> float:
        spec = tiny(
            120, dtype=dtype, seed_init=seed, seed_data=seed, eval=EvalSpec(tokens=4096, points=1),
        )  # fmt: skip
        return train(RunStore(tmp_path / dtype), spec).final_val_loss_nats

    full = [loss("float32", seed) for seed in range(4)]
    shifts = [loss("bfloat16", seed) - full[seed] for seed in range(4)]
    noise = statistics.stdev(full)
    assert 0.003 < noise < 0.1
    assert abs(statistics.fmean(shifts)) < noise / 10
    assert max(map(abs, shifts)) < noise / 2
    assert min(map(abs, shifts)) > 0  # bfloat16 was really used


def test_models_are_causal_and_sequences_independent():
    """A token's logits do not depend on later tokens or on other sequences."""
    for shape in (GPTShape(width=32, depth=2, heads=2), GPT2Shape(width=32, depth=2, heads=2)):
        torch.manual_seed(0)
        model = build_model(shape)
        tokens = torch.randint(0, 256, (2, 64))
        changed = tokens.clone()
        changed[0, 40:] = (changed[0, 40:] + 1) % 256
        a, b = model(tokens), model(changed)
        assert torch.equal(a[0, :40], b[0, :40])
        assert torch.equal(a[1], b[1])
        assert not torch.allclose(a[0, 40:], b[0, 40:])


def test_a_diverged_run_has_a_record(tmp_path):
    record = train(RunStore(tmp_path), tiny(200, optimizer=OptimizerSpec(peak_lr=1e8)))
    assert record.status is RunStatus.DIVERGED
    assert "loss" in record.reason
    assert record.final_val_loss_nats is None
    assert record.curve
    assert all(math.isfinite(p.train_loss_nats) for p in record.curve)


def test_a_failing_run_gets_a_failed_record_and_the_others_continue(tmp_path, monkeypatch):
    import scaling_lab.training.run.session as session

    real = session.build_model

    def broken(shape, *rest):
        if shape.width == 16:
            raise RuntimeError("no memory\nfor this")
        return real(shape, *rest)

    monkeypatch.setattr(session, "build_model", broken)
    good = tiny(10, shape=GPTShape(width=24, depth=1, heads=2))
    runs = tuple(PlannedRun(s, Execution()) for s in (tiny(10), good))
    store = RunStore(tmp_path)
    records = {
        r.run_id: r for r in train_pending(store, Plan("t", runs, good.convention, good.data.fingerprint()))
    }
    assert records[good.run_id()].status is RunStatus.COMPLETED
    failed = store.read_record(tiny(10).run_id())
    assert failed.status is RunStatus.FAILED
    assert failed.reason == "RuntimeError: no memory for this"


def test_data_that_differ_from_the_plan_are_refused(tmp_path):
    store = RunStore(tmp_path)
    claim = store.claim(tiny())
    assert claim is not None
    with pytest.raises(UserError, match="differs from the plan's"):
        train_claimed(PlannedRun(tiny(), Execution()), store, claim, "0" * 64)
    assert store.state(tiny().run_id()).state == "interrupted"


def test_a_worker_that_is_asked_to_stop_releases_its_run(tmp_path):
    """SIGTERM to a real worker: exit 75, no record, and the next worker trains the run."""
    store, spec = RunStore(tmp_path), tiny(200_000)
    store.write_plan(Plan("t", (PlannedRun(spec, Execution()),), spec.convention, spec.data.fingerprint()))
    worker = subprocess.Popen([sys.executable, "-m", "scaling_lab.worker", str(store.folder)])
    curve = store.run_folder(spec.run_id()) / "curve.jsonl"
    deadline = time.monotonic() + 60
    while not (curve.exists() and curve.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=30) == 75
    state = store.state(spec.run_id())
    assert state.state == "interrupted"
    assert store.claim(spec) is not None


def test_a_plan_for_a_missing_device_is_refused_before_any_run_fails(tmp_path):
    """A plan for a GPU on a machine without one: one line of error, and no run is recorded as failed."""
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    store = RunStore(tmp_path)
    plan = Plan(
        "t", (PlannedRun(tiny(), Execution(device="cuda")),), tiny().convention, tiny().data.fingerprint()
    )
    with pytest.raises(UserError, match="device=cuda is not available"):
        train_pending(store, plan)
    assert store.state(tiny().run_id()).state == "planned"


def test_one_window_of_validation_has_no_standard_error(tmp_path):
    record = train(RunStore(tmp_path), tiny(20, eval=EvalSpec(tokens=64)))
    assert record.status is RunStatus.COMPLETED
    assert record.final_val_loss_sem_nats is None


def test_worker_rejects_a_folder_without_a_plan(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scaling_lab.worker", str(tmp_path / "none")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_evaluation_steps():
    def visits(**options) -> tuple[int, ...]:
        return evaluation_steps(tiny(1000, eval=EvalSpec(**options)))

    assert visits(tokens=64, points=4) == (354, 500, 707, 1000)
    assert visits(tokens=64, points=1) == (1000,)
    # 256,000 training tokens at a tenth of their cost: 25,600 * 3 forward tokens, so two evaluations of 30,000.
    assert visits(tokens=30_000, points=6, max_cost_fraction=0.1) == (707, 1000)
    # The last step is always evaluated, whatever it costs.
    assert visits(tokens=10**9, points=6) == (1000,)
    assert evaluation_steps(tiny(1, eval=EvalSpec(tokens=64, points=5, max_cost_fraction=100))) == (1,)


def test_blocks_cover_every_step_once_and_end_at_evaluations():
    for steps in (1, 2, 63, 64, 65, 1000):
        spec = tiny(steps)
        run, parts = StepCounter(spec), []
        for count in blocks([run]):
            parts.append((run.done, run.done + count))
            run.done += count
            run.over = run.done >= spec.steps
        assert [step for first, last in parts for step in range(first, last)] == list(range(steps))
        assert set(evaluation_steps(spec)) <= {last for _, last in parts}


def test_validation_set_is_fixed_and_its_error_is_by_batch_means(tmp_path):
    import numpy as np

    tokens = PySource().tokens("validation")
    torch.manual_seed(0)
    model = build_model(SHAPE)
    device = torch.device("cpu")
    one = ValidationSet(PySource(), 64, EvalSpec(tokens=8192), device)
    assert one.n_tokens == 8192
    mean, sem = one.loss(model, dict(model.named_parameters()))
    again, _ = ValidationSet(PySource(), 64, EvalSpec(tokens=8192), device).loss(
        model, dict(model.named_parameters())
    )
    assert mean == again
    # By hand: the mean over all tokens of all windows.
    starts = np.arange(128) * ((tokens.size - 1) // 64) // 128 * 64
    rows = torch.tensor(np.stack([tokens[s : s + 65] for s in starts]).astype(np.int64))
    assert mean == pytest.approx(token_loss(model(rows[:, :-1]), rows[:, 1:]).item(), rel=1e-5)
    assert sem > 0
    values = np.repeat([1.0, 3.0], 16)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / math.sqrt(32))


def test_long_runs_keep_block_means(tmp_path):
    assert [
        curve_block_steps(s) for s in (1, MAX_CURVE_POINTS, MAX_CURVE_POINTS + 1, 3 * MAX_CURVE_POINTS)
    ] == [1, 1, 2, 3]
    from scaling_lab.training.run.curve import CurveWriter

    spec = tiny(2 * MAX_CURVE_POINTS)
    with open(tmp_path / "c", "w") as file:
        writer = CurveWriter(spec, file)
        points = [writer.add(step, float(step)) for step in range(1, 7)]
    assert [p.train_loss_nats if p else None for p in points] == [None, 1.5, None, 3.5, None, 5.5]


def test_longest_first():
    runs = [PlannedRun(tiny(n), Execution()) for n in (10, 30, 20)]
    assert [r.spec.steps for r in longest_first(runs)] == [30, 20, 10]
