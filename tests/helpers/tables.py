"""Tables with the exact losses of a Chinchilla law, and checks of what was read from them and fitted."""

from __future__ import annotations

import json
import warnings
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_lab.analysis.analysis import Analysis, AnalysisSettings, analyze, read_observations
from scaling_lab.analysis.data.observations import Observations
from scaling_lab.analysis.inference.bootstrap import BootstrapSettings
from scaling_lab.core.errors import UserError

# L = E + A N^-alpha + B D^-beta, Hoffmann et al. 2022 (arXiv 2203.15556), eq. 10.
LAW = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
PARAMS_EXPONENT = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
"""a of N_opt ~ C^a under C = 6 N D."""
PLAIN = AnalysisSettings(bootstrap=BootstrapSettings(resamples=0), profile=False)
QUICK = AnalysisSettings(
    bootstrap=BootstrapSettings(resamples=0), profile=False, sensitivity=False, backtest=False
)
"""The three estimates alone: eight times faster."""


def law_loss(params: Any, tokens: Any) -> Any:
    return LAW["E"] + LAW["A"] * params ** -LAW["alpha"] + LAW["B"] * tokens ** -LAW["beta"]


def grid(budgets: int = 4, sizes: int = 6) -> pd.DataFrame:
    """An IsoFLOP grid from the law, exact."""
    rows = []
    for i, c in enumerate(np.geomspace(1e18, 1e21, budgets)):
        for j, n in enumerate(0.1 * c**0.5 * np.geomspace(0.25, 4, sizes)):
            d = c / (6 * n)
            rows.append((f"b{i}s{j}", round(n), d, 6 * round(n) * d, law_loss(n, d)))
    return pd.DataFrame(rows, columns=["run_id", "params", "tokens", "flops", "loss"])


def read(path: Path, **options: Any) -> Observations:
    """Observations of a file, warnings being errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_observations(path, AnalysisSettings(**options))


@cache
def schema() -> Any:
    """The validator of analysis.json."""
    import jsonschema

    text = resources.files("scaling_lab.analysis").joinpath("analysis.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def analyzed(obs: Observations, s: AnalysisSettings = PLAIN) -> Analysis:
    """The analysis, warnings being errors and its JSON valid."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis = analyze(obs, s)
        data = json.loads(json.dumps(analysis.to_json_dict("x"), allow_nan=False))
    error = next(schema().iter_errors(data), None)
    assert error is None, error
    return analysis


def refused(path: Path, **options: Any) -> str:
    """The one line for a file that cannot be analyzed."""
    with pytest.raises(UserError) as found:
        analyzed(read(path, **options))
    return one_line(str(found.value))


def one_line(text: str) -> str:
    """A message that fits on a terminal."""
    assert "\n" not in text
    assert 10 < len(text) < 1500
    return text


def same_numbers(obs: Observations, frame: pd.DataFrame | None = None) -> None:
    """All rows of the grid were read, in any order."""
    wanted = grid() if frame is None else frame
    assert obs.n_points == len(wanted)
    np.testing.assert_allclose(np.sort(obs.loss_nats), np.sort(wanted["loss"]), rtol=1e-7)
    np.testing.assert_allclose(np.sort(obs.compute_flops), np.sort(wanted["flops"]), rtol=1e-7)
    assert not obs.dropped


def assert_the_laws_numbers(
    analysis: Analysis, approaches: tuple[str, ...] = ("isoflop", "parametric")
) -> None:
    """The estimates from exact losses on a centered grid equal the law."""
    for name in approaches:
        frontier = analysis.estimate(name).frontier
        assert frontier is not None, analysis.estimate(name).message
        assert frontier.params.exponent == pytest.approx(PARAMS_EXPONENT, abs=1e-3), name
        assert frontier.tokens.exponent == pytest.approx(1 - PARAMS_EXPONENT, abs=1e-3), name
    (fit,) = analysis.estimate("parametric").fits
    for name, value in LAW.items():
        assert fit.parameters[name] == pytest.approx(value, rel=1e-2), name
