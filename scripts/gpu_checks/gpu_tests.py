"""The tests with marker `gpu`, by pytest without its plugins; each result is kept as it comes."""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import sys
from pathlib import Path
from typing import Any

from gpu_checks.runner import Context, Skipped
from scaling_lab.planning.execution import usable_cores

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "pytest.mark.gpu"
NO_CUDA = "skipped: no CUDA"
# Tests that measure speed, by pytest's -k.
TIMED = "mfu_above_a_floor"
MESSAGE_CHARACTERS = 300
# Exit status of pytest after all tests: no failure, failures, no test selected.
PYTEST_ENDED = (0, 1, 5)
# Packages that only the development environment has: a module of tests that imports one is left out, which is no failure.
OPTIONAL = re.compile(
    r"No module named '(hypothesis|jsonschema|rich|pandas|hydra|omegaconf|wandb|datasets|matplotlib)"
)


class Results:
    """A plugin of pytest that puts each test's outcome into a queue."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test is its call; without one (skipped, or a fixture failed) it is its setup.
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.add(report.nodeid, report.outcome, report.duration, report)
        elif report.when == "teardown" and report.failed:
            self.add(report.nodeid + " (teardown)", "failed", report.duration, report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            missing = OPTIONAL.search(str(report.longrepr))
            outcome = "failed" if missing is None else "skipped"
            self.add(report.nodeid or "collection", outcome, 0.0, report)

    def add(self, name: str, outcome: str, seconds: float, report: Any) -> None:
        message = "" if outcome == "passed" else message_of(report)
        self.found.put({"test": name, "outcome": outcome, "seconds": round(seconds, 2), "message": message})


def message_of(report: Any) -> str:
    """The last line of a failure, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # (file, line, reason)
        return str(report.longrepr[2]).removeprefix("Skipped: ")[:MESSAGE_CHARACTERS]
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return " ".join((lines[0] if lines else str(report.longrepr).strip()).split())[:MESSAGE_CHARACTERS]


def files() -> list[str]:
    """Modules with tests for a GPU."""
    return [
        str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text("utf-8")
    ]


class Shard:
    """A plugin that keeps every `count`-th test, from `first` on."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        others = [item for k, item in enumerate(items) if k % self.count != self.first]
        items[:] = [item for k, item in enumerate(items) if k % self.count == self.first]
        config.hook.pytest_deselected(items=others)


def run_shard(found: Any, wanted: str, first: int, count: int) -> None:
    """A process: the tests that `wanted` (pytest's -k) selects, or its share of them; results go to the queue `found`."""
    import pytest

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    # Before cuBLAS is first called: some tests compare this process with deterministic ones, bit for bit.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without the options of pyproject.toml, some of which are of plugins.
    options = [
        "-o",
        "addopts=",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    plugins = [Results(found), Shard(first, count)]
    status = pytest.main([*options, "-k", wanted, "--rootdir", str(ROOT), *files()], plugins=plugins)
    found.put(int(status))


def shards(device: str) -> int:
    """Processes that share the tests: most of their time is compilation, on the host."""
    return max(1, min(4, usable_cores() // 4)) if device == "cuda" else 1


def run(context: Context) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    # Plugins are not needed, and a machine's own may be broken or missing.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["SCALING_LAB_GPU_TESTS_ON"] = context.device
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    tests: dict[str, dict[str, Any]] = {}
    keep(context, tests)
    count = shards(context.device)
    run_phase(context, tests, f"not {TIMED}", count)
    # Tests that measure speed have the device to themselves.
    run_phase(context, tests, TIMED, 1)
    if not tests:
        raise RuntimeError("pytest ran no test")


def run_phase(context: Context, tests: dict[str, dict[str, Any]], wanted: str, count: int) -> None:
    """Run tests in `count` processes. Raises RuntimeError if one of them ends before its tests do."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    processes = [
        spawn.Process(target=run_shard, args=(found, wanted, first, count)) for first in range(count)
    ]
    for process in processes:
        process.start()
    ended = 0
    while ended < count:
        try:
            item = found.get(timeout=1.0)
        except queue.Empty:
            if not any(process.is_alive() for process in processes) and found.empty():
                raise RuntimeError(f"{count - ended} of {count} processes of pytest ended early") from None
            continue
        if isinstance(item, int):
            if item not in PYTEST_ENDED:
                raise RuntimeError(f"pytest ended with status {item} before its last test")
            ended += 1
            continue
        # Each process reports a module that cannot be imported.
        tests[item["test"]] = item
        keep(context, tests)
    for process in processes:
        process.join()


def keep(context: Context, tests: dict[str, dict[str, Any]]) -> None:
    each = list(tests.values())
    counts = {name: sum(t["outcome"] == name for t in each) for name in ("passed", "failed", "skipped")}
    context.write(**counts, tests=each)
