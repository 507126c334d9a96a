"""The parts of scripts/gpu_check: each runs in a process of its own and leaves one JSON file."""
