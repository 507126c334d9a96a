#!/usr/bin/env python3
"""Measure the coverage of the intervals of an analysis on studies simulated from known laws.

    scripts/calibrate.py                              # all cells, 500 studies each: about half an hour on one core
    scripts/calibrate.py --studies 50                 # a quick check, as in CI
    scripts/calibrate.py --cells "paper chinchilla"   # only cells whose name contains this
    scripts/calibrate.py --state build/calibration    # keep the studies; a later call resumes
    scripts/calibrate.py --out results/benchmarks/calibration.txt

Cells, laws and the pass criterion are in scaling_lab/analysis/inference/calibration.py. The table includes median widths,
because wide intervals cover easily. The exit status is 1 if a cell fails for which its approach claims calibration.
"""

from __future__ import annotations

# ruff: noqa: E402 (the thread settings must precede the import of NumPy)
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scaling_lab.analysis.inference.calibration import (
    CELLS,
    LEVEL,
    PASS_RANGE,
    Cell,
    Coverage,
    StudyInterval,
    coverages,
    run_study,
)


def revision() -> str:
    """The git revision, with a mark where the working tree differs from it."""
    here = Path(__file__).parent
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=here,
            text=True,
            stderr=subprocess.DEVNULL,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass
class Progress:
    """Seconds per study of each cell, and an estimate of the time left."""

    seconds: dict[str, float] = field(default_factory=dict)

    def report(self, cell: Cell, done: int, missing: dict[str, int]) -> None:
        known = list(self.seconds.values()) or [0.0]
        typical = sum(known) / len(known)
        left = sum(n * self.seconds.get(name, typical) for name, n in missing.items())
        print(f"{cell.name}: {done} studies; about {left / 60:.0f} min left", file=sys.stderr, flush=True)


@dataclass
class Results:
    """The studies done so far, by cell; saved in a folder, if there is one, as one JSON file per cell."""

    folder: Path | None
    resamples: int
    now: str
    """The git revision of new studies."""
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self, cell: Cell) -> None:
        """Load the saved studies of a cell if its first study still gives the same result; else start empty."""
        fresh: dict[str, Any] = {"resamples": self.resamples, "revisions": [], "studies": []}
        file = self._file(cell)
        saved = json.loads(file.read_text()) if file is not None and file.exists() else fresh
        self.kept[cell.name] = saved if self._reproduces(cell, saved) else fresh

    def _reproduces(self, cell: Cell, saved: dict[str, Any]) -> bool:
        if saved["resamples"] != self.resamples or not saved["studies"]:
            return False
        now, then = run_study(cell, 0, resamples=self.resamples), saved["studies"][0]
        return set(now) == set(then) and all(
            np.allclose((c.lo, c.hi, c.truth), then[name], rtol=1e-6) for name, c in now.items()
        )

    def add(self, cell: Cell, studies: Sequence[dict[str, StudyInterval]]) -> None:
        kept = self.kept[cell.name]
        kept["studies"] += [{k: (c.lo, c.hi, c.truth) for k, c in s.items()} for s in studies]
        kept["revisions"] = sorted({*kept["revisions"], self.now})
        file = self._file(cell)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(kept))
            temporary.replace(file)

    def count(self, cell: Cell) -> int:
        return len(self.kept[cell.name]["studies"])

    def studies(self, cell: Cell) -> list[dict[str, StudyInterval]]:
        return [{k: StudyInterval(*v) for k, v in s.items()} for s in self.kept[cell.name]["studies"]]

    def _file(self, cell: Cell) -> Path | None:
        return None if self.folder is None else self.folder / f"{cell.name.replace(' ', '_')}.json"


