"""What only a GPU can show, run by scripts/gpu_check; those with `run_device` check their logic on a CPU too."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.processes import run_helper, start_helper
from helpers.runs import losses, train
from helpers.specs import SHAPE, tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.sources.zipf_facts import ZipfFacts
from scaling_lab.core.spec import EvalSpec, Execution
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning import memory
from scaling_lab.planning.devices import peak_of_label
from scaling_lab.training.data.generated import device_documents
from scaling_lab.training.engine.step import LOSS
from scaling_lab.training.run.checkpoint import steps_saved
from scaling_lab.training.run.session import open_program, open_session, train_block

pytestmark = pytest.mark.gpu


def test_a_stack_equals_its_runs_alone(run_device):
    """Seeds and learning rates of their own: losses to float32 tolerance over 40 steps."""
    base = tiny(40)
    specs = [
        replace(base, seed_init=k, seed_data=k, optimizer=replace(base.optimizer, peak_lr=0.01 * (k + 1)))
        for k in range(4)
    ]
    execution = Execution(device=run_device)
    program = open_program(specs, execution, stacked=True)
    together = program.run_block(dict.fromkeys(range(4), 0), 40)[..., LOSS]
    for k, spec in enumerate(specs):
        alone = train_block(open_session(spec, execution), 0, 40)
        # Batched kernels of a GPU add in another order.
        assert together[:, k].tolist() == pytest.approx(alone, rel=1e-4 if run_device == "cpu" else 1e-3)
    assert not torch.equal(together[:, 0], together[:, 1])


def test_bfloat16_with_chunks_equals_whole_logits(monkeypatch, run_device):
    shape = GPTShape(width=64, depth=2, heads=2, vocab_size=8192)
    spec = tiny(
        8,
        shape=shape,
        dtype="bfloat16",
        batch_tokens=64 * 16,
        train_tokens=64 * 16 * 8,
        eval=EvalSpec(tokens=64),
    )
    monkeypatch.setattr(memory, "MIN_CHUNK_TOKENS", 128)
    found = {}
    for name, at_once in (("whole", 2**40), ("chunks", 2**20)):
        monkeypatch.setattr(memory, "LOGITS_AT_ONCE", at_once)
        found[name] = train_block(open_session(spec, Execution(device=run_device)), 0, 8)
    assert found["chunks"] != found["whole"]  # rounded differently, so chunks were really used
    assert found["chunks"] == pytest.approx(found["whole"], abs=5e-3)
    assert found["whole"][-1] < found["whole"][0] - 0.1


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tmp_path, run_device):
    """In a process that may take only 200 MB more once its model is there."""
    if run_device == "cpu" and sys.platform != "linux":
        pytest.skip("the limit on a CPU is Linux's")
    done = run_helper("limited_memory", str(tmp_path), run_device)
    assert done.returncode == 0, done.stderr[-2000:]
    status, micro = done.stdout.split()
    assert status == "completed"
    assert int(micro) < 256
    assert "out of memory" in done.stderr


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_memory_estimate_against_the_peak(compiled):
    """20 million parameters: never below the peak, and at most 1.6 times it (what the process itself takes is not counted)."""
    spec = tiny(
        4, shape=GPTShape(width=384, depth=12, heads=6, context=256), batch_tokens=256 * 32, train_tokens=256 * 32 * 4,
        eval=EvalSpec(tokens=256),
    )  # fmt: skip
    assert spec.count().params.total > 2e7
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    session = open_session(spec, Execution(device="cuda", compile=compiled))
    train_block(session, 0, 4)
    peak = torch.cuda.max_memory_allocated() - before
    corpus = memory.corpus_bytes(spec)
    whole = memory.estimate_bytes(spec, "cuda", spec.batch_sequences, corpus, compiled=compiled)
    estimate = whole - memory.PROCESS_BYTES["cuda"]
    assert peak <= estimate <= 1.6 * peak, f"estimate {estimate / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB"


def test_a_killed_run_resumes_bit_for_bit(tmp_path, run_device):
    steps = 8_000 if run_device == "cuda" else 400
    spec, execution = tiny(steps), Execution(device=run_device, deterministic=True)
    killed = RunStore(tmp_path / "killed")
    process = start_helper("killed_training", str(killed.folder), run_device, str(steps))
    folder = killed.run_folder(spec.run_id()) / "checkpoint"
    wait_for_checkpoints(process, folder)
    process.kill()
    process.communicate()
    assert killed.state(spec.run_id()).state == "interrupted"
    resumed = train(killed, spec, execution)
    assert losses(resumed) == losses(train(RunStore(tmp_path / "whole"), spec, execution))


def wait_for_checkpoints(process: subprocess.Popen[str], folder: Path) -> None:
    while len(steps_saved(folder)) < 2:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended before it was killed: {process.communicate()[1][-2000:]}")


def test_mfu_above_a_floor():
    """Six layers of width 1,024 in bfloat16, compiled: a loop that waits for its host stays far below this."""
    label = torch.cuda.get_device_name()
    if peak_of_label(label, "bfloat16") is None:
        pytest.skip(f"the table of devices has no bfloat16 peak of {label}")
    spec = tiny(
        40, shape=GPTShape(width=1024, depth=6, heads=16, context=1024, vocab_size=8192), dtype="bfloat16",
        batch_tokens=1024 * 16, train_tokens=1024 * 16 * 40, eval=EvalSpec(tokens=1024),
    )  # fmt: skip
    session = open_session(spec, Execution(device="cuda", compile=True))
    for first, last in ((0, 1), (1, 9), (9, 40)):
        train_block(session, first, last)
    assert session.utilization.mfu is not None
    assert session.utilization.mfu > 0.25


@pytest.mark.parametrize("source", [ContextTree(), ZipfFacts()], ids=["context_tree", "zipf_facts"])
def test_documents_are_generated_on_the_device(source, run_device):
    """Token for token as on the host (tests/test_device_documents.py has more of them)."""
    indices = np.array([0, 1, 499, 2**53 + 1, 2**62])
    made = device_documents(source, torch.device(run_device))
    assert made is not None
    ours = made.documents("train", torch.from_numpy(indices).to(run_device), 65)
    assert ours.device.type == run_device
    np.testing.assert_array_equal(ours.cpu().numpy(), source.documents("train", indices, 65))


def test_a_run_on_the_device_agrees_with_the_cpu(tmp_path, run_device):
    """The same losses to 1e-3 nats over 30 steps of a small float32 model."""
    spec = tiny(30, shape=SHAPE)
    there = train(RunStore(tmp_path / "there"), spec, Execution(device=run_device))
    here = train(RunStore(tmp_path / "here"), spec, Execution())
    pairs = zip(there.curve, here.curve, strict=True)
    assert all(a.train_loss_nats == pytest.approx(b.train_loss_nats, abs=1e-3) for a, b in pairs)
