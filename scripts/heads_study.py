"""How many attention heads small models want: heads 1, 2 and 4 at fixed N and FLOPs, with the learning rate tuned.

    python scripts/heads_study.py                    trains missing runs (6 minutes on two cores) and writes the table
    python scripts/heads_study.py --read DIR         writes the table from existing sweeps

Writes results/published/heads_study.txt, from which planning/settings.py takes the number of heads of CPU ladders.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np

from scaling_lab.core.record import RunRecord, RunStatus
from scaling_lab.core.storage.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "published" / "heads_study.txt"
HEADS = (1, 2, 4)
MULTIPLIERS = (0.5, 1.0, 2.0)
# Width: (budget, seeds). Near the smallest, the middle and the largest size of the quickstart.
CELLS = {16: (5e10, 3), 32: (5e10, 3), 64: (1e11, 1)}


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
        for width, (budget, seeds) in CELLS.items():
            subprocess.run(command(folder, width, budget, seeds), check=True)
    text = table({width: RunStore(folder / f"heads-{width}").load_records()[0] for width in CELLS})
    OUT.write_text(text, encoding="utf-8")
    print(text)
    return 0


def command(folder: Path, width: int, budget: float, seeds: int) -> list[str]:
    """The sweep of one width."""
    return [
        *(sys.executable, "-P", "-m", "scaling_lab.cli.main", "sweep", f"sweep=heads-{width}", f"results_dir={folder}"),
        *("design=learning_rate", f"design.budgets_flops=[{budget:g}]", f"design.widths=[{width}]", "design.depths=[2]"),
        f"design.lr_multipliers=[{','.join(f'{m:g}' for m in MULTIPLIERS)}]",
        *(f"design.seeds={seeds}", f"model.heads={','.join(map(str, HEADS))}", "device=cpu"),
    ]  # fmt: skip


def losses(records: list[RunRecord], heads: int) -> np.ndarray:
    """(LRs ascending, seeds) final losses. Raises ValueError if runs are missing."""
    found = sorted(
        (r.spec.optimizer.peak_lr, r.spec.seed_init, r.final_val_loss_nats)
        for r in records
        if r.spec.shape.heads == heads and r.status is RunStatus.COMPLETED
    )
    return np.array([loss for _, _, loss in found]).reshape(len(MULTIPLIERS), -1)


def tuned(losses_by_lr: np.ndarray) -> tuple[float, float]:
    """(least loss of the parabola in ln LR through the means, best LR over the recipe's), the LR within the tried range."""
    x = np.log(MULTIPLIERS)
    a, b, c = np.polyfit(x, losses_by_lr.mean(axis=1), 2)
    best = (
        float(np.clip(-b / (2 * a), x[0], x[-1])) if a > 0 else float(x[losses_by_lr.mean(axis=1).argmin()])
    )
    return float(a * best**2 + b * best + c), float(np.exp(best))


def table(records_by_width: dict[int, list[RunRecord]]) -> str:
    """The table of all widths."""
    device = next(r for records in records_by_width.values() for r in records).environment.device_name
    lines = [
        f"attention heads at fixed N, {date.today().isoformat()}; {device}; data=pysource, context 64, depth 2",
        "final validation loss in nats, mean over seeds, at half, once and twice the recipe's LR; tuned: least of the parabola",
        "in ln LR; loss and standard error against one head are over seeds, LR by LR",
        "",
        f"{'width':>5} {'FLOPs':>8} {'seeds':>5} {'heads':>5} {'head dim':>8}  {'x 0.5':>6} {'x 1':>6} {'x 2':>6}  "
        f"{'tuned':>6} {'best LR':>7}  {'against one head':>16}",
    ]
    for width, records in records_by_width.items():
        budget, seeds = CELLS[width]
        if len(records) < len(HEADS) * len(MULTIPLIERS) * seeds:
            lines.append(f"{width:>5} {budget:>8.1e} {seeds:>5}  not finished")
            continue
        one = losses(records, 1)
        for heads in HEADS:
            own = losses(records, heads)
            loss, ratio = tuned(own)
            versus = (own - one).ravel()
            error = versus.std(ddof=1) / np.sqrt(versus.size)
            against = "" if heads == 1 else f"{versus.mean():+.4f} +- {error:.4f}"
            means = " ".join(f"{m:6.4f}" for m in own.mean(axis=1))
            lines.append(
                f"{width:>5} {budget:>8.1e} {seeds:>5} {heads:>5} {width // heads:>8}  {means}  {loss:6.4f} {ratio:>7.2f}  "
                f"{against:>16}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
