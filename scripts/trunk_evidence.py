"""Evidence for `design=trunk_cooldown`: its losses and exponents compared with the same grid trained with cosines.

    python scripts/trunk_evidence.py                    trains missing runs (12 minutes on two cores) and writes the table
    python scripts/trunk_evidence.py --read DIR         writes the table from existing sweeps

Writes results/published/trunk_cooldown.txt: the compute of each sweep, the loss of each cell in both, and N_opt ~ C^a.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np

from scaling_lab.analysis.analysis import AnalysisSettings, analyze, observations_of_sweep
from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.storage.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "published" / "trunk_cooldown.txt"
# Budgets a factor of sqrt(2) apart, for which the paper claims to save half the compute.
GRID = ["design.budgets_flops=[1e11,1.4e11,2e11,2.8e11,4e11,5.6e11,8e11]", "design.sizes_per_budget=5"]
SWEEPS = {
    "trunks": ["design=trunk_cooldown", *GRID],
    "cosines": ["design=isoflop", "design.noise_seeds=1", *GRID],
}

Cell = tuple[float, int, int]
"""Budget (FLOPs), width, depth."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--read", type=Path, default=None, help="a results folder with the sweeps; does not train"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to train")
    options = parser.parse_args()
    folder = options.read or options.results
    if options.read is None:
        for sweep, design in SWEEPS.items():
            command = [sys.executable, "-P", "-m", "scaling_lab.cli.main", "sweep", f"sweep={sweep}"]
            subprocess.run([*command, f"results_dir={folder}", *design], check=True)
    stores = [RunStore(folder / sweep) for sweep in SWEEPS]
    text = report(*(store.load_records()[0] for store in stores))
    OUT.write_text(text, encoding="utf-8")
    print(text)
    return 0


def grid(records: list[RunRecord]) -> dict[Cell, RunRecord]:
    """The completed runs of the grid by cell, only the first seed of each."""
    found: dict[Cell, RunRecord] = {}
    for record in records:
        spec = record.spec
        if spec.role != "trunk" and record.status is RunStatus.COMPLETED:
            found.setdefault((spec.budget_flops, spec.shape.width, spec.shape.depth), record)
    return found


def spent_flops(records: list[RunRecord]) -> float:
    """Training FLOPs of all runs including trunks, counting each step once."""
    return sum(record.spec.own_train_flops() for record in records)


def exponent(records: list[RunRecord], approach: int) -> str:
    """The exponent a of N_opt ~ C^a with its 90% interval, from the grid's runs without trunks."""
    settings = AnalysisSettings(sensitivity=False, backtest=False, profile=False)
    found = analyze(observations_of_sweep([r for r in records if r.spec.role != "trunk"], settings), settings)
    frontier, span = found.estimates[approach].frontier, found.bands[approach].interval("params_exponent")
    if frontier is None:
        return str(found.estimates[approach].message)
    around = f" ({span.lo:.3f} to {span.hi:.3f})" if span else ""
    return f"{frontier.params.exponent:.3f}{around}"


def report(trunks: list[RunRecord], cosines: list[RunRecord]) -> str:
    """The table that compares the two sweeps."""
    cooled, annealed = grid(trunks), grid(cosines)
    device = sorted({r.environment.device_name for r in (*trunks, *cosines)})
    lines = [
        f"design=trunk_cooldown and the same grid trained with cosines, {date.today().isoformat()}; {', '.join(device)}",
        "final validation loss, nats",
        "",
        f"{'FLOPs':>8} {'N':>8} {'cosine':>8} {'branch':>8} {'branch - cosine':>16}",
    ]
    cells = sorted(cooled.keys() & annealed.keys())
    differences = []
    for cell in cells:
        a, b = annealed[cell].final_val_loss_nats, cooled[cell].final_val_loss_nats
        assert a is not None
        assert b is not None
        differences.append(b - a)
        n_params = cooled[cell].spec.n_params()
        lines.append(f"{cell[0]:>8.1e} {n_params:>8.0f} {a:>8.4f} {b:>8.4f} {b - a:>+16.4f}")
    mean, sd = float(np.mean(differences)), float(np.std(differences, ddof=1))
    spent, alone = spent_flops(trunks), spent_flops(list(annealed.values()))
    lines += [
        "",
        f"branch - cosine over {len(cells)} cells: mean {mean:+.4f} nats, standard deviation {sd:.4f}",
        f"training FLOPs: cosine {alone:.3g}, trunks and branches {spent:.3g}: {1 - spent / alone:.0%} saved",
    ]
    for name, k in (("isoflop", 1), ("parametric", 2)):
        lines.append(
            f"N_opt ~ C^a, {name}: cosine {exponent(list(annealed.values()), k)}, branches {exponent(trunks, k)}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
