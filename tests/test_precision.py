"""dtype=auto, and the switches that dtype= and deterministic= set for a process; checking them needs no GPU."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from helpers.specs import tiny
from scaling_lab.cli.main import main
from scaling_lab.cli.options import machine
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching import worker
from scaling_lab.training.engine import devices
from scaling_lab.training.engine.devices import apply_execution, set_deterministic
from scaling_lab.training.engine.gradient import autocast


@pytest.fixture
def switches(monkeypatch) -> Iterator[None]:
    """Restores the switches of this process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.matmul.allow_tf32 = before[0]
    torch.backends.cuda.enable_cudnn_sdp(before[1])
    torch.use_deterministic_algorithms(False)


def test_tf32_applies_only_to_runs_that_ask_for_it(switches):
    """A process may compute runs of several dtypes, one after the other."""
    for dtype, on in (("tf32", True), ("float32", False), ("tf32", True), ("bfloat16", False)):
        apply_execution(Execution(device="cuda", deterministic=False), dtype)
        assert torch.backends.cuda.matmul.allow_tf32 is on
    # Its products are float32's as far as autocast is concerned; bfloat16 alone is autocast.
    tokens = torch.zeros(1)
    enabled = {}
    for dtype in ("float32", "tf32", "bfloat16"):
        with autocast(tokens, tiny(1, dtype=dtype)):
            enabled[dtype] = torch.is_autocast_enabled("cpu")
    assert enabled == {"float32": False, "tf32": False, "bfloat16": True}


def test_tf32_without_a_gpu_is_one_line_of_error(tmp_path, capsys):
    with pytest.raises(UserError, match="dtype=tf32 requires device=cuda, not cpu"):
        apply_execution(Execution(), "tf32")
    options = ["sweep=t", f"results_dir={tmp_path}", "device=cpu", "dtype=tf32"]
    assert main(["plan", *options]) == 2
    said = capsys.readouterr().err
    assert "dtype=tf32 requires device=cuda, not cpu. Choices: float32, bfloat16." in said
    assert not (tmp_path / "t").exists()


def test_deterministic_raises_for_an_operation_that_cannot_be(switches):
    """It does not warn: under warn_only, attention's backward pass would still add in any order."""
    apply_execution(Execution(device="cuda", deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    # The next run of this process may not be deterministic.
    set_deterministic(False)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def planned(tmp_path, monkeypatch, *options: str) -> dict:
    """plan.json of a small sweep with these options."""
    monkeypatch.chdir(tmp_path)
    command = ["plan", "sweep=p", "design.budgets_flops=[1e9]", "data=context_tree", "--quiet", *options]
    assert main(command) == 0
    return json.loads((tmp_path / "results/p/plan.json").read_text())


@pytest.mark.parametrize(
    ("options", "at_hand", "dtype", "assumed"),
    [
        (["device=cuda"], None, "bfloat16", True),
        (["device=cuda"], True, "bfloat16", False),
        (["device=cuda"], False, "float32", False),
        (["device=cuda", "gpu=t4"], True, "float32", False),
        (["gpu=h100"], False, "bfloat16", False),  # the plan is for that GPU, not for this machine
        (["device=cuda", "gpu=auto"], False, "float32", False),
        (["device=cuda", "dtype=float32"], True, "float32", False),
        (["device=cpu", "gpu=h100"], True, "float32", False),
    ],
)
def test_auto_is_resolved_once_when_planned(tmp_path, monkeypatch, options, at_hand, dtype, assumed):
    """`gpu=` decides, else the GPU at hand, else bfloat16 on CUDA with a note; plan.json has the plain dtype."""
    monkeypatch.setattr(machine, "torch_may_find_a_gpu", lambda: at_hand is not None)
    monkeypatch.setattr(devices, "cuda_has_bfloat16", lambda: at_hand)
    plan = planned(tmp_path, monkeypatch, *options)
    assert {run["spec"]["dtype"] for run in plan["runs"]} == {plan["settings"]["dtype"]} == {dtype}
    assert any("dtype=auto: bfloat16, because" in note for note in plan["notes"]) is assumed


def test_a_single_run_refuses_a_missing_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(machine, "torch_may_find_a_gpu", lambda: True)
    monkeypatch.setattr(devices, "cuda_has_bfloat16", lambda: False)
    options = ["model.width=32", "train_tokens=10k", "device=cuda", "data=context_tree"]
    assert main(["train", *options, "dtype=bfloat16"]) == 2
    assert "dtype=bfloat16: this machine's GPU does not have it." in capsys.readouterr().err


def test_a_worker_without_bfloat16_refuses_with_a_line_that_works(tmp_path, monkeypatch):
    planned(tmp_path, monkeypatch, "device=cuda", "gpu=h100", "seed=3")
    store = RunStore(tmp_path / "results/p")
    monkeypatch.setattr(worker, "resolve_device", lambda name: name)
    monkeypatch.setattr(worker, "cuda_has_bfloat16", lambda: False)
    monkeypatch.setattr(worker, "cuda_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match=r"dtype=bfloat16.*\(Tesla T4\).*scaling-lab plan") as error:
        worker.train_pending(store, store.read_plan())
    assert {state.state for state in store.states(store.read_plan())} == {"planned"}
    line = shlex.split(str(error.value).partition("scaling-lab ")[2])
    assert main([*line, "--quiet"]) == 0
    old, new = store.read_plan(), RunStore(tmp_path / "results/p-float32").read_plan()
    assert [run.spec for run in new.runs] == [
        replace(run.spec, dtype="float32", sweep="p-float32") for run in old.runs
    ]
