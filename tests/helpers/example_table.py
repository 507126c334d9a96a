"""The small table of runs that the examples of the documentation read: my_runs.csv, three budgets of twelve sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from scaling_lab.analysis.inference.calibration import LAWS

LAW = LAWS["chinchilla"]
BUDGETS_FLOPS = (1e19, 1e20, 1e21)
SIZES = 12
NOISE = 0.003


def example_table() -> pd.DataFrame:
    """(36, 5): run_id, params, tokens, flops, loss under the law of Besiroglu et al. 2024, with noise."""
    flops = np.repeat(BUDGETS_FLOPS, SIZES)
    params = LAW.params_opt(flops) * np.tile(np.geomspace(0.25, 4, SIZES), len(BUDGETS_FLOPS))
    tokens = flops / (6 * params)
    noise = np.random.default_rng(0).normal(0.0, NOISE, flops.size)
    return pd.DataFrame(
        {
            "run_id": [f"run-{k}" for k in range(flops.size)],
            "params": params.round(),
            "tokens": tokens.round(),
            "flops": flops,
            "loss": (LAW.loss(params, tokens) * np.exp(noise)).round(5),
        }
    )


def write_examples(folder: Path) -> None:
    """The files that the documentation's examples name."""
    example_table().to_csv(folder / "my_runs.csv", index=False)
