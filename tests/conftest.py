"""Owns what all tests share: errors of single figures are not turned into a line of the report, they fail the test; and
models of a few thousand parameters are computed on one thread, which is faster, and does not collapse on a busy machine."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import settings

# Assertions in helpers show their values on failure, as those in test modules do.
pytest.register_assert_rewrite("helpers")

os.environ.setdefault("SCALING_LAB_STRICT", "1")
# What was checked is remembered, but not among what the user's own commands remember.
os.environ.setdefault("SCALING_LAB_CACHE_DIR", os.path.join(tempfile.gettempdir(), "scaling_lab-tests"))
# The width of the terminal that tests were started from is not theirs (pytest-xdist sets it in its workers).
os.environ.pop("COLUMNS", None)
# Read by torch and NumPy when they are imported, after this file.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that is busy is no failure: what takes too long ends by pytest's own timeout.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
