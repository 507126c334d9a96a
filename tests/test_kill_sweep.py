"""Whole sweeps under random kills, compared with an undisturbed one: scripts/kill_sweep.py, shortened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/kill_sweep.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forty_kills_of_workers_and_commands_change_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "40", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^kill_sweep: 40 SIGKILLs", done.stdout)
    assert "OK every run completed exactly once" in done.stdout
    # Everything that can be killed was killed.
    for what in ("worker", "command", "both", "training", "checkpointing", "recording"):
        assert re.search(rf"\b[1-9]\d* {what}\b", done.stdout), done.stdout


def test_the_script_detects_each_kind_of_problem(tmp_path):
    """Its checks find what they look for: a different loss, a second owner, a run trained after its end."""
    import importlib.util
    from dataclasses import replace

    from helpers.synthetic import synthetic_records

    spec = importlib.util.spec_from_file_location("kill_sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["kill_sweep"] = script
    spec.loader.exec_module(script)
    record = synthetic_records(budgets=(1e11,), sizes=4, curve_points=4)[0]
    assert script.different(record, record) == []
    other = replace(record, curve=(replace(record.curve[0], train_loss_nats=9.0), *record.curve[1:]))
    assert script.different(other, record)
    assert script.different(replace(record, final_val_loss_nats=9.0), record)

    sweep = script.Sweep(tmp_path / "s", tmp_path, script.random.Random(0))
    claim = sweep.store.claim(record.spec)
    assert claim is not None
    sweep.store.start_curve(record.run_id, record.curve).close()
    sweep.store.write_record(record)
    whole = {record.run_id: record}
    assert sweep.problems(whole) == []
    at = (sweep.store.run_folder(record.run_id) / "record.json").stat().st_mtime_ns

    def announce(*lines: tuple[int, int]) -> None:
        text = "".join(f"{at + when} {pid} +training {record.run_id}\n" for when, pid in lines)
        sweep.announced.path.write_text(text)
        sweep.announced = script.Announcements(sweep.announced.path)

    announce((-3, 1), (-2, 2))
    assert sweep.problems(whole) == []
    announce((-3, 1), (-2, 2), (-1, 1))
    assert any("two processes" in problem for problem in sweep.problems(whole))
    announce((-3, 1), (10**9, 1))
    assert any("after its record" in problem for problem in sweep.problems(whole))
