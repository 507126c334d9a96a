"""The tests with marker `gpu`, by pytest without its plugins; each result is kept as it comes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gpu_checks.runner import Context, Skipped

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "pytest.mark.gpu"
NO_CUDA = "skipped: no CUDA"
MESSAGE_CHARACTERS = 300
# Packages that only the development environment has: a module of tests that imports one is left out, which is no failure.
OPTIONAL = re.compile(
    r"No module named '(hypothesis|jsonschema|rich|pandas|hydra|omegaconf|wandb|datasets|matplotlib)"
)


class Results:
    """A plugin of pytest that writes each test's outcome."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tests: list[dict[str, Any]] = []

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
        self.tests.append(
            {"test": name, "outcome": outcome, "seconds": round(seconds, 2), "message": message}
        )
        counts = {
            each: sum(t["outcome"] == each for t in self.tests) for each in ("passed", "failed", "skipped")
        }
        self.context.write(**counts, tests=self.tests)


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


def run(context: Context) -> None:
    try:
        import pytest
    except ImportError:
        raise Skipped("pytest is not installed") from None
    # Plugins are not needed, and a machine's own may be broken or missing.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["SCALING_LAB_GPU_TESTS_ON"] = context.device
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    results = Results(context)
    context.write(passed=0, failed=0, skipped=0, tests=[])
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
    status = pytest.main([*options, "--rootdir", str(ROOT), *files()], plugins=[results])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not results.tests:
        raise RuntimeError(f"pytest ended with {status!r} and ran no test")
