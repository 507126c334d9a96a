"""The program of the two processes of tests/test_distributed.py, started by torchrun over gloo.

The first trains as any test does, in folders below the one given on the command line; the second follows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import scaling_lab.planning.memory as memory
import scaling_lab.training.data.feed as feed
from helpers.runs import interrupted_at, train
from helpers.specs import tiny
from helpers.team_runs import CHUNK_STEPS, LOGITS_AT_ONCE, SPECS, planned_stack
from scaling_lab.core.errors import UserError
from scaling_lab.core.spec import Execution
from scaling_lab.core.storage.store import RunStore
from scaling_lab.launching.worker import train_pending
from scaling_lab.training.parallel.team import Team, joined
from scaling_lab.training.run.follower import Follower


def lead(team: Team, folder: Path) -> None:
    def of_kind(kind: str, name: str) -> RunStore:
        team.parallel = kind
        return RunStore(folder / name)

    for name, spec in SPECS.items():
        train(of_kind("ddp", f"ddp-{name}"), spec)
    for name in ("even", "tied", "bfloat16", "vocabulary", "generated"):
        train(of_kind("fsdp", f"fsdp-{name}"), SPECS[name])
    train(of_kind("fsdp", "fsdp-micro"), SPECS["even"], Execution(micro_batch_sequences=1))
    train(of_kind("ddp", "ddp-compiled"), SPECS["even"], Execution(compile=True))
    stack = of_kind("ddp", "ddp-stack")
    train_pending(stack, planned_stack())

    # A run of one process resumes in two, one of two in one (by pytest, afterwards), a sharded one with data parallelism.
    train(of_kind("ddp", "1-to-2"), SPECS["even"])
    train(of_kind("fsdp", "1-to-2-fsdp"), SPECS["even"])
    interrupted_at(of_kind("ddp", "2-to-1"), SPECS["even"], 7)
    interrupted_at(of_kind("fsdp", "2-to-1-fsdp"), SPECS["even"], 7)
    interrupted_at(of_kind("fsdp", "fsdp-to-ddp"), SPECS["even"], 7)
    train(of_kind("ddp", "fsdp-to-ddp"), SPECS["even"])

    with pytest.raises(UserError, match="a batch of 1 sequences cannot be shared by 2 processes"):
        train(of_kind("ddp", "refused"), tiny(10, batch_tokens=64, train_tokens=640))
    with pytest.raises(UserError, match="needs equal shares"):
        train(of_kind("fsdp", "refused-fsdp"), SPECS["uneven"])
    with pytest.raises(UserError, match="one run at a time"):
        train_pending(of_kind("fsdp", "refused-stack"), planned_stack())


def main() -> int:
    feed.CHUNK_TOKENS = CHUNK_STEPS * SPECS["generated"].batch_tokens
    memory.LOGITS_AT_ONCE = LOGITS_AT_ONCE
    with joined("ddp") as team:
        assert team is not None
        if not team.leads:
            return Follower(team).serve()
        lead(team, Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
