"""Owns the table of what a corpus can teach when facts have Zipf frequencies of slope 0: each tenfold of text adds a tenth.

    python scripts/zipf_table.py

How often a fact of each decade of frequency is stated in corpora of 1e3, 1e4 and 1e5 statements, and what share of
statements is about facts that were seen; below, the exact share for the facts of data=zipf_facts.
"""

from __future__ import annotations

from scaling_lab.core.sources.generation.zipf_exposure import DecadeWorld, exposure_lines
from scaling_lab.core.sources.zipf_facts import ZipfFacts


def main() -> None:
    print("\n".join(exposure_lines(DecadeWorld(), (1_000, 10_000, 100_000), ZipfFacts())))


if __name__ == "__main__":
    main()
