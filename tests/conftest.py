"""Settings of all tests: an error of one figure fails the test instead of becoming a line of the report, and
models of a few thousand parameters are computed on one thread, which is faster, also on a busy machine."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings

# Assertions in helpers show their values on failure, as those in test modules do.
pytest.register_assert_rewrite("helpers")

os.environ.setdefault("SCALING_LAB_STRICT", "1")
# The cache of verified shards is separate from the user's own.
os.environ.setdefault("SCALING_LAB_CACHE_DIR", os.path.join(tempfile.gettempdir(), "scaling_lab-tests"))
# Output must not depend on the width of the terminal (pytest-xdist sets it in its workers).
os.environ.pop("COLUMNS", None)
# Read by torch and NumPy when they are imported, after this file.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is not a failure: pytest's own timeout ends what takes too long.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
