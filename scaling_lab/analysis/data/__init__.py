"""From tables, files and run records to `Observations`, the points that every fit uses."""
