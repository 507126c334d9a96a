"""Planned execution: stacks, threads and micro-batches by the plan's rules, and memory estimates before launch."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from helpers.processes import run_helper
from helpers.specs import SHAPE, tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.spec import PlannedRun
from scaling_lab.planning.cost import device_bytes, job_needs
from scaling_lab.planning.execution import machine_memory_gb, plan_executions, stack_key, threads_for
from scaling_lab.planning.memory import (
    corpus_bytes,
    estimate_bytes,
    loss_chunks,
    micro_batch,
    next_smaller_micro_batch,
)
from scaling_lab.planning.settings import ExecutionSettings
from scaling_lab.training.data.feed import open_feed

BASE = tiny(100)


def sweep_of_rates(count: int) -> list:
    return [
        replace(BASE, optimizer=replace(BASE.optimizer, peak_lr=0.01 * 2**k), seed_init=k)
        for k in range(count)
    ]


def stacks(specs, **settings) -> list[tuple[str | None, int]]:
    return [(e.stack, e.stack_size) for e in plan_executions(specs, ExecutionSettings(**settings))]


def test_seeds_and_rates_of_one_horizon_are_a_stack_on_a_gpu():
    longer, other = replace(BASE, train_tokens=256 * 400), replace(BASE, batch_tokens=128)
    planned = stacks([*sweep_of_rates(3), longer, other], device="cuda")
    name = f"{BASE.run_id()}x3"
    assert len({s for s, _ in planned[:3]}) == 1
    assert planned[0][1] == 3
    assert planned[0][0] is not None
    assert planned[0][0].endswith("x3")
    assert name.startswith("gpt-")
    # Four times the horizon, or another batch: alone.
    assert planned[3:] == [(None, 1), (None, 1)]
    assert stacks(sweep_of_rates(3), device="cuda", stack="false") == [(None, 1)] * 3
    assert stacks(sweep_of_rates(3), device="mps") == [(None, 1)] * 3
    continued = replace(BASE, parent="trunk", parent_step=10)
    assert stacks([*sweep_of_rates(2), continued], device="cuda")[2] == (None, 1)


def test_on_a_cpu_there_is_a_stack_for_every_core():
    assert stacks(sweep_of_rates(3), compile="true", cores=2) == [(None, 1)] * 3
    assert [size for _, size in stacks(sweep_of_rates(6), compile="true", cores=2)] == [3] * 6
    assert len({name for name, _ in stacks(sweep_of_rates(6), compile="true", cores=2)}) == 2
    # Without compilation vmap is a loop and saves nothing.
    assert stacks(sweep_of_rates(6), compile="false", cores=2) == [(None, 1)] * 6


def test_compilation_on_cuda_must_repay_itself(monkeypatch):
    monkeypatch.setattr("scaling_lab.planning.execution.has_compiler", lambda *_: True)

    def compiled(specs, **settings) -> list[bool]:
        return [e.compile for e in plan_executions(specs, ExecutionSettings(device="cuda", **settings))]

    # By hand: 60 s, at 225 us a layer and step, are 266,667 steps of one layer; its arithmetic is nothing.
    assert BASE.shape.depth == 1
    short, long = (replace(BASE, train_tokens=256 * steps) for steps in (266_000, 267_000))
    assert compiled([short]) == [False]
    assert compiled([long]) == [True]
    # Runs with other batches and horizons share the program; members of a stack share its launches.
    half, other = (
        replace(BASE, train_tokens=256 * 134_000),
        replace(BASE, batch_tokens=128, train_tokens=128 * 134_000),
    )
    assert compiled([half, other], stack="false") == [True, True]
    assert compiled([half, replace(half, seed_init=1)], stack="false") == [True, True]
    assert compiled([half, replace(half, seed_init=1)]) == [False, False]
    assert compiled([half, replace(half, dtype="bfloat16")], stack="false") == [False, False]
    # 2e16 FLOPs, whatever the steps.
    # 1.75e16 FLOPs take a third of 175 s less, and each step of eight layers 1.8 ms.
    shape = GPTShape(width=512, depth=8, heads=8)
    large = replace(BASE, shape=shape, batch_tokens=65_536, train_tokens=65_536, dtype="bfloat16")
    steps = int(1.75e16 / large.flops_per_token() / 65_536)
    assert steps * 8 * 225e-6 > 60 - 1.75e16 / 3e14 > 0
    assert compiled([replace(large, train_tokens=65_536 * steps)]) == [True]
    assert compiled([replace(large, train_tokens=65_536 * (steps // 4))]) == [False]
    assert compiled([BASE], compile="true") == [True]
    assert compiled([long], compile="false") == [False]
    monkeypatch.setattr("scaling_lab.planning.execution.has_compiler", lambda *_: False)
    assert compiled([long]) == [False]


def test_planning_twice_gives_the_same_plan():
    specs = sweep_of_rates(7)
    settings = ExecutionSettings(device="cuda", memory_gb=40.0)
    assert plan_executions(specs, settings) == plan_executions(list(specs), settings)


def test_fields_that_stack_members_share():
    assert stack_key(BASE) == stack_key(sweep_of_rates(2)[1])
    for other in (
        replace(BASE, dtype="bfloat16"),
        replace(BASE, shape=replace(BASE.shape, width=32)),
        replace(BASE, optimizer=replace(BASE.optimizer, beta2=0.99)),
    ):
        assert stack_key(BASE) != stack_key(other)


def test_large_models_take_the_threads():
    large = replace(BASE, shape=GPTShape(width=512, depth=6, heads=8))
    assert threads_for([BASE], ExecutionSettings(cores=8)) == 1
    assert threads_for([BASE, large], ExecutionSettings(cores=8)) == 8
    assert {e.threads for e in plan_executions([BASE, large], ExecutionSettings(cores=8))} == {8}
    assert {e.threads for e in plan_executions([large], ExecutionSettings(cores=8, threads=2))} == {2}


def test_micro_batches_fit_the_memory():
    large = replace(
        BASE, shape=GPTShape(width=768, depth=12, heads=12, context=1024, vocab_size=50_304), dtype="bfloat16",
        batch_tokens=1024 * 480, train_tokens=1024 * 480 * 10,
    )  # fmt: skip
    whole = estimate_bytes(large, "cuda", 480, 1e8)
    assert micro_batch(large, "cuda", whole, 1e8) is None
    size = micro_batch(large, "cuda", 24e9, 1e8)
    assert size is not None
    assert 480 % size == 0
    assert estimate_bytes(large, "cuda", size, 1e8) <= 24e9
    assert (
        micro_batch(large, "cuda", 1e9, 1e8) == 1
    )  # nothing fits: single sequences; the run will raise the error
    eager = ExecutionSettings(device="cuda", memory_gb=24.0, compile="false")
    (execution,) = plan_executions([large], eager)
    assert execution.micro_batch_sequences is not None
    assert execution.micro_batch_sequences <= size
    # A compiled step needs less memory.
    (compiled,) = plan_executions([large], replace(eager, compile="true"))
    assert compiled.micro_batch_sequences > execution.micro_batch_sequences
    assert plan_executions([large], ExecutionSettings(device="cuda"))[0].micro_batch_sequences is None


def test_concurrent_runs_on_a_cpu_share_the_machines_memory(monkeypatch):
    """The kernel kills a process that takes too much memory, without an error to recover from, so the plan must prevent it."""
    wide = replace(
        BASE, shape=replace(SHAPE, width=512, depth=2), batch_tokens=64 * 256, train_tokens=64 * 2560
    )
    needed = estimate_bytes(wide, "cpu", 256, 1e7) / 1e9
    assert 3 < needed < 12

    def micro(machine_memory_gb, spec=wide, **settings):
        monkeypatch.setattr("scaling_lab.planning.execution.machine_memory_gb", lambda: machine_memory_gb)
        (execution,) = plan_executions([spec], ExecutionSettings(compile="false", **settings))
        return execution.micro_batch_sequences

    assert micro(64, cores=2) is None
    parts = micro(8, cores=2)
    assert parts < 256
    assert estimate_bytes(wide, "cpu", parts, corpus_bytes(wide)) <= 0.85 * 4e9
    assert micro(8, cores=4) < parts
    assert micro(8, cores=2, threads=2) > parts  # one run at a time
    assert micro(None, cores=2) is None
    assert micro(64, cores=2, memory_gb=3.0) < 256  # the user's value takes precedence
    # A small run is unchanged, however many run concurrently.
    assert micro(8, BASE, cores=64) is None


def test_memory_of_this_machine_or_of_its_container(tmp_path, monkeypatch):
    monkeypatch.setattr("scaling_lab.planning.execution.CONTAINER_LIMITS", (str(tmp_path / "none"),))
    whole = machine_memory_gb()
    assert whole is not None
    assert whole == int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1e9)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("scaling_lab.planning.execution.CONTAINER_LIMITS", (str(limit),))
    for text, found in (("max\n", whole), ("1500000000\n", 1), (f"{2**62}\n", whole)):
        limit.write_text(text)
        assert machine_memory_gb() == found


WORDS = ContextTree()


@pytest.mark.parametrize(
    ("spec", "members"),
    [
        (BASE, 1),
        (replace(BASE, unique_tokens=64_000), 1),
        (replace(BASE, data=WORDS), 1),
        (replace(BASE, data=WORDS, noise=0.1, batch_tokens=4096, train_tokens=409_600), 1),
        (replace(BASE, data=WORDS), 3),
    ],
    ids=["whole", "part", "generated", "noisy", "stack"],
)
def test_the_estimate_of_tokens_on_the_device_equals_the_feeds(spec, members):
    """An endless generated corpus does not count as 2^60 tokens of memory."""
    feed = open_feed([replace(spec, seed_data=k) for k in range(members)], torch.device("cpu"))
    held = feed.tokens.numel() * feed.tokens.element_size()
    assert held <= corpus_bytes(spec, members) <= held * 1.001 + 1024


def test_a_generated_corpus_costs_neither_micro_batches_nor_a_clusters_memory(monkeypatch):
    monkeypatch.setattr("scaling_lab.planning.execution.machine_memory_gb", lambda: 16)
    spec = replace(BASE, data=WORDS)
    for settings in (ExecutionSettings(device="cuda", memory_gb=24.0), ExecutionSettings(cores=2)):
        (execution,) = plan_executions([spec], settings)
        assert execution.micro_batch_sequences is None
        run = PlannedRun(spec, execution)
        assert device_bytes(run) < 2e9
        assert job_needs([run], 1).host_bytes < 8e9
    # Stacks are as large as for text.
    rates = [replace(s, data=WORDS) for s in sweep_of_rates(4)]
    assert {size for _, size in stacks(rates, device="cuda", memory_gb=24.0)} == {4}


def test_halving():
    assert [next_smaller_micro_batch(12, m) for m in (None, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]
    assert next_smaller_micro_batch(7, None) == 1


def test_loss_chunks():
    assert loss_chunks(131_072, 256) == 1
    assert loss_chunks(131_073, 256) == 2
    assert loss_chunks(32 * 1024, 50_304) == 50  # 1.65e9 logits, 128 MB at a time


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is in /proc of Linux")
@pytest.mark.parametrize("shape", ["64 4 256 256", "128 2 16000 64"], ids=["activations", "vocabulary"])
def test_the_estimate_is_above_the_measured_peak_but_not_far(shape):
    done = run_helper("measured_peak", *shape.split())
    assert done.returncode == 0, done.stderr
    estimate, peak = json.loads(done.stdout)
    assert peak < estimate < 3 * peak