def run(cells: Sequence[Cell], studies: int, workers: int, results: Results) -> None:
    """Run `studies` studies of each cell, in rounds over all cells, so that an interrupted run has some of each."""
    progress = Progress()
    one_round = min(50, studies)
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for target in (*range(one_round, studies, one_round), studies):
            for cell in cells:
                todo = range(results.count(cell), target)
                if not todo:
                    continue
                one = partial(run_study, cell, resamples=results.resamples)
                began = time.monotonic()
                results.add(cell, list(map(one, todo) if pool is None else pool.map(one, todo, chunksize=2)))
                progress.seconds[cell.name] = (time.monotonic() - began) / len(todo)
                missing = {c.name: max(studies - results.count(c), 0) for c in cells}
                progress.report(cell, results.count(cell), missing)


def verdict(c: Coverage, claimed: bool) -> str:
    if c.passes:
        return "pass"
    side = "narrow" if c.coverage < PASS_RANGE[0] else "wide"
    return f"FAIL: too {side}" if claimed else f"too {side} (not claimed)"


def tables(rows: Sequence[tuple[Cell, Sequence[dict[str, StudyInterval]]]]) -> Iterator[str]:
    """Lines of the summary, then of every quantity of every cell."""
    yield f"{'grid':18} {'law':13} {'noise':>6}  {'approach':19} {'studies':>7} {'no interval':>11}  verdict"
    found = {cell.name: coverages(studies) for cell, studies in rows}
    for cell, studies in rows:
        bad = [c.quantity for c in found[cell.name] if not c.passes]
        none = sum(not s for s in studies)
        text = "pass" if not bad else ("FAILS: " if cell.claimed else "not claimed: ") + ", ".join(bad)
        text = text if found[cell.name] else "no intervals"
        yield (
            f"{cell.grid:18} {cell.law:13} {cell.noise_nats:6g}  {cell.approach:19} {len(studies):7d} {none:11d}  {text}"
        )
    yield ""
    yield "All intervals: coverage, its Wilson 99.9% interval, truths below and above the interval, median width (*: of the logarithm)"
    for cell, studies in rows:
        yield ""
        yield (
            f"{cell.grid} | {cell.law} | noise {cell.noise_nats:g} nats | {cell.approach} | {len(studies)} studies"
        )
        for c in found[cell.name]:
            lo, hi = c.wilson
            star = "*" if c.logarithmic else " "
            yield (
                f"  {c.quantity:20} {c.coverage:.3f}  [{lo:.3f}, {hi:.3f}]  {c.below:3d} below {c.n - c.hits - c.below:3d} above"
                f"  width {c.median_width:9.3g}{star}  {verdict(c, cell.claimed)}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=500, help="studies per cell (default 500)")
    parser.add_argument(
        "--resamples", type=int, default=300, help="bootstrap resamples per study (default 300)"
    )
    parser.add_argument(
        "--cells", default="", help="only cells whose name (grid law noise approach) contains this"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument(
        "--state", type=Path, help="folder that keeps the studies, so that a later call resumes"
    )
    parser.add_argument(
        "--table-only", action="store_true", help="print the studies in --state without simulating more"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    cells = [c for c in CELLS if options.cells in c.name]
    if not cells:
        parser.error(f"--cells {options.cells!r}: no such cell. Choices: {', '.join(c.name for c in CELLS)}")
    results = Results(options.state, options.resamples, revision())
    for cell in cells:
        results.load(cell)
    if not options.table_only:
        run(cells, options.studies, options.workers, results)
    rows = [(cell, results.studies(cell)) for cell in cells]
    revisions = sorted({r for c in cells for r in results.kept[c.name]["revisions"]})
    text = "\n".join(
        [
            f"Coverage of {LEVEL:.0%} intervals in simulated studies, {options.resamples} resamples each (scripts/calibrate.py).",
            f"{datetime.date.today()}, git {', '.join(revisions)}.",
            f"A quantity passes if the Wilson 99.9% interval of its coverage meets {PASS_RANGE[0]:.0%} to {PASS_RANGE[1]:.0%}.",
            "",
            *tables(rows),
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text)
    return int(any(not c.passes for cell, s in rows if cell.claimed for c in coverages(s)))


if __name__ == "__main__":
    sys.exit(main())
