"""Published results, one file each, found by scanning. See README.md for the sources of the tables."""
