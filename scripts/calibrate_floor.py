#!/usr/bin/env python3
"""Measure the calibration of the fitted irreducible loss: z = (fitted E - true E) / standard error over simulated studies.

    scripts/calibrate_floor.py                    # 500 studies per noise level: about six minutes on one core
    scripts/calibrate_floor.py --workers 2 --out results/benchmarks/calibration_floor.txt
    scripts/calibrate_floor.py --studies 40       # a quick check

Studies are simulated as in scripts/calibrate.py: a known law on the quickstart's grid with seed noise. A calibrated z has
mean 0 and standard deviation 1; a noise level passes if both are within three of their standard errors of that. The exit
status is 1 if one fails.
"""

from __future__ import annotations

# ruff: noqa: E402 (the thread settings must precede the import of NumPy)
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from scaling_lab.analysis.approaches import Parametric
from scaling_lab.analysis.data.observations import FLOOR
from scaling_lab.analysis.inference.bootstrap import bootstrap
from scaling_lab.analysis.inference.calibration import LAWS, Cell, simulate
from scaling_lab.analysis.settings import BootstrapSettings
from scaling_lab.analysis.studies.known_floor import known_floor

NOISES_NATS = (0.005, 0.015)
# |mean z| and |sd z - 1| must not exceed this many of their standard errors.
TARGET_ERRORS = 3.0


def study_z(noise_nats: float, resamples: int, study: int) -> float | None:
    """z of one study on the quickstart's grid, computed by the code that a report uses."""
    cell = Cell("quickstart", "quickstart", noise_nats, "parametric")
    points = simulate(cell, study).final()
    points.extra[FLOOR] = np.full(points.n_points, LAWS[cell.law].E)
    approach = Parametric()
    estimate = approach.estimate(points)
    band = bootstrap(approach, points, estimate, BootstrapSettings(resamples), study)
    known = known_floor(points, approach, estimate, band)
    return None if known is None else known.z


def all_z(noise_nats: float, studies: int, resamples: int, workers: int) -> list[float | None]:
    """z of every study, in the same order for any number of processes; prints the time left to stderr."""
    one = partial(study_z, noise_nats, resamples)
    began, found = time.monotonic(), []
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        each: Iterator[float | None] = (
            map(one, range(studies)) if pool is None else pool.map(one, range(studies), chunksize=4)
        )
        for done, z in enumerate(each, start=1):
            found.append(z)
            if done % 20 == 0:
                left = (time.monotonic() - began) / done * (studies - done)
                print(f"noise {noise_nats:.3f}: {done} studies, {left:.0f} s to go", file=sys.stderr)
    return found


def line(noise_nats: float, z: np.ndarray, without: int) -> tuple[str, bool]:
    """The line printed for a noise level, and whether it passes."""
    n, mean, sd = z.size, float(z.mean()), float(z.std(ddof=1))
    error_of_mean, error_of_sd = sd / np.sqrt(n), sd / np.sqrt(2 * n)
    off = mean / error_of_mean, (sd - 1) / error_of_sd
    ok = max(map(abs, off)) <= TARGET_ERRORS
    text = (
        f"noise {noise_nats:.3f} nats  {n} studies ({without} without z)  mean z {mean:+.3f} +- {error_of_mean:.3f} "
        f"({off[0]:+.1f} s.e. off)  sd {sd:.3f} +- {error_of_sd:.3f} ({off[1]:+.1f} s.e. off)  "
        f"|z| > 1.645: {np.mean(np.abs(z) > 1.645):.3f} (10% if normal)  {'OK' if ok else 'MISSED'}"
    )
    return text, ok


def revision() -> str:
    """The git revision, with a mark where the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        here = Path(__file__).parent
        return subprocess.check_output(command, cwd=here, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=500, help="studies per noise level (default 500)")
    parser.add_argument(
        "--resamples", type=int, default=300, help="bootstrap resamples per study (default 300)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=None, help="also write the table to this file")
    options = parser.parse_args()
    for name, least in (("studies", 2), ("resamples", 20), ("workers", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: must be at least {least}")
    lines = [
        f"z of the fitted E, quickstart's grid, {options.resamples} resamples (scripts/calibrate_floor.py).",
        f"{datetime.date.today()}, git {revision()}.",
        f"Target: mean 0 and standard deviation 1, each to within {TARGET_ERRORS:g} standard errors of what was measured.",
    ]
    print("\n".join(lines))
    good = True
    for noise in NOISES_NATS:
        found = all_z(noise, options.studies, options.resamples, options.workers)
        z = np.array([each for each in found if each is not None])
        text, ok = line(noise, z, len(found) - z.size)
        print(text, flush=True)
        lines.append(text)
        good &= ok
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
