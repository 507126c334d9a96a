"""Weights & Biases: importing runs, uploading a sweep, the analysis run."""
