"""Evidence for `recipe=default`: how far its learning rate is from the best one at the ends of the quickstart's grid.

    python scripts/recipe_evidence.py                    trains missing runs (25 minutes on two cores) and writes the table
    python scripts/recipe_evidence.py --read DIR         writes the table from existing sweeps

Writes results/published/recipe_default.txt and .png. The target: at the smallest and the largest size the best LR is within
a factor of 2 of the recipe's, and the loss within 0.5% of the best.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from scaling_lab.analysis.studies.shared.excess_loss import TrainedRuns, Tuning, measure_excess_loss
from scaling_lab.analysis.studies.tuning import as_finding, trained_runs
from scaling_lab.core.counts import Convention
from scaling_lab.core.record import RunRecord
from scaling_lab.core.storage.store import RunStore
from scaling_lab.planning.recipes.base import SweepHorizons
from scaling_lab.planning.recipes.default import DefaultRecipe
from scaling_lab.reporting.finding_figures import draw_finding
from scaling_lab.reporting.style import FIGURE_WIDTH, figure_style
from scaling_lab.reporting.svg import to_png

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
GRID = ["design.grid_sizes=6", "design.sizes_per_budget=2", "design.sizes.width_multiple=2"]
SWEEPS = {
    # Both ends of the smallest budget, three seeds; both ends of the others.
    "recipe-lr-small": ["design.budgets_flops=[5e10]", *GRID, "design.seeds=3"],
    "recipe-lr-large": ["design.budgets_flops=[2e11,8e11]", *GRID],
    # A finer grid of learning rates for the two sizes of the target.
    "recipe-lr-smallest": [
        "design.budgets_flops=[5e10]", "design.widths=[10]", "design.seeds=8",
        "design.lr_multipliers=[0.353553391,0.5,0.707106781,1,1.414213562,2]",
    ],
    "recipe-lr-largest": [
        "design.budgets_flops=[8e11]", "design.widths=[94]", "design.seeds=2",
        "design.lr_multipliers=[0.5,1,1.414213562,2,2.828427125]",
    ],
}  # fmt: skip
WITHIN_FACTOR, WITHIN_LOSS = 2.0, 0.005


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
            command += [f"results_dir={folder}", "design=learning_rate", *design]
            subprocess.run(command, check=True)
    runs, device = read(folder)
    # Runs at the recipe's LR are the sweep to be checked; the others tune it.
    multiplier = multipliers(folder)
    own = np.array([abs(multiplier[name] - 1) < 1e-6 for name in runs.names])
    tuning, _ = measure_excess_loss(runs.at(own), runs.at(~own))
    text = table(tuning, device)
    if missing := unfinished(folder):
        text += f"omitted because they are not finished: {', '.join(missing)}\n"
    (PUBLISHED / "recipe_default.txt").write_text(text, encoding="utf-8")
    with figure_style():
        figure = Figure(figsize=(FIGURE_WIDTH, 4.2))
        draw_finding(figure, as_finding(tuning))
        (PUBLISHED / "recipe_default.png").write_bytes(to_png(figure))
    print(text)
    return 0


def unfinished(folder: Path) -> list[str]:
    """Unfinished sweeps, which are omitted because a partial grid would shift its parabola."""
    stores = {sweep: RunStore(folder / sweep) for sweep in SWEEPS}
    return [
        sweep
        for sweep, store in stores.items()
        if not store.plan_path.exists()
        or {r.run_id for r in store.read_plan().runs} - set(store.run_ids_with_record())
    ]


def records_of(folder: Path) -> Iterator[RunRecord]:
    """Records of all finished sweeps; a run shared by several sweeps is repeated."""
    for sweep in SWEEPS.keys() - unfinished(folder):
        yield from RunStore(folder / sweep).load_records(curve=False)[0]


def read(folder: Path) -> tuple[TrainedRuns, str]:
    """Each completed run once, and the device they were trained on."""
    once = {record.run_id: record for record in records_of(folder)}
    devices = sorted({r.environment.device_name for r in once.values()})
    return trained_runs(list(once.values()), Convention.SIX_N_WITH_HEAD), ", ".join(devices)


def multipliers(folder: Path) -> dict[str, float]:
    """Run id -> its LR over the recipe's."""
    recipe, found = DefaultRecipe(), {}
    for record in records_of(folder):
        spec = record.spec
        own = recipe.decide(
            spec.shape, spec.train_tokens, SweepHorizons(spec.train_tokens, spec.train_tokens)
        )
        found[record.run_id] = spec.optimizer.peak_lr / own.optimizer.peak_lr
    return found


def table(tuning: Tuning, device: str) -> str:
    """The table of all cells, and whether the smallest and the largest size meet the target."""
    lines = [
        f"recipe=default: its learning rate against the best, {date.today().isoformat()}",
        f"device: {device}; noise of one loss {tuning.noise_nats:.4f} nats, from {tuning.noise_source}",
        "best LR / the recipe's and the loss above the best, with 90% intervals",
        "",
        f"{'FLOPs':>8} {'N':>8} {'runs':>5}  {'best / recipe':<22} {'loss above the best, %':<26}",
    ]
    smallest = min(c.n_params for c in tuning.cells)
    largest = max(c.n_params for c in tuning.cells)
    verdicts = []
    for c in tuning.cells:
        if c.fit is None or c.excess_nats is None:
            lines.append(f"{c.budget_flops:>8.1e} {c.n_params:>8.0f} {c.n_runs:>5}  {c.message}")
            continue
        ratio, span = c.best_over_used[0], c.best_over_used_intervals[0]
        floor = c.fit.floor_nats
        share = [100 * v / floor for v in (c.excess_nats, c.excess_interval.lo, c.excess_interval.hi)]
        lines.append(
            f"{c.budget_flops:>8.1e} {c.n_params:>8.0f} {c.n_runs:>5}  "
            f"{f'{ratio:.2f} ({span.lo:.2f} to {span.hi:.2f})':<22} "
            f"{f'{share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f})':<26}"
        )
        if c.n_params in (smallest, largest):
            ok = 1 / WITHIN_FACTOR <= ratio <= WITHIN_FACTOR and share[0] <= 100 * WITHIN_LOSS
            which = "smallest" if c.n_params == smallest else "largest"
            verdicts.append(
                f"{which} size: {'meets' if ok else 'MISSES'} the target (a factor of 2, 0.5% of the loss)"
            )
    return "\n".join([*lines, "", *verdicts]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
