"""Experiment trackers: `sink` is what a run writes to, `wandb` all else that concerns Weights & Biases."""
