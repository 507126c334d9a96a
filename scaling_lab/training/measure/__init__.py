"""Measurements of a model in training: evaluation losses, gradient noise scale, divergence, coordinate check."""
