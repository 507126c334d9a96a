"""Tests of the README's Python example: it runs as it stands, on a table with the columns that the README names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scaling_lab.analysis.inference.calibration import Cell, simulate

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    runs = simulate(Cell("quickstart", "quickstart", 0.005, "isoflop"), 0)
    lines = [
        f"{name},{n!r},{d!r},{c!r},{loss!r}"
        for name, n, d, c, loss in zip(
            runs.run_id,
            runs.n_params.tolist(),
            runs.n_tokens.tolist(),
            runs.compute_flops.tolist(),
            runs.loss_nats.tolist(),
        )
    ]
    (tmp_path / "my_runs.csv").write_text("\n".join(["run_id,params,tokens,flops,loss", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert re.search(r"^0\.5\d+ Interval\(lo=0\.[45]", printed)
    # The prediction is the one at the compute that was asked for.
    asked = scope["analysis"].predict(1e21).parametric
    assert asked.compute_flops == 1e21
    assert printed.splitlines()[-1] == repr(asked.params_opt)
    assert (tmp_path / "report" / "report.html").exists()
