"""Model shapes, without torch: each counts its own parameters and FLOPs. One family per file."""
