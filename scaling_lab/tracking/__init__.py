"""Experiment trackers: `sink`, which training runs write to, and `wandb`, everything else about Weights & Biases."""
