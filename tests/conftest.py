"""Owns what all tests share: errors of single figures are not turned into a line of the report, they fail the test."""

from __future__ import annotations

import os

os.environ.setdefault("SCALING_LAB_STRICT", "1")
