"""The switches that dtype= and deterministic= set for a process; checking them needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from helpers.specs import tiny
from scaling_lab.cli.main import main
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution
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
