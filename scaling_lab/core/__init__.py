"""The vocabulary of scaling_lab: counts, specs, records, schedules, the store. Standard library and numpy only."""
