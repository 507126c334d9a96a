"""Weights & Biases around a sweep: import of runs, upload, the analysis run."""
