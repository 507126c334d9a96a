#!/usr/bin/env python3
"""Measures whether the fitted irreducible loss can be believed: z = (fitted E - true E) / standard error over simulated studies.

    scripts/calibrate_floor.py                    # 300 studies a cell: about five minutes of one core
    scripts/calibrate_floor.py --studies 40 --out FILE

Studies are those of scripts/calibrate.py: a known law on the quickstart's grid, noise from seeds. A calibrated z has mean
0 and standard deviation 1; what it has is printed, with the standard errors of both.
"""

from __future__ import annotations

# ruff: noqa: E402 (the thread settings must precede the import of NumPy)
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import argparse
import datetime
import sys
import time
from pathlib import Path

import numpy as np

from scaling_lab.analyse.approaches import Parametric
from scaling_lab.analyse.calibration import LAWS, Cell, simulate
from scaling_lab.analyse.known_floor import FLOOR, known_floor
from scaling_lab.analyse.settings import BootstrapSettings
from scaling_lab.analyse.uncertainty import bootstrap

NOISES_NATS = (0.005, 0.015)
# A cell passes if |mean z| and |sd z - 1| are at most this beyond three of their own standard errors.
TOLERANCE = 0.15


def study_z(noise_nats: float, study: int, resamples: int) -> float | None:
    """z of one study on the quickstart's grid, through the very code that a report uses."""
    cell = Cell("quickstart", "quickstart", noise_nats, "parametric")
    points = simulate(cell, study).final()
    points.extra[FLOOR] = np.full(points.n_points, LAWS[cell.law].E)
    approach = Parametric()
    estimate = approach.estimate(points)
    band = bootstrap(approach, points, estimate, BootstrapSettings(resamples), study)
    known = known_floor(points, approach, estimate, band)
    return None if known is None else known.z


def line(noise_nats: float, z: np.ndarray, without: int) -> tuple[str, bool]:
    """What is printed of a cell, and whether it passes."""
    n, mean, sd = z.size, float(z.mean()), float(z.std(ddof=1))
    error_of_mean, error_of_sd = sd / np.sqrt(n), sd / np.sqrt(2 * n)
    ok = abs(mean) <= TOLERANCE + 3 * error_of_mean and abs(sd - 1) <= TOLERANCE + 3 * error_of_sd
    text = (
        f"noise {noise_nats:.3f} nats  {n} studies ({without} without z)  mean z {mean:+.3f} +- {error_of_mean:.3f}  "
        f"sd {sd:.3f} +- {error_of_sd:.3f}  |z| > 1.645: {np.mean(np.abs(z) > 1.645):.3f} (10% if normal)  "
        f"{'OK' if ok else 'MISSED'}"
    )
    return text, ok


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    lines = [f"z of the fitted E, quickstart's grid (scripts/calibrate_floor.py), {datetime.date.today()}."]
    good = True
    for noise in NOISES_NATS:
        began, found = time.monotonic(), []
        for study in range(options.studies):
            found.append(study_z(noise, study, options.resamples))
            if (study + 1) % 20 == 0:
                left = (time.monotonic() - began) / (study + 1) * (options.studies - study - 1)
                print(f"noise {noise:.3f}: {study + 1} studies, {left:.0f} s to go", file=sys.stderr)
        z = np.array([each for each in found if each is not None])
        text, ok = line(noise, z, len(found) - z.size)
        print(text)
        lines.append(text)
        good &= ok
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
