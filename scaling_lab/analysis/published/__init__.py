"""Published results, one file each beside its data (see README.md for where the tables come from): found by scanning."""
