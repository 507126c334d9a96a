#!/usr/bin/env python
"""Benchmark of large sweeps: read and analyze 10,000 runs of 1,000 points, from a run store and from tables.

The store is real: the project's own code writes the spec.json, curve.jsonl and record.json of every run (with fsync
disabled). The runs are IsoFLOP grids over sizes, budgets and seeds, from a known law with noise. Each measurement runs in
its own single-threaded process with the files in the page cache: CPU and wall seconds and peak resident memory. It is
repeated with half the runs; the ratio of CPU seconds shows whether the time grows linearly.

The baseline is what one would write without a library: json.loads on every line, one pandas frame per run, concatenated.

    scripts/bench_store.py                 everything; writes 2 GB to --folder and takes about 10 minutes
    scripts/bench_store.py --runs 1000     a tenth of it
    scripts/bench_store.py --out FILE      also write the report to FILE
"""

from __future__ import annotations

# ruff: noqa: E402 (the thread settings must precede the import of NumPy)
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 1000
BUDGETS = np.geomspace(1e13, 1e15, 8)
SIZES = 10
SPAN = 16.0
NOISE = 0.004
STEP_NOISE = 0.03
# The law of tests/helpers/synthetic.py, fitted to the quickstart's losses: E, A, B, alpha, beta.
E, A, B, ALPHA, BETA = 1.08, 55.3, 965.0, 0.50, 0.57
TARGET_S, TARGET_GIB = 60.0, 4.0
MEASUREMENTS = {
    "baseline store": "json.loads per line, pandas frame per run; no analysis",
    "store": "RunStore, curves on the validation set",
    "store train": "RunStore, curves of training loss, smoothed",
    "parquet": "Parquet",
    "csv": "CSV",
    "jsonl": "JSON lines",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument(
        "--folder", type=Path, help="where to write the runs and tables (default: a temporary folder)"
    )
    parser.add_argument("--only", nargs="*", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*options.measure)))
        return
    if options.write:
        write(Path(options.write[0]), int(options.write[1]), int(options.write[2]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-store-") as temporary:
        report = run(options.folder or Path(temporary), options.runs, options.only)
    if options.out:
        options.out.write_text(report + "\n")


def run(folder: Path, n_runs: int, only: list[str]) -> str:
    """Write the store and the tables, first half of the runs and then all, and measure each reader on both."""
    lines: list[str] = []

    def say(text: str = "") -> None:
        print(text, flush=True)
        lines.append(text)

    for text in heading(n_runs):
        say(text)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in only}
    start = time.time()
    for first, last in ((0, n_runs // 2), (n_runs // 2, n_runs)):
        child("--write", str(folder), str(first), str(last))
        if last == n_runs:
            print(f"(written in {time.time() - start:.0f} s)", file=sys.stderr)
        for name in only:
            results[name].append(child("--measure", name, str(folder), str(last)))
            print(f"({name}, {last} runs: {results[name][-1]})", file=sys.stderr, flush=True)
    say(f"{'':<44}{'CPU s':>8}{'wall s':>8}{'read':>7}{'analyze':>9}{'peak GiB':>10}{'ratio at 2x':>13}")
    for name, (half, whole) in results.items():
        say(
            f"{MEASUREMENTS[name]:<44}{whole['cpu_s']:>8.1f}{whole['wall_s']:>8.1f}{whole['read_s']:>7.1f}"
            f"{whole['analyse_s']:>9.1f}{whole['peak_gib']:>10.2f}{whole['cpu_s'] / half['cpu_s']:>13.2f}"
        )
    say()
    for name, (_, whole) in results.items():
        if "exponents" in whole:
            say(
                f"{MEASUREMENTS[name]}: exponent of N {whole['exponents']} (true value: {BETA / (ALPHA + BETA):.4f})"
            )
    ours = [w for n, (_, w) in results.items() if not n.startswith("baseline")]
    slowest, heaviest = max(w["wall_s"] for w in ours), max(w["peak_gib"] for w in ours)
    met = "met" if slowest < TARGET_S and heaviest < TARGET_GIB else "MISSED"
    say()
    say(
        f"target ({TARGET_S:g} s, {TARGET_GIB:g} GiB): {met} by all our readers (at most {slowest:.1f} s of wall time, {heaviest:.2f} GiB)"
    )
    if "baseline store" in results and "store" in results:
        ratio = results["baseline store"][1]["read_s"] / results["store"][1]["read_s"]
        say(f"reading the store is {ratio:.1f}x faster than the baseline")
    return "\n".join(lines)


def child(*arguments: str) -> dict[str, float]:
    """Run one step in its own process, so that peak memory is measured for that step alone."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout) if done.stdout.strip() else {}


# -- measuring


def measured(name: str, folder: str, n_runs: str) -> dict[str, Any]:
    """Seconds and memory of reading one store or table and analyzing it without bootstrap."""
    from scaling_lab.analysis.analysis import AnalysisSettings, analyze
    from scaling_lab.analysis.inference.bootstrap import BootstrapSettings

    start_cpu, start_wall = time.process_time(), time.perf_counter()
    path, out = Path(folder), {}
    if name == "baseline store":
        assert baseline(path / "store", int(n_runs)) == int(n_runs) * POINTS
        read_s = time.process_time() - start_cpu
    else:
        settings = AnalysisSettings(bootstrap=BootstrapSettings(resamples=0))
        observations = reader(name, path, settings)()
        read_s = time.process_time() - start_cpu
        assert observations.n_runs == int(n_runs)
        analysis = analyze(observations, settings)
        out["exponents"] = (
            ", ".join(
                f"{e.approach} " + (f"{e.frontier.params.exponent:.4f}" if e.frontier else e.status.value)
                for e in analysis.estimates
            )
            + f"; {len(analysis.sensitivity)} sensitivity rows, {analysis.points.curves.loss_nats.size} curve points"
        )
    cpu = time.process_time() - start_cpu
    return {
        "cpu_s": cpu,
        "wall_s": time.perf_counter() - start_wall,
        "read_s": read_s,
        "analyse_s": cpu - read_s,
        "peak_gib": peak_gib(),
        **out,
    }


def reader(name: str, folder: Path, settings: Any) -> Callable[[], Any]:
    """A function that reads the observations as `scaling-lab analyze` does."""
    from dataclasses import replace

    from scaling_lab.analysis.analysis import observations_of_sweep, read_observations
    from scaling_lab.analysis.data.ledger import load_ledger
    from scaling_lab.core.storage.store import RunStore

    if not name.startswith("store"):
        return lambda: read_observations(folder / f"table.{name}", settings)
    curve = "train" if name == "store train" else "auto"
    envelope = replace(settings.approach.envelope, curve=curve)
    chosen = replace(settings, approach=replace(settings.approach, envelope=envelope))

    def read() -> Any:
        records, problems = load_ledger(RunStore(folder / "store"))
        assert not problems
        return observations_of_sweep(records, chosen)

    return read


def baseline(store: Path, n_runs: int) -> int:
    """Number of points read, in the obvious way."""
    import pandas as pd

    frames = []
    for path in sorted(store.glob("runs/*/record.json")):
        record = json.loads(path.read_text())
        with open(path.with_name("curve.jsonl")) as file:
            frame = pd.DataFrame([json.loads(line) for line in file])
        frames.append(frame.assign(run_id=record["run_id"], final_loss=record["final_val_loss_nats"]))
    assert len(frames) == n_runs
    return len(pd.concat(frames, ignore_index=True))


def peak_gib() -> float:
    """Peak resident memory of this process. On Linux ru_maxrss may include the parent's; VmHWM does not."""
    status = Path("/proc/self/status")
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# -- writing


def write(folder: Path, first: int, last: int) -> None:
    """Write runs first to last to the store, and a table of runs 0 to last in each format."""
    from scaling_lab.core.storage.store import RunStore

    os.fsync = lambda _: None  # a benchmark's files need not survive a power failure
    store = RunStore(folder / "store")
    for spec, curve in runs(first, last):
        record = record_of(spec, curve)
        claim = store.claim(spec)
        assert claim is not None
        with store.start_curve(record.run_id, points_of(spec, curve)):
            pass
        assert store.write_record(record)
        claim.release()
    write_tables(folder, last)


def runs(first: int, last: int) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """(spec, curve) of each run: budgets vary fastest, then sizes, then seeds."""
    from scaling_lab.core.counts import Convention
    from scaling_lab.core.schedules import Cosine
    from scaling_lab.core.shapes.gpt import GPTShape
    from scaling_lab.core.sources.pysource import PySource
    from scaling_lab.core.spec import EvalSpec, OptimizerSpec, RunSpec

    convention = Convention.SIX_N_WITH_HEAD
    shapes = {w: GPTShape(width=w, depth=max(1, round(w / 24)), heads=2) for w in range(16, 513, 4)}
    n_of = {w: s.count().n_params(convention) for w, s in shapes.items()}
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    for i in range(first, last):
        budget = BUDGETS[i % len(BUDGETS)]
        size, seed = (i // len(BUDGETS)) % SIZES, i // (len(BUDGETS) * SIZES)
        wanted = g * (budget / 6) ** (BETA / (ALPHA + BETA)) * SPAN ** (size / (SIZES - 1) - 0.5)
        width = min(n_of, key=lambda w: abs(np.log(n_of[w] / wanted)))
        batch = max(1, round(budget / (6 * n_of[width] * POINTS * 64))) * 64
        spec = RunSpec(
            sweep="bench", role="isoflop", budget_flops=float(budget), shape=shapes[width], data=PySource(),
            schedule=Cosine(), optimizer=OptimizerSpec(peak_lr=0.01), batch_tokens=batch,
            train_tokens=POINTS * batch, eval=EvalSpec(), seed_init=seed, seed_data=seed, convention=convention,
        )  # fmt: skip
        yield spec, curve_of(n_of[width], batch, np.random.default_rng([i, 7]))


def curve_of(n_params: float, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Losses at every step: the law, the excess before annealing, and noise per run and per step."""
    step = np.arange(1, POINTS + 1)
    data = B * (step * batch) ** -BETA
    cosine = 0.5 * (1 + np.cos(np.pi * step / POINTS))
    val = np.minimum(np.log(256), E + A * n_params**-ALPHA + data * (1 + 0.35 * cosine)) + rng.normal(
        0, NOISE
    )
    visited = np.isin(step, [max(1, round(POINTS * 2 ** (-k / 2))) for k in range(16)])
    return {"step": step, "train": val + rng.normal(0, STEP_NOISE, POINTS), "val": val, "visited": visited}


def points_of(spec: Any, curve: dict[str, np.ndarray]) -> Iterator[Any]:
    from scaling_lab.core.record import EvalPoint

    per_token = spec.flops_per_token()
    columns = (curve[k].tolist() for k in ("step", "train", "val", "visited"))
    for step, train, val, visited in zip(*columns):
        tokens = step * spec.batch_tokens
        yield EvalPoint(
            step, tokens, per_token * tokens, spec.learning_rate(step - 1), train,
            val if visited else None, 0.002 if visited else None, wall_time_s=step * 0.0123,
        )  # fmt: skip


def record_of(spec: Any, curve: dict[str, np.ndarray]) -> Any:
    from scaling_lab.core.record import Environment, RunRecord, RunStatus
    from scaling_lab.core.spec import Execution

    count = spec.count()
    return RunRecord(
        run_id=spec.run_id(), spec=spec, execution=Execution(), params=count.params, flops=count.flops,
        status=RunStatus.COMPLETED, reason=None, final_val_loss_nats=float(curve["val"][-1]),
        final_val_loss_sem_nats=0.002, wall_time_s=12.3,
        environment=Environment("0", "0", "0", None, "cpu", "synthetic", "nowhere", "none", "0" * 64),
        curve_points=POINTS,
    )  # fmt: skip


def write_tables(folder: Path, n_runs: int) -> None:
    """The same runs as one table, one row per step."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    schema = pa.schema(
        [("run_id", pa.string()), ("params", pa.int64()), ("tokens", pa.int64()), ("flops", pa.float64()),
         ("loss", pa.float64()), ("seed", pa.int64())]
    )  # fmt: skip
    parquet = pyarrow.parquet.ParquetWriter(folder / "table.parquet", schema)
    csv = pyarrow.csv.CSVWriter(folder / "table.csv", schema)
    lines = open(folder / "table.jsonl", "w")  # noqa: SIM115 (closed with the others below)
    for spec, curve in runs(0, n_runs):
        tokens = curve["step"] * spec.batch_tokens
        columns = {
            "run_id": [spec.run_id()] * POINTS,
            "params": np.full(POINTS, round(spec.n_params())),
            "tokens": tokens,
            "flops": spec.flops_per_token() * tokens,
            "loss": curve["val"],
            "seed": np.full(POINTS, spec.seed_init),
        }
        table = pa.table(columns, schema=schema)
        parquet.write_table(table)
        csv.write_table(table)
        head = f'{{"run_id": "{columns["run_id"][0]}", "params": {columns["params"][0]}, "seed": {spec.seed_init}, '
        cells = zip(tokens.tolist(), columns["flops"].tolist(), curve["val"].tolist())
        lines.writelines(f'{head}"tokens": {t}, "flops": {c!r}, "loss": {v!r}}}\n' for t, c, v in cells)
    for writer in (parquet, csv, lines):
        writer.close()


# -- heading


def heading(n_runs: int) -> list[str]:
    """Date, revision, processor and versions."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            x.split(":", 1)[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    revision = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "scaling_lab/analysis", "scripts/bench_store.py"],
        capture_output=True,
        text=True,
    )
    dirty = "-dirty" if changed.stdout.strip() else ""
    return [
        f"bench_store: {n_runs:,} runs x {POINTS:,} points read and analyzed without bootstrap, with sensitivity and backtest",
        f"{datetime.date.today()}  revision {revision or 'unknown'}{dirty}  {cpu}  Python {platform.python_version()}, NumPy {np.__version__}",
        "",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
