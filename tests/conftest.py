"""Settings of all tests: an error of one figure fails the test instead of becoming a line of the report, and
models of a few thousand parameters are computed on one thread, which is faster, also on a busy machine."""

from __future__ import annotations

import os
import tempfile

import pytest

# Assertions in helpers show their values on failure, as those in test modules do.
pytest.register_assert_rewrite("helpers")

os.environ.setdefault("SCALING_LAB_STRICT", "1")
# The cache of verified shards is separate from the user's own.
os.environ.setdefault("SCALING_LAB_CACHE_DIR", os.path.join(tempfile.gettempdir(), "scaling_lab-tests"))
# Output must not depend on the width of the terminal (pytest-xdist sets it in its workers).
os.environ.pop("COLUMNS", None)
# Read by torch and NumPy when they are imported, after this file.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# scripts/gpu_check runs the tests marked `gpu` where hypothesis may be missing.
try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # A busy machine is not a failure: pytest's own timeout ends what takes too long.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")

# cpu: tests marked `gpu` that take the fixture `run_device` run their logic on a CPU.
GPU_TESTS_ON = "SCALING_LAB_GPU_TESTS_ON"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available() or (gpu_tests_device() == "cpu" and "run_device" in item.fixturenames):  # type: ignore[attr-defined]
        return
    from scaling_lab.training.engine.devices import device_name

    pytest.skip(f"no CUDA: {device_name(torch.device('cpu'))} only")


def gpu_tests_device() -> str:
    return os.environ.get(GPU_TESTS_ON, "cuda")


@pytest.fixture
def run_device() -> str:
    """The device of a test marked `gpu`: cuda, or where scripts/gpu_check says so, cpu."""
    return gpu_tests_device()
