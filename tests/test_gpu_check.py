"""scripts/gpu_check: time limits, what a kill leaves, targets that were not run, and what it does without."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from helpers.processes import with_helpers

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
SCRIPT = SCRIPTS / "gpu_check"
BLOCKED = ROOT / "tests" / "data" / "blocked_packages"
FAKE = "helpers.gpu_check_parts"


@pytest.fixture
def check(monkeypatch) -> ModuleType:
    """Module `gpu_checks.main`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PYTHONPATH", with_helpers()["PYTHONPATH"])
    from gpu_checks import main

    return main


def options_of(check: ModuleType, out: Path, *limits: tuple[str, float]):
    parts = tuple(check.Part(name, name, {"tiny": limit}, FAKE) for name, limit in limits)
    out.mkdir()
    return check.Options("cpu", "tiny", out, parts)


def is_running(pid: int) -> bool:
    from scaling_lab.core.storage.claims import process_start

    return process_start(pid) is not None


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not is_running(pid)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_limit_ends_a_part_and_the_next_begins(check, tmp_path, capsys):
    out = tmp_path / "out"
    limits = (("failing", 60.0), ("hanging", 8.0), ("quick", 60.0))
    assert check.run(options_of(check, out, *limits)) == 1
    statuses = {name: read(out / f"{name}.json")["status"] for name, _ in limits}
    assert statuses == {"failing": "failed", "hanging": "timed out", "quick": "done"}
    assert read(out / "failing.json")["reason"] == "ValueError: it fails"
    hanging = read(out / "hanging.json")
    assert "limit of 8 s" in hanging["reason"]
    assert gone_within(
        hanging["result"]["pid"], 10.0
    )  # what it had found is kept, what it had started is not
    summary = (out / "summary.txt").read_text()
    for line in ("failing failed", "hanging timed out", "quick done"):
        assert line in summary
    shown = capsys.readouterr().out
    assert "not run  MFU at 350M" in shown
    assert "\nmet " not in shown + summary
    assert read(out / "environment.json")["packages"]["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="finding processes needs /proc")
def test_a_kill_leaves_valid_json_and_no_process(tmp_path):
    out = tmp_path / "out"
    code = (
        f"import sys; sys.path[:0] = [{str(SCRIPTS)!r}]\n"
        "from pathlib import Path\nfrom gpu_checks import main\n"
        f"parts = tuple(main.Part(name, name, {{'tiny': 120.0}}, {FAKE!r}) for name in ('quick', 'hanging'))\n"
        f"out = Path({str(out)!r}); out.mkdir()\n"
        "main.run(main.Options('cpu', 'tiny', out, parts))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=with_helpers(), stdout=subprocess.DEVNULL)
    hanging, end = out / "hanging.json", time.monotonic() + 120
    while not (hanging.exists() and "pid" in read(hanging)["result"]) and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert read(out / "quick.json")["status"] == "done"
    assert read(hanging)["status"] == "running"
    for path in out.glob("*.json"):
        read(path)
    assert "quick done" in (out / "summary.txt").read_text()
    assert gone_within(read(hanging)["result"]["pid"], 30.0)


def ended(name: str, status: str = "done", **result):
    return {"part": name, "status": status, "reason": None, "seconds": 100.0, "result": result}


def rows(over: float, mfu: float):
    return [{"n_params": n, "over_compiled": over, "ours_mfu": mfu} for n in (3.5e8, 5e7, 4e6, 1e5, 7e3)]


def all_parts(status: str = "done", over: float = 2.0, mfu: float = 0.45, failed: int = 0):
    return {
        "gpu_tests": ended("gpu_tests", status, passed=9, failed=failed, skipped=0),
        "shapes": ended("shapes", status, rows=rows(over, mfu)),
        "sweep": ended("sweep", status, times_faster=4 * over, plain_compiled=True),
        "isoflop": ended("isoflop", status),
    }


def test_targets(check):
    from gpu_checks.targets import MET, MISSED, NOT_RUN, judge

    def verdicts(parts, device: str = "cuda", size: str = "full"):
        return [row["verdict"] for row in judge(parts, device, size)]

    assert verdicts(all_parts()) == [MET] * 5
    assert verdicts(all_parts(over=0.9, mfu=0.39, failed=1)) == [MISSED] * 4 + [MET]
    # A CPU and the tiny size measure no target, whatever their numbers.
    assert set(verdicts(all_parts(), "cpu", "tiny")) == {NOT_RUN}
    assert set(verdicts(all_parts(), "cuda", "tiny")) == {NOT_RUN}
    assert set(verdicts({})) == {NOT_RUN}
    # Without a part, or with one that did not come to its end, nothing that needs it is met.
    needs = {"gpu_tests": {0, 4}, "shapes": {2, 3, 4}, "sweep": {1, 4}, "isoflop": {4}}
    for left_out in itertools.chain.from_iterable(itertools.combinations(needs, n) for n in range(1, 5)):
        for status in (None, "timed out", "failed", "skipped", "running"):
            parts = all_parts()
            for name in left_out:
                parts[name] = ended(name, status or "")
                if status is None:
                    del parts[name]
            found = verdicts(parts)
            for name in left_out:
                assert {found[k] for k in needs[name]} == {NOT_RUN}, (left_out, status)


def test_targets_of_parts_that_were_cut_short(check):
    from gpu_checks.targets import NOT_RUN, judge

    def verdict(parts, index: int):
        return judge(parts, "cuda", "full")[index]["verdict"]

    short = all_parts()
    short["shapes"]["result"]["rows"] = rows(2.0, 0.45)[:4]
    assert verdict(short, 3) == NOT_RUN
    short["shapes"]["result"]["rows"] = [*rows(2.0, 0.45)[:4], {"n_params": 7e3, "over_compiled": None}]
    assert verdict(short, 3) == NOT_RUN
    short["shapes"]["result"]["rows"] = [{**row, "ours_mfu": None} for row in rows(2.0, 0.45)]
    assert verdict(short, 2) == NOT_RUN  # a card whose peak is not known
    short["gpu_tests"]["result"].update(passed=0, skipped=9)
    assert verdict(short, 0) == NOT_RUN
    short["sweep"]["result"]["plain_compiled"] = False
    assert verdict(short, 1) == NOT_RUN


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["device=gpu"], "device='gpu' is not known. Did you mean 'cpu'? Choices: auto, cpu, cuda."),
        (["size=small"], "size='small' is not known."),
        (["devise=cpu"], "option='devise' is not known. Did you mean 'device'?"),
        (["only=shape"], "only='shape' is not known. Did you mean 'shapes'?"),
        (["full"], "'full' is not of the form key=value"),
        (["device=cpu", "size=full"], "size=full requires device=cuda"),
        (["device=cpu", f"out={ROOT}"], "exists and is not an empty folder"),
    ],
)
def test_bad_options(check, capsys, arguments, said):
    assert check.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_limits_and_help(check, capsys):
    assert sum(part.limit_s["full"] for part in check.PARTS) < 9 * 60
    assert check.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for part in check.PARTS:
        assert f"\n    {part.name} " in shown


