#!/usr/bin/env python
"""Benchmark data loading: loaders against the training step's consumption, and prepare-data against its tokenizer.

loader    windows as delivered to the step (order, reading or generating, copying, gathering), without the step: tokens per
          CPU second of one thread, at context 64 and the batch of the quickstart's largest size. For comparison, in the same
          process, that size's compiled step on one thread: the loader must be ten times as fast. Also compared with the
          smallest size's step, which consumes the most tokens per second.
prepare   real text (Python source, JSON Lines) to token files: Mtok/s of wall time for bytes; for BPE compared with
          `encode_batch_fast` of `tokenizers` on the same documents in the same batches, alternating three times, the best of
          each. The ratio shows the overhead of reading, hashing, splitting and writing.

  scripts/bench_loader.py                about 2 minutes on two cores
  scripts/bench_loader.py --quick        a quarter of the text, a tenth of the time, eager steps (CI: checks that it runs)
  scripts/bench_loader.py --out FILE     also writes its output to a file
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import scaling_lab.training.data.feed as feed_module
from scaling_lab.core.schedules import Cosine
from scaling_lab.core.sources.context_tree import ContextTree
from scaling_lab.core.sources.mixture import Mixture
from scaling_lab.core.sources.prepared import Prepared
from scaling_lab.core.sources.pysource import PySource
from scaling_lab.core.sources.zipf_facts import ZipfFacts
from scaling_lab.core.spec import Execution, RunSpec
from scaling_lab.corpora.documents import LocalText
from scaling_lab.corpora.pipeline import PrepareSettings, document_batches, prepare
from scaling_lab.corpora.tokenizing import TokenizerTokens, train_bpe
from scaling_lab.planning.designs.isoflop import IsoFlopDesign
from scaling_lab.planning.plan import make_plan
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.planning.settings import ModelSettings, SweepSettings
from scaling_lab.planning.sizes import SizeLadder
from scaling_lab.training.data.feed import open_feed
from scaling_lab.training.run.session import open_session, train_block

LOADER_TARGET = 10.0
BYTES_TARGET = 1e6
# Three quarters of the tokenizer's own speed, to allow for reading and hashing documents.
BPE_TARGET = 0.75
TEXT_MB, TOKENIZER_MB, BPE_VOCABULARY = 12.0, 4.0, 4096
# A tenth, so that both splits have documents even with the short text of --quick.
SETTINGS = PrepareSettings(validation_fraction=0.1)
MISSED: list[str] = []
LINES: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="CPU seconds of each measurement of a loader"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    say(
        f"{datetime.date.today()}, {platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}{', quick' * options.quick}"
    )
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name:
        folder = Path(name)
        text_mb = TEXT_MB / 4 if options.quick else TEXT_MB
        bench_prepare(folder, text_mb)
        bench_loaders(folder, options.seconds / 10 if options.quick else options.seconds, not options.quick)
    if options.out:
        options.out.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return 1 if MISSED and not options.quick else 0


def say(line: str = "") -> None:
    print(line, flush=True)
    LINES.append(line)


def verdict(what: str, value: float, target: float) -> str:
    if value < target:
        MISSED.append(what)
    return f"target {target:g}: {'OK' if value >= target else 'MISSED'}"


# -- prepare-data


def bench_prepare(folder: Path, text_mb: float) -> None:
    path = folder / "text.jsonl"
    write_text(path, text_mb)
    began = wall_and_cpu()
    meta = prepare(LocalText(path), folder / "bytes", replace(SETTINGS, shard_tokens=int(text_mb * 1e6 / 4)))
    wall, cpu = since(began)
    tokens = n_tokens(meta)
    say(f"prepare-data of {text_mb:g} MB of Python source, {meta['documents_read']:,} documents")
    say(
        f"  bytes     {tokens / wall / 1e6:8.2f} Mtok/s  ({tokens / cpu / 1e6:.2f} Mtok per CPU second)"
        f"  {verdict('bytes', tokens / wall / 1e6, BYTES_TARGET / 1e6)}"
    )
    tokenizer = folder / "tokenizer.json"
    train_bpe(LocalText(path).documents(), BPE_VOCABULARY, min(TOKENIZER_MB, text_mb), tokenizer)
    batches = list(document_batches(LocalText(path).documents()))
    settings = replace(SETTINGS, tokenizer=str(tokenizer))
    alone, ours = [], []
    for turn in range(3):
        # A new tokenizer each time, as in our measurement, because a tokenizer caches words.
        encode = TokenizerTokens(tokenizer, "bpe")._tokenizer.encode_batch_fast
        began = wall_and_cpu()
        for batch in batches:
            encode(batch, add_special_tokens=False)
        alone.append(since(began))
        began = wall_and_cpu()
        tokens = n_tokens(prepare(LocalText(path), folder / f"bpe{turn}", settings))
        ours.append(since(began))
    (alone_wall, alone_cpu), (our_wall, our_cpu) = (
        tuple(map(min, zip(*x, strict=True))) for x in (alone, ours)
    )
    say(
        f"  BPE {BPE_VOCABULARY}  {tokens / our_wall / 1e6:8.2f} Mtok/s  compared with {tokens / alone_wall / 1e6:.2f} for "
        f"encode_batch_fast of tokenizers alone; CPU seconds {our_cpu:.1f} and {alone_cpu:.1f}"
    )
    ratio = alone_wall / our_wall
    say(f"  relative to the speed of tokenizers: {ratio:.2f}, {verdict('BPE', ratio, BPE_TARGET)}")


def write_text(path: Path, megabytes: float) -> None:
    """Write source files of installed Python packages as JSON Lines."""
    with open(path, "w", encoding="utf-8") as file:
        source = PySource(site_packages=True, max_mb=megabytes)
        for split in ("train", "validation"):
            for document in source.text(split).split(b"\0"):
                file.write(json.dumps({"text": document.decode("utf-8", "replace")}) + "\n")


def n_tokens(meta: dict[str, Any]) -> int:
    return sum(int(meta["splits"][split]["tokens"]) for split in ("train", "validation"))


# -- loaders


def bench_loaders(folder: Path, seconds: float, compiled: bool) -> None:
    runs = sorted(quickstart_specs(), key=lambda spec: spec.n_params())
    largest, smallest = runs[-1], runs[0]
    consumed = {}
    for name, spec in (("largest", largest), ("smallest", smallest)):
        consumed[name] = step_speed(spec, seconds, compiled)
        say(
            f"the quickstart's {name} step{', compiled' * compiled}: width {spec.shape.width}, depth {spec.shape.depth}, batch of "
            f"{spec.batch_tokens:,} tokens: {consumed[name]:,.0f} tokens per CPU second"
        )
    say(f"loader alone, tokens per CPU second{'':16}over largest  over smallest")
    for name, data, whole in loaders(folder):
        speed = loader_speed(
            replace(largest, data=data, shape=replace(largest.shape, vocab_size=512)), seconds, whole
        )
        ratio = speed / consumed["largest"]
        say(
            f"  {name:<34}{speed:>14,.0f} {ratio:>13.1f} {speed / consumed['smallest']:>14.1f}  "
            f"{verdict(name, ratio, LOADER_TARGET)}"
        )


def loaders(folder: Path) -> Iterator[tuple[str, Any, bool]]:
    """Name, source, and whether the whole corpus is on the device."""
    yield "pysource, whole corpus on the device", PySource(), True
    yield "pysource, in chunks", PySource(), False
    yield "prepared, 4 shards, in chunks", Prepared(str(folder / "bytes")), False
    yield "context_tree", ContextTree(), False
    yield "zipf_facts", ZipfFacts(), False
    yield "mixture of the two and pysource", Mixture((ContextTree(), ZipfFacts(), PySource())), False


def quickstart_specs() -> list[RunSpec]:
    """Specs of the quickstart's plan (the code's defaults but for widths, conf/experiment/quickstart.yaml)."""
    settings = SweepSettings(
        sweep="bench", design=IsoFlopDesign(sizes=SizeLadder(width_multiple=2)), recipe=DefaultRecipe(), model=ModelSettings(), data=PySource(),
        schedule=Cosine(),
    )  # fmt: skip
    return [run.spec for run in make_plan(settings).runs]


def step_speed(spec: RunSpec, seconds: float, compiled: bool) -> float:
    """Tokens per CPU second consumed by a training step on one thread."""
    spec = replace(spec, train_tokens=spec.batch_tokens * 10**6)
    session = open_session(spec, Execution(compile=compiled, threads=1))
    train_block(session, 0, 3)
    return spec.batch_tokens * per_cpu_second(lambda k: train_block(session, 3 + k, 4 + k), seconds)


def loader_speed(spec: RunSpec, seconds: float, whole: bool) -> float:
    """Tokens per CPU second of all threads delivered to the step: a run's windows, block by block."""
    kept = feed_module.RESIDENT_TOKENS
    feed_module.RESIDENT_TOKENS = kept if whole else 0
    try:
        feed = open_feed([replace(spec, train_tokens=spec.batch_tokens * 10**9)], torch.device("cpu"))
    finally:
        feed_module.RESIDENT_TOKENS = kept
    assert feed.is_whole == whole
    steps, offsets = feed.max_block_steps, torch.arange(spec.shape.context + 1)

    def block(k: int) -> None:
        for starts in feed.starts(0, k * steps, steps):
            feed.tokens[starts[:, None] + offsets].long()

    block(0)  # builds a generated source's tables
    blocks = per_cpu_second(lambda k: block(k + 1), seconds)
    return blocks * steps * spec.batch_tokens


def per_cpu_second(work: Callable[[int], object], seconds: float) -> float:
    """Number of calls `work(0)`, `work(1)`, ... per CPU second of all threads."""
    began, count = time.process_time(), 0
    while time.process_time() - began < seconds or count < 2:
        work(count)
        count += 1
    return count / (time.process_time() - began)


def wall_and_cpu() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - began[0], time.process_time() - began[1]


if __name__ == "__main__":
    sys.exit(main())
