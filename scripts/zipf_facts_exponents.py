#!/usr/bin/env python3
"""Check the exponents in D predicted for `data=zipf_facts` (Michaud et al. 2023, arXiv 2303.13506) by training.

    python scripts/zipf_facts_exponents.py               trains missing runs (minutes on two cores) and writes the table
    python scripts/zipf_facts_exponents.py --read DIR    writes the table from existing sweeps

Trains experiment=zipf_facts_exponents at each slope in `SLOPES` and writes results/published/zipf_facts_exponents.txt and
.png: the models' errors against D (1 - exact_match, and the loss of values), their exponent, and the predicted one.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from scaling_lab.analysis.studies.fact_exponents import Comparison, as_finding, comparisons
from scaling_lab.core.errors import UserError
from scaling_lab.core.record import RunRecord
from scaling_lab.core.storage.store import RunStore
from scaling_lab.reporting.finding_figures import draw_finding
from scaling_lab.reporting.style import FIGURE_WIDTH, figure_style
from scaling_lab.reporting.svg import to_png

ROOT = Path(__file__).resolve().parent.parent
SLOPES = (0.3, 0.7)
EXPERIMENT = "zipf_facts_exponents"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--read", type=Path, help="a results folder with the sweeps; does not train")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to train")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "published")
    parser.add_argument(
        "--workers", type=int, help="number of training processes (default: the sweep's default)"
    )
    options = parser.parse_args()
    folder = options.read or options.results
    if options.read is None:
        for slope in SLOPES:
            train(folder, slope, options.workers)
    try:
        records = [record for slope in SLOPES for record in finished(folder, slope)]
        found = comparisons(records)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(found, records)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{EXPERIMENT}.txt").write_text(text, encoding="utf-8")
    with figure_style():
        (options.out / f"{EXPERIMENT}.png").write_bytes(to_png(figure(found)))
    print(text, end="")
    return 0


def sweep_name(slope: float) -> str:
    """One sweep per slope, since a sweep has one corpus."""
    return f"{EXPERIMENT}-s{slope:g}"


def train(folder: Path, slope: float, workers: int | None) -> None:
    command = [sys.executable, "-P", "-m", "scaling_lab.cli.main", "sweep", f"experiment={EXPERIMENT}"]
    command += [f"sweep={sweep_name(slope)}", f"data.slope={slope:g}", f"results_dir={folder}"]
    command += [] if workers is None else [f"workers={workers}"]
    subprocess.run(command, check=True)


def finished(folder: Path, slope: float) -> list[RunRecord]:
    """Records of one sweep's plan. Raises `UserError` if it is missing or has unfinished runs."""
    store = RunStore.for_sweep(folder, sweep_name(slope))
    if not store.plan_path.exists():
        raise UserError(f"{store.plan_path} does not exist: run the script without --read first.")
    planned = {run.run_id for run in store.read_plan().runs}
    records = [record for record in store.load_records(curve=False)[0] if record.run_id in planned]
    missing = planned - {record.run_id for record in records}
    if missing:
        raise UserError(
            f"sweep={sweep_name(slope)} has {len(missing)} unfinished runs: run the script without --read first."
        )
    return records


def table(found: Sequence[Comparison], records: Sequence[RunRecord]) -> str:
    """The table of measured and predicted exponents."""
    shape, data = records[0].spec.shape, records[0].spec.data
    devices = ", ".join(sorted({record.environment.device_name for record in records}))
    trained_at = ", ".join(sorted({r.environment.git_revision or "an unknown revision" for r in records}))
    lines = [
        f"Exponents in D of data=zipf_facts, measured by training (scripts/{Path(__file__).name})",
        f"{datetime.date.today()}, table made at revision {revision()}; runs trained at {trained_at}; {devices}",
        f"{data.facts:,} facts, {data.symbols} letters; {shape.kind} of width {shape.width}, depth {shape.depth}, "
        f"N = {records[0].spec.n_params():,.0f} (six_n_with_head); {len(records)} runs",
        "measured: exponent -d ln(score) / d ln(D) by least squares over the runs, with its standard error; predicted: the same for",
        "the share of statements whose fact is not among D / tau statements, tau fitted; local: predicted at the smallest and the",
        "largest D; s/(1+s): for infinitely many facts",
        "",
        f"{'slope s':<8}{'score':<17}{'measured':<16}{'predicted':>10}{'local':>17}{'s/(1+s)':>9}{'tau':>8}{'rms ln':>8}",
    ]
    for each in found:
        local = "{:.3f} to {:.3f}".format(*each.local_exponents)
        measured = f"{each.exponent.value:.3f} +- {each.exponent.standard_error:.3f}"
        lines.append(
            f"{each.source.slope:<8g}{each.score:<17}{measured:<16}{each.predicted_exponent:>10.3f}{local:>17}"
            f"{each.asymptote:>9.3f}{each.scale:>8.2f}{each.rms_log:>8.3f}"
        )
    for each in found:
        lines += [
            "",
            f"s = {each.source.slope:g}, {each.score}: D, measured, predicted, tau from this D alone, exponent from the previous D",
        ]
        between = -np.diff(np.log(each.measured)) / np.diff(np.log(each.train_tokens))
        for i, (d, y, p) in enumerate(zip(each.train_tokens, each.measured, each.predicted, strict=True)):
            step = f"{between[i - 1]:>10.3f}" if i else ""
            alone = each.scale_of_each[i]
            tau = f"{'none':>10}" if alone is None else f"{alone:>10.1f}"
            lines.append(f"{d:>12,.0f}{y:>12.5f}{p:>12.5f}{tau}{step}")
    return "\n".join(lines) + "\n"


def figure(found: Sequence[Comparison]) -> Figure:
    """The figure of the study."""
    finding = as_finding(found)
    assert finding.chart is not None
    drawn = Figure(figsize=(FIGURE_WIDTH, finding.chart.height_inches))
    draw_finding(drawn, finding)
    return drawn


def revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
