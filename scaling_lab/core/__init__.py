"""Core data types: counts, specs, records, schedules, sources, the run store. Standard library and NumPy only."""
