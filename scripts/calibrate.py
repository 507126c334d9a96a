#!/usr/bin/env python3
"""Measures whether the intervals that an analysis prints cover: simulates studies from known laws and counts.

    scripts/calibrate.py                              # 500 studies a cell, every cell: about half an hour of one core
    scripts/calibrate.py --studies 50                 # a quick look, as CI takes it
    scripts/calibrate.py --cells "paper chinchilla"   # only cells whose name contains this
    scripts/calibrate.py --state calibration.json     # saves after every cell; run again, it resumes
    scripts/calibrate.py --out results/calibration.txt

Cells, laws and the rule of passing are in scaling_lab/analyse/calibration.py. Median widths are printed too: wide
intervals cover easily. The exit status is 1 if a cell fails that its approach claims to serve.
"""

from __future__ import annotations

# ruff: noqa: E402 (the thread settings must precede the import of NumPy)
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import scaling_lab.analyse
from scaling_lab.analyse.calibration import (
    CELLS,
    LEVEL,
    PASS_RANGE,
    Cell,
    Coverage,
    Covering,
    coverages,
    run_study,
    simulate,
)

# The sources that decide an approach's numbers, under scaling_lab/analyse: saved results of another version do not count.
_SHARED = ("frontiers.py", "uncertainty.py", "predict.py")
_FITTING = ("fitting*.py", "laws/base.py", "laws/sums.py", "laws/chinchilla.py", "approaches/parametric.py")
_DECISIVE = {
    "envelope": ("approaches/envelope.py",),
    "envelope-hull": ("approaches/envelope.py",),
    "isoflop": ("approaches/isoflop.py", "approaches/*_*.py", "approaches/valley*.py"),
    "parametric": _FITTING,
    "parametric-profile": (*_FITTING, "profiles.py"),
}


def fingerprint(cell: Cell) -> str:
    """A hash of what decides a cell's numbers: the sources, and the first simulated study itself."""
    folder = Path(scaling_lab.analyse.__file__).parent
    patterns = (*_SHARED, *_DECISIVE[cell.approach])
    digest = hashlib.sha256()
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        digest.update(file.read_bytes())
    first = simulate(cell, 0)
    for values in (first.n_params, first.compute_flops, first.loss_nats):
        digest.update(values.tobytes())
    return digest.hexdigest()[:12]


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


def run_cell(
    cell: Cell, studies: int, resamples: int, workers: int, done_before: float, total: float
) -> list[dict[str, Covering]]:
    """All studies of a cell, with progress and the time left on standard error."""
    one = partial(run_study, cell, resamples=resamples)
    began, results = time.monotonic(), []
    for result in _in_order(one, studies, workers):
        results.append(result)
        if len(results) % 10 == 0 and sys.stderr.isatty():
            spent = time.monotonic() - began
            left = spent / len(results) * (studies - len(results)) + total - done_before
            print(
                f"\r{cell.name}: {len(results)}/{studies}, {spent:.0f} s, about {left / 60:.0f} min left  ",
                end="",
                file=sys.stderr,
            )
    print(f"\r{cell.name}: {studies} studies in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return results


def _in_order(one: partial[dict[str, Covering]], studies: int, workers: int) -> Iterator[dict[str, Covering]]:
    if workers <= 1:
        yield from map(one, range(studies))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(one, range(studies), chunksize=5)


def verdict(c: Coverage, claimed: bool) -> str:
    if c.passes:
        return "pass"
    side = "narrow" if c.coverage < PASS_RANGE[0] else "wide"
    return f"FAIL: too {side}" if claimed else f"too {side} (not claimed)"


def tables(rows: Sequence[tuple[Cell, list[Coverage], int]]) -> Iterator[str]:
    """The summary, then every quantity of every cell."""
    yield "Cells"
    yield f"{'grid':18} {'law':13} {'noise':>6}  {'approach':19} {'interval':>8}  verdict"
    for cell, found, studies in rows:
        bad = [c.quantity for c in found if not c.passes]
        n = max((c.n for c in found), default=0)
        text = (
            "pass"
            if found and not bad
            else ("not claimed: " if not cell.claimed else "FAILS: ") + ", ".join(bad)
        )
        share = f"{n / studies:8.1%}"
        yield f"{cell.grid:18} {cell.law:13} {cell.noise_nats:6g}  {cell.approach:19} {share}  {text}"
    yield ""
    yield "Every interval: coverage, its Wilson 99.9% interval, truths below and above, median width (* of the logarithm)"
    for cell, found, _ in rows:
        yield ""
        yield f"{cell.grid} | {cell.law} | noise {cell.noise_nats:g} nats | {cell.approach}"
        for c in found:
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
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument(
        "--cells", default="", help="only cells whose name (grid law noise approach) contains this"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--state", type=Path, help="a JSON file to save finished cells in, and to resume from"
    )
    parser.add_argument("--out", type=Path, help="also writes the table here")
    options = parser.parse_args()
    state = json.loads(options.state.read_text()) if options.state and options.state.exists() else {}
    now = revision()
    chosen = [c for c in CELLS if options.cells in c.name]
    rows, revisions, spent = [], set(), {}
    for i, cell in enumerate(chosen):
        key = f"{cell.name} {options.studies} {options.resamples} {fingerprint(cell)}"
        if key not in state:
            began = time.monotonic()
            # The cells to come are taken to cost what the ones so far did.
            mean = sum(spent.values()) / len(spent) if spent else 0.0
            to_come = mean * (len(chosen) - i - 1)
            results = run_cell(cell, options.studies, options.resamples, options.workers, 0.0, to_come)
            spent[cell.name] = time.monotonic() - began
            saved = [{k: (c.lo, c.hi, c.truth) for k, c in study.items()} for study in results]
            state[key] = {"revision": now, "cell": asdict(cell), "studies": saved}
            if options.state:
                temporary = options.state.with_suffix(".new")
                temporary.write_text(json.dumps(state))
                temporary.replace(options.state)
        studies = [{k: Covering(*v) for k, v in study.items()} for study in state[key]["studies"]]
        revisions.add(state[key]["revision"])
        rows.append((cell, coverages(studies), len(studies)))
    text = "\n".join(
        [
            f"Coverage of {LEVEL:.0%} intervals over {options.studies} simulated studies a cell, {options.resamples} resamples each.",
            f"scripts/calibrate.py, {datetime.date.today()}, git {', '.join(sorted(revisions))}.",
            f"A quantity passes if the Wilson 99.9% interval of its coverage meets {PASS_RANGE[0]:.0%} to {PASS_RANGE[1]:.0%}.",
            "",
            *tables(rows),
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text)
    return int(any(not c.passes for cell, found, _ in rows if cell.claimed for c in found))


if __name__ == "__main__":
    sys.exit(main())
