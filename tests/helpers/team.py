"""The program of the two processes of tests/test_distributed.py, started by torchrun over gloo.

The first trains as any test does, in folders below the one given on the command line; the second follows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import scaling_lab.planning.memory as memory
import scaling_lab.training.data.feed as feed
import scaling_lab.training.parallel.overlap as overlap
from helpers.runs import interrupted_at, train
from helpers.specs import tiny
from helpers.team_runs import (
    BUCKET_BYTES,
    CHUNK_STEPS,
    LOGITS_AT_ONCE,
    OVERLAPPED,
    SPECS,
    STEPS,
    planned_stack,
)
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.engine.gradient import ModelWithLoss
from scaling_lab.training.parallel.data_parallel import DataParallelStep
from scaling_lab.training.parallel.team import Team, joined
from scaling_lab.training.run.follower import Follower


def lead(team: Team, folder: Path) -> None:
    def of_kind(kind: str, name: str) -> RunStore:
        team.parallel = kind
        return RunStore(folder / name)

    for name, spec in SPECS.items():
        if name != "tied-bfloat16":
            train(of_kind("ddp", f"ddp-{name}"), spec)
    for name in ("even", "tied", "bfloat16", "tied-bfloat16", "vocabulary", "generated"):
        train(of_kind("fsdp", f"fsdp-{name}"), SPECS[name])
    with counted_sums() as sums:
        train(of_kind("fsdp", "fsdp-micro"), SPECS["even"], Execution(micro_batch_sequences=1))
    # Of a block's gradients, and of all others together; not once a micro-batch.
    assert len(sums) == 2 * STEPS, len(sums)
    train(of_kind("fsdp", "fsdp-micro-bfloat16"), SPECS["bfloat16"], Execution(micro_batch_sequences=1))
    train(of_kind("ddp", "ddp-compiled"), SPECS["even"], Execution(compile=True))
    for name in OVERLAPPED:
        train(of_kind("ddp", f"overlap-{name}"), SPECS[name])
    train(of_kind("ddp", "overlap-micro"), SPECS["even"], Execution(micro_batch_sequences=1))
    train(of_kind("ddp", "overlap-short"), SPECS["even"])
    train(of_kind("ddp", "overlap-fails"), SPECS["even"])
    stack = of_kind("ddp", "ddp-stack")
    train_pending(stack, planned_stack())

    # A run of one process resumes in two, one of two in one (by pytest, afterwards), a sharded one with data parallelism.
    train(of_kind("ddp", "1-to-2"), SPECS["even"])
    train(of_kind("fsdp", "1-to-2-fsdp"), SPECS["even"])
    interrupted_at(of_kind("ddp", "2-to-1"), SPECS["even"], 7)
    interrupted_at(of_kind("fsdp", "2-to-1-fsdp"), SPECS["even"], 7)
    # One process, two, one again (by pytest); two and two, each reading its own shards.
    interrupted_at(of_kind("fsdp", "1-2-1"), SPECS["even"], 14)
    interrupted_at(of_kind("fsdp", "fsdp-to-fsdp"), SPECS["even"], 7)
    train(of_kind("fsdp", "fsdp-to-fsdp"), SPECS["even"])
    interrupted_at(of_kind("fsdp", "fsdp-to-ddp"), SPECS["even"], 7)
    train(of_kind("ddp", "fsdp-to-ddp"), SPECS["even"])

    with pytest.raises(UserError, match="a batch of 1 sequences cannot be shared by 2 processes"):
        train(of_kind("ddp", "refused"), tiny(10, batch_tokens=64, train_tokens=640))
    with pytest.raises(UserError, match="needs equal shares"):
        train(of_kind("fsdp", "refused-fsdp"), SPECS["uneven"])
    with pytest.raises(UserError, match="one run at a time"):
        train_pending(of_kind("fsdp", "refused-stack"), planned_stack())


@contextmanager
def counted_sums() -> Iterator[list[object]]:
    """Each sum of gradients that FSDP begins."""
    sums: list[object] = []
    # Its name in torch 2.13, and in earlier versions.
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    reduce_scatter = getattr(dist, name)

    def counted(*args, **options):
        sums.append(args)
        return reduce_scatter(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, name, counted)
        yield sums


def overlap_on_cpu(team: Team) -> None:
    """Sum gradients during the backward pass in the runs whose folder says so. In two of them the second process fails: out of
    memory with more than one sequence, or always."""
    forward = ModelWithLoss.forward
    overlap.BUCKET_BYTES = BUCKET_BYTES

    def failing(self, inputs, targets=None):
        folder = str(team.run_folder)
        if not team.leads and targets is not None:
            if "overlap-short" in folder and len(inputs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if "overlap-fails" in folder:
                raise RuntimeError("a stand-in for an error of the device")
        return forward(self, inputs, targets)

    ModelWithLoss.forward = failing
    DataParallelStep.may_overlap = lambda self: not self.stacked and "overlap" in str(team.run_folder)


def main() -> int:
    feed.CHUNK_TOKENS = CHUNK_STEPS * SPECS["generated"].batch_tokens
    memory.LOGITS_AT_ONCE = LOGITS_AT_ONCE
    with joined("ddp") as team:
        assert team is not None
        overlap_on_cpu(team)
        if not team.leads:
            return Follower(team).serve()
        lead(team, Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
