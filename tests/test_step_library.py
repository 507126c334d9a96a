"""Compiled steps as libraries on disk: the same losses as eager steps, one library for all batches, rebuilt if damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.specs import tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.shapes.gpt2 import GPT2Shape
from scaling_lab.core.spec import Execution, OptimizerSpec
from scaling_lab.training.engine import step_library
from scaling_lab.training.engine.step_library import library_folder, library_key
from scaling_lab.training.models import build_model
from scaling_lab.training.run.session import open_session, train_block

SMALL = GPTShape(width=8, depth=1, heads=1)
COMPILED = Execution(compile=True)


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """An empty cache folder in a process that has loaded no library."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    step_library.forget_loaded()
    return lambda: sorted(library_folder().glob("*"))


def no_torch_compile(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the step went through torch.compile")

    monkeypatch.setattr(step_library, "torch_compiled", refuse)


def assert_as_eager(spec, steps=12, rel=1e-5):
    compiled, eager = open_session(spec, COMPILED), open_session(spec, Execution())
    ours = train_block(compiled, 0, steps)
    assert ours == pytest.approx(train_block(eager, 0, steps), rel=rel)
    if spec.dtype == "float32":
        for name, value in compiled.step.state().items():
            other = eager.step.state()[name]
            if isinstance(spec.shape, GPT2Shape):
                # The gradients of its key biases are zero but for rounding, and Adam divides them by their size: compare norms.
                assert float((value - other).norm() / other.norm()) < 1e-3
            else:
                torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5)
    return ours


def test_one_library_serves_all_batches_seeds_and_horizons_and_is_rebuilt_if_damaged(libraries, monkeypatch):
    spec = tiny(40, shape=SMALL)
    first = assert_as_eager(spec)
    (path,) = libraries()
    written = path.stat().st_mtime_ns
    assert_as_eager(tiny(30, shape=SMALL, batch_tokens=448, train_tokens=448 * 30, seed_init=3, seed_data=4))
    # Another process would load it.
    step_library.forget_loaded()
    no_torch_compile(monkeypatch)
    assert train_block(open_session(spec, COMPILED), 0, 12) == first
    assert [p.stat().st_mtime_ns for p in libraries()] == [written]
    path.write_bytes(path.read_bytes()[:5000])
    step_library.forget_loaded()
    assert train_block(open_session(spec, COMPILED), 0, 12) == first
    assert libraries() == [path]
    assert path.stat().st_mtime_ns != written


def test_a_step_that_cannot_be_traced_falls_back_to_torch_compile(libraries, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(step_library, "compile_into", broken)
    monkeypatch.setattr(step_library, "torch_compiled", lambda step: step)
    assert_as_eager(tiny(shape=SMALL), rel=0)
    assert libraries() == []
    (line,) = caplog.messages
    assert "torch.compile" in line
    assert line.endswith("no such operator")


def key(spec, constants=(0.5,), batch=4, corpus=torch.uint8):
    torch.manual_seed(0)
    model = build_model(spec.shape, spec.parametrization)
    return library_key(model, spec, constants, batch, torch.zeros(9, dtype=corpus))


def test_a_librarys_name_depends_on_everything_it_depends_on(monkeypatch):
    spec = tiny(40, shape=SMALL)
    same = [
        key(spec), key(spec, batch=9), key(replace(spec, seed_init=5, seed_data=6)),
        key(tiny(80, shape=SMALL, optimizer=OptimizerSpec(peak_lr=0.5))),
    ]  # fmt: skip
    assert len(set(same)) == 1
    other = [
        key(replace(spec, shape=replace(SMALL, width=16))), key(replace(spec, shape=GPT2Shape(width=8, depth=1, heads=1))),
        key(spec, batch=1), key(spec, constants=(0.25,)), key(spec, constants=(torch.ones(3),)), key(spec, corpus=torch.int32),
        key(replace(spec, dtype="bfloat16")), key(tiny(40, shape=SMALL, optimizer=OptimizerSpec(peak_lr=0.5, clip_norm=2.0))),
        key(tiny(40, shape=SMALL, optimizer=OptimizerSpec(peak_lr=0.5, beta2=0.9))),
    ]  # fmt: skip
    monkeypatch.setattr(step_library, "machine", lambda: "another processor")
    other.append(key(spec))
    monkeypatch.setattr(step_library, "source_digest", lambda _: "another revision")
    other.append(key(spec))
    assert len({*same, *other}) == 1 + len(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"shape": GPT2Shape(width=16, depth=2, heads=2), "optimizer": OptimizerSpec(peak_lr=0.002)},
     {"shape": replace(SMALL, tied_head=True)},
     {"shape": replace(SMALL, mlp="swiglu")}, {"shape": SMALL, "batch_tokens": 64, "train_tokens": 64 * 40},
     {"shape": SMALL, "dtype": "bfloat16"}],
    ids=["gpt2", "tied", "swiglu", "one-sequence", "bfloat16"],
)  # fmt: skip
def test_every_family_and_precision(libraries, monkeypatch, changes):
    no_torch_compile(monkeypatch)
    assert_as_eager(tiny(40, **changes), rel=2e-2 if "dtype" in changes else 1e-5)
    (path,) = libraries()
    # torch 2.13 cannot trace layers with biases for a dynamic batch size.
    assert path.stem.endswith("-4") == (changes["shape"].kind == "gpt2")


@pytest.mark.slow
def test_the_library_is_the_same_program_whichever_batch_came_first(libraries, tmp_path, monkeypatch):
    few, many = tiny(40, shape=SMALL), tiny(40, shape=SMALL, batch_tokens=1024, train_tokens=1024 * 40)
    losses = []
    for order in ((few, many), (many, few)):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / str(len(losses))))
        step_library.forget_loaded()
        losses.append({spec.run_id(): train_block(open_session(spec, COMPILED), 0, 12) for spec in order})
        assert len(libraries()) == 1
    assert losses[0] == losses[1]
