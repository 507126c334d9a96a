"""Measurements during training: validation loss, gradient noise scale, divergence, coordinate check."""
