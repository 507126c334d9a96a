"""Print a table of fact coverage for Zipf frequencies of slope 0: each tenfold increase in text adds a tenth.

    python scripts/zipf_table.py

Shows how often a fact of each frequency decade is stated in corpora of 1e3, 1e4 and 1e5 statements, and the share of
statements about facts already seen; below, the exact share for the facts of data=zipf_facts.
"""

from __future__ import annotations

from scaling_lab.core.sources.generation.zipf_exposure import DecadeWorld, exposure_lines
from scaling_lab.core.sources.zipf_facts import ZipfFacts


def main() -> None:
    print("\n".join(exposure_lines(DecadeWorld(), (1_000, 10_000, 100_000), ZipfFacts())))


if __name__ == "__main__":
    main()