def blocked_environment() -> dict[str, str]:
    environment = with_helpers()
    return {**environment, "PYTHONPATH": os.pathsep.join([str(BLOCKED), environment["PYTHONPATH"]])}


def test_it_imports_neither_hydra_nor_wandb_nor_datasets():
    """Every module that a part imports, its child processes' included, where those packages cannot be imported."""
    code = (
        f"import sys; sys.path[:0] = [{str(SCRIPTS)!r}, {str(ROOT)!r}]\n"
        "import bench_train, gpu_checks.environment, gpu_checks.gpu_tests, gpu_checks.isoflop, gpu_checks.main\n"
        "import gpu_checks.shapes, gpu_checks.sweep, scaling_lab.worker, scaling_lab.launching.worker\n"
        "import scaling_lab.training.run.loop, scaling_lab.analysis.analysis\n"
        "import conftest, test_gpu\n"
        "found = {n.split('.')[0] for n in sys.modules} & {'hydra', 'omegaconf', 'wandb', 'datasets', 'hypothesis'}\n"
        "assert not found, found\n"
        "try:\n    import hydra\nexcept ImportError:\n    print('blocked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=blocked_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "blocked", done.stderr[-2000:]


@pytest.mark.slow
def test_a_sweep_and_the_tests_without_those_packages(tmp_path):
    """Two parts to their end, tiny, on the CPU; .ci/run runs all of them."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "device=cpu", "size=tiny", "only=gpu_tests,isoflop", f"out={out}"],
        env=blocked_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tests, isoflop = read(out / "gpu_tests.json"), read(out / "isoflop.json")
    assert tests["status"] == isoflop["status"] == "done"
    assert tests["result"]["failed"] == 0
    assert tests["result"]["passed"] >= 6
    assert any("no CUDA" in test["message"] for test in tests["result"]["tests"])
    assert [e["approach"] for e in isoflop["result"]["estimates"]] == ["envelope", "isoflop", "parametric"]
    assert all(loss > 0 for loss in isoflop["result"]["losses_nats"].values())
    assert not (out / "work").exists()
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 1e6
    assert "\nmet " not in done.stdout
