"""Trains a run in a process that may take only 200 MB more on its device once its model is built; prints status and
micro-batch."""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import scaling_lab.training.run.loop as loop
from helpers.specs import SHAPE, tiny
from scaling_lab.core.spec import EvalSpec, Execution, PlannedRun
from scaling_lab.core.storage.store import RunStore

open_program = loop.open_program


def open_limited_program(*args: Any, **options: Any) -> Any:
    program = open_program(*args, **options)
    loop.open_program = open_program
    # 200 MB more than is taken now: a batch of 256 sequences needs about 900 MB for activations and logits.
    if program.sessions[0].device.type == "cuda":
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + 200 * 2**20
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        return program
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 2**20,) * 2)
    return program


def main(folder: str, device: str = "cpu") -> None:
    logging.basicConfig(level=logging.INFO)
    loop.open_program = open_limited_program
    spec = tiny(4, batch_tokens=64 * 256, train_tokens=64 * 256 * 4, eval=EvalSpec(tokens=64))
    spec = replace(spec, shape=replace(SHAPE, width=64, heads=4, depth=4))
    store = RunStore(folder)
    record = loop.train_run(PlannedRun(spec, Execution(device=device)), store, store.claim(spec))
    print(record.status.value, record.execution.micro_batch_sequences)


if __name__ == "__main__":
    main(*sys.argv[1:])
