"""Prints the estimated and the measured peak memory of two training steps in a process of its own, bytes."""

from __future__ import annotations

import json
import sys

from helpers.peak_memory import peak_bytes
from helpers.specs import tiny
from scaling_lab.core.shapes.gpt import GPTShape
from scaling_lab.core.spec import EvalSpec, Execution
from scaling_lab.planning.memory import estimate_bytes
from scaling_lab.training.run.session import open_session, train_block


def main(width: int, depth: int, vocab: int, sequences: int) -> None:
    spec = tiny(
        2, shape=GPTShape(width=width, depth=depth, heads=4, vocab_size=vocab),
        batch_tokens=64 * sequences, train_tokens=128 * sequences, eval=EvalSpec(tokens=64),
    )  # fmt: skip
    session = open_session(spec, Execution())
    train_block(session, 0, 2)
    print(json.dumps([estimate_bytes(spec, "cpu", sequences, 1e7), peak_bytes()]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
