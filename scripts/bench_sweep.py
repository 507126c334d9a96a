#!/usr/bin/env python
"""Benchmark large sweeps: make, check, list and resume a plan of 10,000 runs of which 9,990 are done.

Each command (`scaling-lab plan`, `status`, `sweep`) runs in its own process, and only that process is measured, including
imports: wall and CPU seconds and peak resident memory. The finished runs are written by the store (without fsync), with a
few points per curve. Launching is measured without training: the sweep runs with 10 and with 1,010 runs pending, and the
difference in the times at which worker processes would start is the launching overhead. At the end the last 10 runs are
actually trained with the local launcher.

    scripts/bench_sweep.py                everything: writes 300 MB under --folder, about two minutes
    scripts/bench_sweep.py --runs 1000    a tenth of it, with its own time target (CI)
    scripts/bench_sweep.py --out FILE     also writes its output to a file

Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET_RUNS, TARGET_S, TARGET_GB, TARGET_LAUNCH_S = 10_000, 30.0, 1.0, 0.2
# Part of the time target for starting four commands; the rest is proportional to the number of runs.
START_S = 12.0
PENDING, MANY_PENDING = 10, 1_010
# 4 sizes at 5 budgets: 20 runs per seed, each with tens of steps.
RUNS_PER_SEED = 20
STUDY = (
    "sweep=big data.max_mb=1 data.max_epochs=99 eval.tokens=1024 device=cpu compile=false "
    "design.budgets_flops=[2e7,4e7,6e7,8e7,1e8] design.sizes_per_budget=4 design.noise_seeds=1 design.n_opt_at_1e12=200K "
    "design.sizes.min_width=4 design.sizes.max_width=16 design.sizes.width_ratio=1.3 design.sizes.min_depth=1"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000, help="a multiple of 20")
    parser.add_argument("--folder", type=Path, help="where to write the sweep (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="also write the output to this file")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--finish", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0] == "dry", options.measure[1:])
    if options.finish is not None:
        finish_all_but(options.finish)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as temporary:
        lines, met = run(options.folder or Path(temporary), options.runs)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if met else 1


def run(folder: Path, n_runs: int) -> tuple[list[str], bool]:
    """Run all measurements in `folder`, printing as they finish; returns the lines and whether every target is met."""
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    if (folder / "results/big").exists():
        shutil.rmtree(folder / "results/big")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = n_runs // RUNS_PER_SEED
    study = [*STUDY.split(), f"seed=range(0,{seeds})"]
    say(f"bench_sweep: {seeds * RUNS_PER_SEED:,} runs; {datetime.date.today()}, revision {revision()}")
    say(f"{processor()}, Python {platform.python_version()}")
    say(f"{'':44s}{'wall s':>8s}{'CPU s':>8s}{'peak GB':>9s}")
    found: dict[str, dict[str, float]] = {}
    many = min(MANY_PENDING, seeds * RUNS_PER_SEED // 2)

    def step(name: str, *argv: str, dry: bool = False) -> dict[str, float]:
        m = found[name] = child(folder, "--measure", "dry" if dry else "real", *argv)
        say(f"{name:44s}{m['wall_s']:8.2f}{m['cpu_s']:8.2f}{m['peak_gb']:9.2f}")
        return m

    step("made: plan", "plan", *study)
    step("checked: plan again, compared with the disk", "plan", *study)
    child(folder, "--finish", str(many))
    more = step(f"launched: sweep, {many:,} pending (no training)", "sweep", *study, dry=True)
    child(folder, "--finish", str(PENDING))
    step("listed: status", "status", "sweep=big")
    step("listed: status --json", "status", "sweep=big", "--json")
    few = step("resumed: sweep, 10 pending (no training)", "sweep", *study, dry=True)
    cycle = ("made: plan", "checked: plan again, compared with the disk", "listed: status",
             "resumed: sweep, 10 pending (no training)")  # fmt: skip
    total = sum(found[name]["wall_s"] for name in cycle)
    peak = max(m["peak_gb"] for m in found.values())
    a_run = (more["until_launch_s"] - few["until_launch_s"]) / (many - PENDING)
    step("the last 10 trained, 2 workers", "sweep", "sweep=big", "workers=2")
    target_s = START_S + (TARGET_S - START_S) * n_runs / TARGET_RUNS
    verdicts = [
        (f"made, checked, listed and resumed in {total:.1f} s (target {target_s:g})", total < target_s),
        (f"peak memory {peak:.2f} GB (target {TARGET_GB:g})", peak < TARGET_GB),
        (
            f"launching adds {a_run * 1e3:.1f} ms a run (target {TARGET_LAUNCH_S * 1e3:g})",
            a_run < TARGET_LAUNCH_S,
        ),
    ]
    for text, met in verdicts:
        say(f"{'OK' if met else 'MISSED':7s}{text}")
    return lines, all(met for _, met in verdicts)


def child(folder: Path, *argv: str) -> dict[str, float]:
    """Run this script in its own process; returns its measurement."""
    done = subprocess.run(
        [sys.executable, __file__, *argv], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(argv)[:200]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    lines = done.stdout.splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def measure(dry: bool, argv: list[str]) -> int:
    """Run one scaling-lab command in this process and print time and memory."""
    began = time.monotonic()
    from scaling_lab.cli.main import main as scaling_lab
    from scaling_lab.launching import workers

    launched: list[float] = []
    if dry:

        def only_begin(*args: Any, **options: Any) -> None:
            """Replaces the launcher's work: trains nothing."""
            launched.append(time.monotonic() - began)

        workers.run_workers = only_begin
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = scaling_lab(argv)
    if status not in ((0, 1) if dry else (0,)) or len(launched) != dry:
        print(said.getvalue())
        return 1
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    print(
        json.dumps(
            {
                "wall_s": time.monotonic() - began,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "peak_gb": usage.ru_maxrss * unit / 1e9,
                **({"until_launch_s": launched[0]} if dry else {}),
            }
        )
    )
    return 0


def finish_all_but(pending: int) -> None:
    """Write the records of all but the last `pending` runs of the plan, as training would."""
    from scaling_lab.core.record import Environment, EvalPoint, RunRecord, RunStatus
    from scaling_lab.core.storage.store import RunStore

    os.fsync = lambda file: None  # type: ignore[assignment]
    store = RunStore("results/big")
    plan = store.read_plan()
    environment = Environment("0", "3", "2", None, "cpu", "a CPU", "a host", "Linux", plan.data_fingerprint)
    for planned in plan.runs[: len(plan.runs) - pending]:
        claim = store.claim(planned.spec)
        if claim is None:
            continue
        spec, count = planned.spec, planned.spec.count()
        curve = tuple(
            EvalPoint(s, s * spec.batch_tokens, 1e6 * s, 1e-3, 5.0 - s / 100, 5.1 - s / 100, 0.01, s / 10)
            for s in range(1, 9)
        )
        store.start_curve(planned.run_id, curve).close()
        store.write_record(
            RunRecord(
                planned.run_id, spec, planned.execution, count.params, count.flops, RunStatus.COMPLETED, None,
                5.02, 0.01, 1.0, environment, len(curve), curve,
            )
        )  # fmt: skip
        claim.release()


def revision() -> str:
    """The commit being measured."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name and the number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")
        )
    return f"{name}, {cores} cores"


if __name__ == "__main__":
    sys.exit(main())
